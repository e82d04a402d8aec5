"""Integrating the flow from noise to a sample, with classifier-free guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from g4v_jax.diffusion.flow import shift_times


def schedule(steps: int, shift: float) -> jax.Array:
    """Times [steps + 1] from 1 to 0, shifted as in training."""
    return shift_times(jnp.linspace(1.0, 0.0, steps + 1), shift)


def guide(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """Classifier-free guidance: u + scale·(c - u) (Ho & Salimans 2022)."""
    return unconditional + scale * (conditional - unconditional)


def euler(velocity: Callable, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Euler steps along `times` [n + 1]; velocity(x [X ...], t [X]) -> [X ...]."""

    def step(x, bounds):
        now, after = bounds
        return x + (after - now) * velocity(x, jnp.full(x.shape[:1], now)), None

    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x
