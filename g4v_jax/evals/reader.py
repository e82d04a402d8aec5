"""Reads shape, colour, motion and size off a clip by rules, without any learned model.

This is the impartial judge of rendered clips: it sees only pixels, so a clip counts as right
when its picture is right. It relies on what the built-in world guarantees, one saturated sprite
on an almost grey background, and answers None where that does not hold.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from g4v_jax.data.world.attributes import COLOURS, HUES, SCALES, SHAPES, VALUES
from g4v_jax.data.world.draw import FINE, STENCIL, blocked_card, stencil

SIDE = 32  # clips are judged at this many pixels a side
FRAMES = 9  # and at no more than this many frames

MIN_CHROMA = 0.25  # of full saturation; below it nothing counts as a sprite
MIN_AREA = 0.008  # of the frame; below it a frame shows no sprite
MIN_TRAVEL = 0.13  # of the frame; below it a sprite stands still
MIN_FIT = 0.7  # correlation with the best silhouette; below it the shape is unknown
MIN_CARD_FIT = 0.8  # correlation of luminance with the blocked card

_TEMPLATE_SCALES = np.geomspace(0.37, 0.69, 10)
_ASPECTS = ((1.0, 1.0), (0.75, 1.0), (1.0, 0.75))  # of a sprite in a squashed 1:1, 4:3, 3:4 clip

Array = np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a clip shows. An attribute is None where the pixels do not decide it.

    `confidence` has a number in 0..1 for each attribute: how far the winning value is ahead of
    the nearest other one; 0 where the attribute is None.
    """

    shape: str | None
    colour: str | None
    motion: str | None
    size: str | None
    confidence: dict[str, float]

    @property
    def attributes(self) -> dict[str, str | None]:
        """The four values by name, as in `parse_caption` and captions.jsonl."""
        return {name: getattr(self, name) for name in VALUES}


def read(video: Array) -> Reading:
    """Judge one clip: uint8 RGB [frames, height, width, 3] of any size.

    A blank clip or the blocked card reads as None throughout; a single frame has no motion.
    Raises ValueError when the array is not such a video.
    """
    chroma = _chroma(_shrink(video))
    strong = abs(chroma)
    # The 99th percentile is robust to noise, and the smallest sprite covers 3 % of a frame.
    core = strong > max(MIN_CHROMA, 0.6 * np.percentile(strong, 99))
    if core.mean() < MIN_AREA / 2:
        return _reading()
    hue = chroma[core].sum()
    hue /= abs(hue)
    strength = np.median(strong[core])
    coverage = np.clip((chroma * hue.conj()).real / strength, 0, 1)
    coverage[coverage < 0.2] = 0  # tint and compression noise of the background

    visible = coverage.mean((1, 2)) > MIN_AREA
    if visible.mean() < 0.5:
        return _reading()
    times = np.flatnonzero(visible)
    coverage = coverage[visible]
    centres = _centres(coverage)
    shape, size = _match(_average(coverage, centres))
    return _reading(
        shape=shape, colour=_colour(hue), motion=_motion(times, centres, len(chroma)), size=size
    )


def is_blocked_card(video: Array) -> bool:
    """Whether every frame of uint8 RGB [frames, height, width, 3] is the blocked card."""
    pixels = _shrink(video)
    if np.percentile(abs(_chroma(pixels)), 99) > MIN_CHROMA:
        return False
    card = _shrink(blocked_card(1, 2 * SIDE, 2 * SIDE)).mean(-1).reshape(1, -1)
    seen = pixels.mean(-1).reshape(len(pixels), -1)
    # Correlation ignores contrast, so a faint trace of the sign has to be ruled out apart.
    contrast = seen.std(1).min() > card.std() / 2
    return bool(contrast and (_unit(seen) @ _unit(card)[0]).min() > MIN_CARD_FIT)


def _reading(**found: tuple[str | None, float]) -> Reading:
    decided = {name: found.get(name, (None, 0.0)) for name in VALUES}
    confidence = {
        name: float(np.clip(margin, 0, 1)) if value else 0.0
        for name, (value, margin) in decided.items()
    }
    return Reading(**{name: value for name, (value, _) in decided.items()}, confidence=confidence)


def _shrink(video: Array) -> Array:
    """Float RGB in 0..1 of at most FRAMES frames of SIDE x SIDE pixels, by area averaging."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or video.size == 0:
        raise ValueError(f"expected uint8 [T,H,W,3], got {video.dtype} {list(video.shape)}")
    count = min(len(video), FRAMES)
    chosen = video[np.rint(np.linspace(0, len(video) - 1, count)).astype(int)].astype(np.float32)
    if chosen.shape[1:3] != (SIDE, SIDE):
        rows, columns = _area_weights(chosen.shape[1]), _area_weights(chosen.shape[2])
        chosen = np.einsum("yh,thwc->tywc", rows, chosen, optimize=True)
        chosen = np.einsum("xw,tywc->tyxc", columns, chosen, optimize=True)
    return chosen / 255


@lru_cache
def _area_weights(length: int) -> Array:
    """Matrix [SIDE, length] that averages `length` pixels into SIDE equal intervals."""
    edges = np.arange(SIDE + 1) * length / SIDE
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * SIDE / length).astype(np.float32)


def _chroma(pixels: Array) -> Array:
    """Colour as a complex number [T, SIDE, SIDE]: angle is hue, length is purity in 0..1.

    The median, which belongs to the background, is taken off, and its tint with it.
    """
    red, green, blue = np.moveaxis(pixels, -1, 0)
    real, imaginary = red - (green + blue) / 2, (green - blue) * np.sqrt(3) / 2
    return real - np.median(real) + 1j * (imaginary - np.median(imaginary))


def _colour(hue: complex) -> tuple[str, float]:
    wheel = np.exp(1j * np.radians([HUES[name] for name in COLOURS]))
    distance = abs(np.angle(hue / wheel))
    first, second = np.argsort(distance)[:2]
    return COLOURS[first], (distance[second] - distance[first]) / np.radians(60)


def _centres(coverage: Array) -> Array:
    """Centroids [T, 2] as (y, x) in pixels, the middle of the first pixel being 0."""
    mass = coverage.sum((1, 2))
    axis = np.arange(SIDE)
    y = (coverage.sum(2) @ axis) / mass
    x = (coverage.sum(1) @ axis) / mass
    return np.stack([y, x], 1)


def _motion(times: Array, centres: Array, frames: int) -> tuple[str | None, float]:
    """Direction of the straight line that fits the path best in the least-squares sense."""
    if len(times) < 2:
        return None, 0.0
    slope = np.polyfit(times, centres, 1)[0]
    y, x = slope * (frames - 1) / SIDE
    major, minor = max(abs(x), abs(y)), min(abs(x), abs(y))
    if major < MIN_TRAVEL:
        return "still", 1 - major / MIN_TRAVEL
    if minor > 0.6 * major:
        return None, 0.0
    name = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("up" if y < 0 else "down")
    return name, 1 - max(minor / (0.6 * major), MIN_TRAVEL / major)


def _average(coverage: Array, centres: Array) -> Array:
    """Mean silhouette [SIDE, SIDE] over the frames, each moved to put its centroid in the middle.

    The move is a bilinear interpolation, a triangular weight matrix along each axis.
    """
    offset = centres - (SIDE - 1) / 2
    axis = np.arange(SIDE)
    source = axis[None, None, :, None] + offset.T[:, :, None, None]
    rows, columns = np.clip(1 - abs(source - axis), 0, None)
    return (rows @ coverage @ columns.transpose(0, 2, 1)).mean(0)


def _match(silhouette: Array) -> tuple[tuple[str | None, float], tuple[str | None, float]]:
    """Shape and size of the template that correlates best, each with its confidence."""
    fit = (_templates() @ _unit(silhouette.reshape(1, -1))[0]).reshape(len(SHAPES), -1)
    by_shape = fit.max(1)
    second, first = np.argsort(by_shape)[-2:]
    if by_shape[first] < MIN_FIT:
        return (None, 0.0), (None, 0.0)
    # Shapes of the right kind correlate at 0.9 and more, so a lead of 0.1 is a clear one.
    shape = SHAPES[first], 10 * (by_shape[first] - by_shape[second])
    scale = _TEMPLATE_SCALES[fit[first].argmax() // len(_ASPECTS)]
    border = np.sqrt(SCALES["small"] * SCALES["large"])
    margin = abs(np.log(scale / border)) / np.log(SCALES["large"] / border)
    return shape, ("small" if scale < border else "large", margin)


@lru_cache
def _templates() -> Array:
    """Unit vectors [shapes * scales * aspects, SIDE * SIDE] of centred silhouettes."""
    axis = (np.arange(SIDE * FINE) + 0.5) / (SIDE * FINE) - 0.5
    bank = []
    for shape in SHAPES:
        points = stencil(shape)
        centre = np.argwhere(points).mean(0) + 0.5
        for scale in _TEMPLATE_SCALES:
            for width, height in _ASPECTS:
                row = np.floor(axis * STENCIL / (scale * height) + centre[0]).astype(int)
                column = np.floor(axis * STENCIL / (scale * width) + centre[1]).astype(int)
                inside = np.logical_and.outer(
                    (row >= 0) & (row < STENCIL), (column >= 0) & (column < STENCIL)
                )
                drawn = inside & points[np.ix_(row % STENCIL, column % STENCIL)]
                bank.append(drawn.reshape(SIDE, FINE, SIDE, FINE).mean((1, 3)).ravel())
    return _unit(np.array(bank, np.float32))


def _unit(rows: Array) -> Array:
    """Rows with zero mean and unit length, so that their product is a correlation."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
