"""Flow matching and its sampler: against loops in float64, known distributions, and data whose flow is known."""

from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from g4v_jax import rng
from g4v_jax.diffusion import flow, sampler
from g4v_jax.losses.generation import flow_matching

LATENTS = (2, 1, 2, 2, 3)


# The path and its target


def test_interpolate_walks_from_data_to_noise():
    x0, noise, t = normal(3, 2, 2), normal(3, 2, 2, seed=1), np.array([0.0, 0.25, 1.0], np.float32)
    out = np.asarray(flow.interpolate(x0, noise, t))
    np.testing.assert_array_equal(out[0], x0[0])
    np.testing.assert_array_equal(out[2], noise[2])
    for i in range(3):
        np.testing.assert_allclose(out[i], np.float64(x0[i]) * (1 - t[i]) + np.float64(noise[i]) * t[i], atol=1e-6)


def test_the_velocity_is_the_slope_of_the_path():
    x0, noise = normal(3, 4), normal(3, 4, seed=1)
    early, late = (flow.interpolate(x0, noise, np.full(3, t, np.float32)) for t in (0.25, 0.75))
    np.testing.assert_allclose((late - early) / 0.5, flow.to_velocity(noise - x0, None, None, "velocity"), atol=1e-5)


def test_a_perfect_prediction_of_the_data_is_a_perfect_velocity():
    x0, noise, t = normal(4, 2, 3), normal(4, 2, 3, seed=1), np.array([0.05, 0.3, 0.8, 1.0], np.float32)
    velocity = flow.to_velocity(x0, flow.interpolate(x0, noise, t), t, "x0")
    np.testing.assert_allclose(velocity, noise - x0, atol=2e-5)


def test_the_velocity_stays_finite_where_no_noise_is_left():
    x = normal(2, 3)
    velocity = flow.to_velocity(x + 0.1, x, np.zeros(2, np.float32), "x0")
    np.testing.assert_allclose(velocity, np.full((2, 3), -0.1 / flow.SMALLEST_TIME), rtol=1e-3)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; known: velocity, x0"):
        flow.to_velocity(1.0, 1.0, 1.0, "epsilon")


def test_the_loss_is_a_mean_over_noises_and_latents_and_a_sum_over_used_slots():
    shape = (3, 2, 4, 1, 2, 2, 3)  # four noises a slot
    velocity, target = normal(*shape), normal(*shape, seed=1)
    mask = np.array([[True, False], [True, True], [False, False]])
    expected = sum(np.mean((np.float64(velocity[b, g]) - target[b, g]) ** 2) for b, g in np.argwhere(mask))
    term = flow_matching(velocity, target, mask)
    assert float(term.sum) == pytest.approx(expected, rel=1e-5) and float(term.count) == 3
    poisoned = np.where(mask[..., None, None, None, None, None], velocity, 1e6)
    assert float(flow_matching(poisoned, target, mask).sum) == pytest.approx(expected, rel=1e-5)


# Draws


def draws(rows: int, shift=1.0, drop=0.1, gate=0.5, latents=LATENTS, seed=0, noises=1) -> flow.Draws:
    times = partial(flow.logit_normal, shift=shift)
    return jax.device_get(flow.draw(rng.row_keys(jax.random.key(seed), rows), latents, times, drop, gate, noises))


def test_a_rows_draws_do_not_depend_on_the_other_rows():
    few, many = draws(4, noises=3), draws(8, noises=3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:4]), few, many)
    assert few.noise.shape == (4, 2, 3, *LATENTS[1:])
    assert few.times.shape == (4, 2, 3) and few.drop.shape == few.gate.shape == (4, 2)
    assert len(np.unique(many.times)) == 48 and len(np.unique(many.noise)) == many.noise.size
    assert (draws(4, seed=1, noises=3).noise != few.noise).all()
    keys = rng.row_keys(jax.random.key(0), 8)[np.array([5, 2])]
    moved = flow.draw(keys, LATENTS, partial(flow.logit_normal, shift=1.0), 0.1, 0.5, 3)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[np.array([5, 2])]), jax.device_get(moved), many)


@pytest.fixture(scope="module", params=[1.0, 3.0])
def many(request) -> tuple[float, flow.Draws]:
    """(shift, 16384 draws)."""
    return request.param, draws(8192, shift=request.param, drop=0.1, gate=0.6, latents=(2, 1, 1, 1, 1))


def within(share: float, expected: float, count: int) -> bool:
    """Whether a share is within four standard errors of what is expected."""
    return abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_times_are_logit_normal_then_shifted(many):
    shift, drawn = many
    times = drawn.times.ravel()
    assert ((0 < times) & (times < 1)).all()
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        plain = 1 / (1 + np.exp(-NormalDist().inv_cdf(share)))
        quantile = shift * plain / (1 + (shift - 1) * plain)
        assert within(np.mean(times < quantile), share, times.size), share


def test_noise_is_standard_normal_and_choices_have_their_rates(many):
    _, drawn = many
    noise = drawn.noise.ravel()
    for z in (-2.0, -0.5, 0.0, 1.0):
        assert within(np.mean(noise < z), NormalDist().cdf(z), noise.size), z
    assert within(drawn.drop.mean(), 0.1, drawn.drop.size) and within(drawn.gate.mean(), 0.6, drawn.gate.size)


def test_what_is_drawn_for_a_slot_is_independent(many):
    _, drawn = many
    columns = [drawn.times[:, 0, 0], drawn.times[:, 1, 0], drawn.noise[:, 0].ravel(), drawn.drop[:, 0], drawn.gate[:, 0]]
    correlation = np.corrcoef(np.stack(columns).astype(np.float64)) - np.eye(5)
    assert np.abs(correlation).max() < 4 / 8192**0.5


# Sampling


def test_the_schedule_runs_from_noise_to_data_and_lingers_where_it_is_shifted_to():
    np.testing.assert_allclose(sampler.schedule(4, 1.0), [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    expected = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    np.testing.assert_allclose(sampler.schedule(4, 3.0), expected, atol=1e-6)


def test_guidance():
    c, u = normal(2, 3), normal(2, 3, seed=1)
    np.testing.assert_allclose(sampler.guide(c, u, 1.0), c, atol=1e-6)
    np.testing.assert_allclose(sampler.guide(c, u, 0.0), u, atol=1e-6)
    for i, j in np.ndindex(2, 3):
        expected = float(u[i, j]) + 2.5 * (float(c[i, j]) - float(u[i, j]))
        assert float(sampler.guide(c, u, 2.5)[i, j]) == pytest.approx(expected, abs=1e-5)


def test_euler_takes_the_steps_of_a_loop():
    noise, times = normal(3, 4), np.array([1.0, 0.7, 0.2, 0.0], np.float32)
    out = sampler.euler(lambda x, t: jnp.sin(x) * t[:, None] + x**2 / 4, noise, times)
    x = np.float64(noise)
    for now, after in zip(times[:-1], times[1:]):
        x = x + (float(after) - float(now)) * (np.sin(x) * float(now) + x**2 / 4)
    np.testing.assert_allclose(out, x, atol=1e-5)


def gaussian(mean: float, std: float):
    """The exact velocity E[ε - x0 | x_t] where the data are N(mean, std²)."""

    def velocity(x, t):
        t = t[:, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        centred = (x - (1 - t) * mean) / variance
        return t * centred - (mean + (1 - t) * std**2 * centred)

    return velocity


def test_the_exact_field_of_gaussian_data_carries_noise_to_the_data():
    """In one dimension the flow keeps order: noise ε must arrive at mean + std·ε, and more steps come closer."""
    noise, mean, std = normal(500, 1), 1.5, 0.4
    expected = mean + std * np.float64(noise)

    def error(steps, shift=1.0):
        out = sampler.euler(gaussian(mean, std), noise, sampler.schedule(steps, shift))
        return np.abs(out - expected).max()

    assert error(400) < 0.02 and error(400, shift=3.0) < 0.05
    assert error(50) > 1.6 * error(100) > 1.6**2 * error(200)  # of first order
    out = np.asarray(sampler.euler(gaussian(mean, std), noise, sampler.schedule(400, 1.0)))
    assert out.mean() == pytest.approx(mean + std * noise.mean(), abs=0.01)
    assert out.std() == pytest.approx(std * noise.std(), rel=0.02)


def test_a_field_given_as_the_datas_expectation_carries_noise_as_well():
    """The same field told as E[x0 | x_t], through `to_velocity`; only its last steps differ, where time is clamped."""
    noise, mean, std = normal(200, 1), -0.5, 0.3

    def velocity(x, t):
        expectation = x - t[:, None] * gaussian(mean, std)(x, t)
        return flow.to_velocity(expectation, x, t, "x0")

    out = sampler.euler(velocity, noise, sampler.schedule(400, 1.0))
    np.testing.assert_allclose(out, mean + std * noise, atol=0.05)
