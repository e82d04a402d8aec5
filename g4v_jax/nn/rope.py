"""Rotary position embeddings (Su et al. 2021) in the half-split form, over one axis or several."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

SCALINGS = {  # kinds of `scaling` and what else each must give
    "linear": {"factor"},
    "llama3": {"factor", "low_frequency_factor", "high_frequency_factor", "original_length"},
}


def angles(positions: jax.Array, dim: int, base: float = 10_000.0, scaling: Mapping | None = None) -> jax.Array:
    """positions [...] -> angles float32 [..., dim/2]: position · base^(-2i/dim), the frequencies scaled by `rescale`."""
    frequency = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling:
        frequency = rescale(frequency, scaling)
    return positions[..., None].astype(jnp.float32) * frequency


def rescale(frequency: jax.Array, scaling: Mapping) -> jax.Array:
    """Frequencies [d/2] for contexts longer than those trained on.

    `scaling["kind"]`: "linear" divides all by `factor` (Chen et al. 2023). "llama3" divides those whose wave is longer
    than original_length / low_frequency_factor, keeps those shorter than original_length / high_frequency_factor, and
    goes from one to the other in between (Llama 3.1's `apply_scaling`). Raises ValueError for another kind or keys.
    """
    kind, rest = scaling.get("kind"), set(scaling) - {"kind"}
    if SCALINGS.get(kind) != rest:
        raise ValueError(f"rope_scaling: {dict(scaling)} is none of {SCALINGS}")
    slow = frequency / scaling["factor"]
    if kind == "linear":
        return slow
    low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
    turns = scaling["original_length"] * frequency / (2 * math.pi)  # of a wave over the original context
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * slow + keep * frequency


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split a head over (t, h, w) as Wan2.1 does: h and w take 2·(d // 6) each and t the rest (128 -> 44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def grid_angles(grid: tuple[int, int, int], head_dim: int, base: float = 10_000.0) -> jax.Array:
    """Rotary angles of a (t, h, w) grid in raster order, f32 [t·h·w, head_dim/2].

    Each axis on the host in float64 and less whole turns, so that float32 holds also far places to its last bit.
    """
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, axis_dims(head_dim))):
        theta = np.outer(np.arange(length), base ** (-np.arange(0, dim, 2) / dim))
        theta = (theta - 2 * np.pi * np.round(theta / (2 * np.pi))).astype(np.float32)
        shape = [1, 1, 1, theta.shape[-1]]
        shape[axis] = length
        angles.append(jnp.broadcast_to(theta.reshape(shape), (*grid, theta.shape[-1])))
    return jnp.concatenate(angles, axis=-1).reshape(-1, head_dim // 2)


def rotate(x: jax.Array, theta: jax.Array) -> jax.Array:
    """Rotate x [B S H d] by theta [B S d/2] or [S d/2]; pair i is (x[i], x[i + d/2]). Computed in float32."""
    theta = theta[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
