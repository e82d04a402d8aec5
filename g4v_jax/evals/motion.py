"""How much clips move and flicker, by plain formulas on their pixels.

May hold measures of u8 clips [N T H W 3] that give one number a clip and need no model; all look at luma Y
(0.299 R + 0.587 G + 0.114 B of ITU-R BT.601, in [0, 1]). None is good or bad by itself: read them beside those of real
clips of the same size and frame rate (`figures`). Where hardly anything moves, shares tell about compression alone.
"""

from collections.abc import Callable

import numpy as np

from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure

LUMA = np.array([0.299, 0.587, 0.114], np.float32) / 255
MOVES = 8 / 255  # change of luma from one frame to the next that is more than compression leaves

MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {}


def _measure(frames: int):
    """Of the luma f32 [T H W] of one clip -> of clips u8 [N T H W 3]; a UserError for fewer than `frames` frames."""

    def make(of_one: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], np.ndarray]:
        def of_all(videos: np.ndarray) -> np.ndarray:
            if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8:
                raise ValueError(f"clips are {videos.dtype} {videos.shape}, not uint8 [N T H W 3]")
            if videos.shape[1] < frames:
                raise UserError(
                    f"a clip of {videos.shape[1]} frames is shorter than the metric needs: "
                    f"{of_one.__name__} takes {frames} or more"
                )
            return np.array([of_one(video @ LUMA) for video in videos], np.float64)

        of_all.__name__, of_all.__doc__ = of_one.__name__, of_one.__doc__
        MEASURES[of_one.__name__] = of_all
        return of_all

    return make


@_measure(2)
def motion(luma: np.ndarray) -> float:
    """Mean |Y(t+1) - Y(t)| over pixels and steps, of each of N clips: f64 [N] in [0, 1]; 0 for a still."""
    return _steps(luma).mean(dtype=np.float64)


@_measure(2)
def moving_area(luma: np.ndarray) -> float:
    """Share of pixels, over all steps, whose luma changes by more than 8 of 255 levels: f64 [N] in [0, 1]."""
    return (_steps(luma) > MOVES).mean()


@_measure(2)
def moving_change(luma: np.ndarray) -> float:
    """Mean |Y(t+1) - Y(t)| over what `moving_area` counts: f64 [N] in [0, 1]; 0 where nothing moves."""
    steps = _steps(luma)
    moving = steps[steps > MOVES]
    return moving.mean(dtype=np.float64) if moving.size else 0.0


@_measure(3)
def flicker(luma: np.ndarray) -> float:
    """Share of temporal energy at high frequencies: Σ(d(t+1) - d(t))² / 2Σ(d(t+1)² + d(t)²) of d(t) = Y(t+1) - Y(t).

    f64 [N] in [0, 1]: the energy of d at frequency ω (π: every second frame) counts by sin²(ω/2). 0 for a steady
    fade and for a still, 1/2 for a sharp edge that passes, 3/4 for noise that is new in every frame, 1 for two
    frames in turn.
    """
    d = np.diff(luma, axis=0)
    return _share(np.diff(d, axis=0) ** 2, 2 * (d[1:] ** 2 + d[:-1] ** 2))


@_measure(3)
def taken_back(luma: np.ndarray) -> float:
    """Share of the change that the next frame undoes: 1 - Σ|Y(t+1) - Y(t-1)| / Σ(|Y(t+1) - Y(t)| + |Y(t) - Y(t-1)|).

    f64 [N] in [0, 1]: 0 for whatever goes one way, a fade or an edge that passes, and for a still; 1/2 for noise that
    is new in every frame, 1 for two frames in turn. A thing thinner than its step counts as undone.
    """
    steps = _steps(luma)
    path = steps[1:] + steps[:-1]
    return max(0.0, _share(path - np.abs(luma[2:] - luma[:-2]), path))


def figures(videos: np.ndarray, reference: np.ndarray, prefix: str = "motion") -> dict[str, Figure]:
    """Means over clips of every measure of `videos` and, beside them, of real clips: prefix/flicker, .../flicker_real.

    Both are u8 [N T H W 3] of the same T, H, W and frame rate. Raises UserError for other shapes and for fewer than 3
    frames.
    """
    if videos.shape[1:] != reference.shape[1:]:
        raise UserError(f"clips {videos.shape[1:]} cannot be read beside real ones {reference.shape[1:]}; resize them")
    both = {"": videos, "_real": reference}
    return {
        f"{prefix}/{name}{suffix}": Figure.mean(measure(clips))
        for name, measure in MEASURES.items()
        for suffix, clips in both.items()
    }


def _steps(luma: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(luma, axis=0))


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    """Of two sums; 0 of nothing."""
    total = whole.sum(dtype=np.float64)
    return float(part.sum(dtype=np.float64) / total) if total > 0 else 0.0
