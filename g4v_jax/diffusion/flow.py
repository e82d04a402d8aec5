"""Rectified flow matching: the path, its target, and how times are drawn (Lipman et al. 2023; Esser et al. 2024).

x_t = (1 - t)·x0 + t·ε, target v = dx/dt = ε - x0. Pure functions; times are per sample, in [0, 1], 1 is noise.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

SMALLEST_TIME = 0.05  # where a predicted x0 is turned into a velocity by dividing by t


@struct.dataclass
class Draws:
    """All that is random in a generation slot of a training batch, drawn outside the model."""

    times: jax.Array  # f32 [B G K], K times and noises for each clip
    noise: jax.Array  # f32 [B G K t h w c]
    drop: jax.Array  # bool [B G] train without the condition
    gate: jax.Array  # bool [B G] blocked slots: train the learned blocked context in place of the condition


def shift_times(t: jax.Array, shift: float) -> jax.Array:
    """Move times toward noise: s·t / (1 + (s - 1)·t) (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(key: jax.Array, shape: tuple[int, ...], shift: float) -> jax.Array:
    """Times f32 of a shape: logit-normal(0, 1), then shifted."""
    return shift_times(jax.nn.sigmoid(jax.random.normal(key, shape)), shift)


def draw(
    row_keys: jax.Array, latents: tuple[int, ...], times: Callable, drop_rate: float, gate_rate: float, noises: int = 1
) -> Draws:
    """Draw for each row from its own key, so that draws do not depend on how rows are batched.

    row_keys [B]; latents (G, t, h, w, c); times(key, shape) -> f32 of the shape; `noises`: K.
    """
    slots = latents[0]

    def row(key):
        time, noise, drop, gate = jax.random.split(key, 4)
        return Draws(
            times=times(time, (slots, noises)),
            noise=jax.random.normal(noise, (slots, noises, *latents[1:])),
            drop=jax.random.bernoulli(drop, drop_rate, (slots,)),
            gate=jax.random.bernoulli(gate, gate_rate, (slots,)),
        )

    return jax.vmap(row)(row_keys)


def _expand(t: jax.Array, like: jax.Array) -> jax.Array:
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t of samples x0 [X ...], noise [X ...], t [X]."""
    t = _expand(t, x0)
    return (1 - t) * x0 + t * noise


def to_velocity(prediction: jax.Array, x_t: jax.Array, t: jax.Array, kind: str) -> jax.Array:
    """Turn the network's output into a velocity. `kind`: "velocity", or "x0": v = (x_t - x0) / t.

    Predicting x0 puts the target on the data's low-dimensional manifold (Li & He 2025) and is what small models
    learn from few steps.
    """
    if kind == "velocity":
        return prediction
    if kind == "x0":
        return (x_t - prediction) / jnp.maximum(_expand(t, x_t), SMALLEST_TIME)
    raise ValueError(f"unknown prediction {kind!r}; known: velocity, x0")
