"""Distances of feature sets against closed forms and scipy, their bias, and the measures of motion on drawn clips."""

import numpy as np
import pytest
import scipy.linalg

from g4v_jax.errors import UserError
from g4v_jax.evals import distances, motion
from g4v_jax.evals.distances import extrapolated, figure, framewise, frechet, kernel


def normal(n: int, deviations, mean=0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, (n, len(deviations))) * deviations


def exactly(n: int, mean: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Samples whose moments are exactly a diagonal Gaussian's."""
    x = np.random.default_rng(0).normal(size=(n, len(deviations)))
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * np.sqrt(n - 1) * deviations + mean


# Fréchet


def test_frechet_is_the_closed_form_of_diagonal_gaussians():
    rng = np.random.default_rng(1)
    (m1, m2), (s1, s2) = rng.normal(size=(2, 12)), rng.uniform(0.1, 2, (2, 12))
    wanted = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet(exactly(50, m1, s1), exactly(90, m2, s2)) == pytest.approx(wanted, rel=1e-10)


def test_frechet_agrees_with_the_root_of_the_product_of_covariances():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(200, 30)) @ rng.normal(size=(30, 30)), rng.normal(size=(150, 30)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet(a.astype(np.float32), b) == pytest.approx(wanted, rel=1e-5)


def test_frechet_takes_fewer_samples_than_features():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 40)), rng.normal(size=(6, 40))
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ np.cov(b.T) @ root), 0)).sum()
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a, a + 2) == pytest.approx(160)
    assert frechet(a, b) == pytest.approx(frechet(b, a)) == pytest.approx(frechet(a[::-1], b))


# Bias

D, DEVIATIONS = 24, np.linspace(0.3, 1.5, 24)
TRUE = D * 0.2**2 + np.sum((0.2 * DEVIATIONS) ** 2)


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n samples of each of two Gaussians at a squared distance of TRUE."""
    return normal(n, DEVIATIONS, seed=seed), normal(n, 1.2 * DEVIATIONS, seed=1000 + seed) + 0.2


def test_few_samples_make_frechet_too_large_and_the_extrapolated_value_is_nearer():
    bias, left = {}, {}
    for n in (100, 200, 400):
        pairs = [drawn(n, seed) for seed in range(20)]
        bias[n] = np.mean([frechet(*pair) for pair in pairs]) - TRUE
        left[n] = np.mean([extrapolated(*pair) for pair in pairs]) - TRUE
    assert bias[100] > 1.5 * TRUE  # where the truth is 3 parts in 5 bias
    assert bias[100] / bias[200] == pytest.approx(2, rel=0.2) and bias[200] / bias[400] == pytest.approx(2, rel=0.2)
    assert all(abs(left[n]) < 0.2 * bias[n] for n in bias)


def test_the_kernel_distance_is_unbiased_and_that_of_the_definition():
    def k(x, y):
        return (x @ y / D + 1) ** 3

    a, b = drawn(12, 0)
    same = [np.mean([k(x[i], x[j]) for i in range(12) for j in range(12) if i != j]) for x in (a, b)]
    assert kernel(a, b) == pytest.approx(sum(same) - 2 * np.mean([k(x, y) for x in a for y in b]))
    alike = [kernel(normal(20, DEVIATIONS, seed=s), normal(20, DEVIATIONS, seed=500 + s)) for s in range(200)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(200) and min(alike) < 0
    assert kernel(*drawn(400, 1)) > 5 * np.std(alike) / 20


def test_an_interval_is_as_wide_as_other_samples_differ():
    for distance in (frechet, kernel):
        values = [distance(*drawn(100, seed)) for seed in range(100)]
        found = figure(distance, *drawn(100, 0))
        assert (found.value, found.n) == (values[0], 100)
        assert (found.high - found.low) / (2 * 1.96 * np.std(values)) == pytest.approx(1, abs=0.4)
    assert figure(frechet, *drawn(20, 0), draws=5) == figure(frechet, *drawn(20, 0), draws=5)


def test_frames_are_compared_one_by_one():
    a, b = (x.reshape(10, 5, D) for x in drawn(50, 0))
    assert framewise(a, b) == frechet(a.reshape(50, D), b.reshape(50, D))
    assert framewise(a, b[:, ::-1], kernel) == pytest.approx(framewise(a, b, kernel))


def test_mistakes_with_features_are_named():
    a = normal(5, DEVIATIONS)
    for call in (lambda: frechet(a, a[:1]), lambda: kernel(a[:1], a), lambda: extrapolated(a, a[:4])):
        with pytest.raises(UserError, match="needs [25] samples of each, not [14]; take more clips"):
            call()
    with pytest.raises(UserError, match="needs 4 samples of each set, not 3"):
        figure(frechet, a[:3], a)
    with pytest.raises(UserError, match="not finite"):
        frechet(a, np.full_like(a, np.nan))
    with pytest.raises(ValueError, match="are not .N D. and .M D."):
        frechet(a, a[:, :3])


# Motion


def clip(levels) -> np.ndarray:
    """Grey levels [T H W] -> clip u8 [1 T H W 3]."""
    return np.repeat(np.asarray(levels, np.uint8)[None, ..., None], 3, -1)


def passing(frames: int = 9, size: int = 32) -> np.ndarray:
    """A white square of 8 pixels that moves 2 pixels a frame over black."""
    levels = np.zeros((frames, size, size))
    for t in range(frames):
        levels[t, 8:16, 2 + 2 * t : 10 + 2 * t] = 255
    return clip(levels)


STILL = clip(np.full((9, 8, 8), 90))
FADE = clip(np.arange(9)[:, None, None] * np.full((8, 8), 20))
TURNS = clip(np.array([0, 200] * 5)[:9, None, None] * np.ones((8, 8)))
NOISE = clip(np.random.default_rng(0).integers(0, 256, (9, 64, 64)))


def test_motion_is_the_mean_change_of_luma():
    square = 2 * 2 * 8  # pixels that change: two columns before it and two behind it
    assert motion.motion(passing())[0] == pytest.approx(square / 32**2)
    assert motion.moving_area(passing())[0] == pytest.approx(square / 32**2)
    assert motion.moving_change(passing())[0] == pytest.approx(1)
    assert motion.motion(FADE)[0] == pytest.approx(20 / 255) and motion.moving_area(FADE)[0] == 1
    assert [measure(STILL).tolist() for measure in motion.MEASURES.values()] == [[0]] * 5
    red = STILL.copy()
    red[0, 4:, ..., 0] += 100
    assert motion.motion(red)[0] == pytest.approx(0.299 * 100 / 255 / 8)


def test_flicker_tells_noise_from_motion():
    clips = {"fade": FADE, "edge": passing(), "noise": NOISE, "turns": TURNS}
    assert {name: motion.flicker(one)[0] for name, one in clips.items()} == pytest.approx(
        {"fade": 0, "edge": 0.5, "noise": 0.75, "turns": 1}, abs=0.01
    )
    assert {name: motion.taken_back(one)[0] for name, one in clips.items()} == pytest.approx(
        {"fade": 0, "edge": 0, "noise": 0.5, "turns": 1}, abs=0.01
    )


def test_clips_are_measured_one_by_one_beside_real_ones():
    both = np.concatenate([FADE, TURNS])
    assert motion.flicker(both) == pytest.approx([0, 1], abs=1e-6) and motion.flicker(both).dtype == np.float64
    found = motion.figures(both, STILL)
    assert set(found) == {f"motion/{name}{end}" for name in motion.MEASURES for end in ("", "_real")}
    assert (found["motion/flicker"].value, found["motion/flicker"].n) == (pytest.approx(0.5), 2)
    assert found["motion/flicker_real"].value == 0
    with pytest.raises(UserError, match="2 frames is shorter than the metric needs: flicker takes 3 or more"):
        motion.flicker(FADE[:, :2])
    with pytest.raises(UserError, match="cannot be read beside real ones"):
        motion.figures(FADE, NOISE)
    with pytest.raises(ValueError, match="not uint8"):
        motion.motion(FADE[0])


def test_draws_have_fixed_seeds():
    assert extrapolated(*drawn(30, 0)) == extrapolated(*drawn(30, 0)) and distances.SHARES[-1] == 1
