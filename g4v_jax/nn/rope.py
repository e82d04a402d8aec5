"""Rotary position embeddings (Su et al. 2021) in the half-split form, over one axis or several."""

import jax
import jax.numpy as jnp


def angles(positions: jax.Array, dim: int, base: float = 10_000.0) -> jax.Array:
    """positions [...] -> angles float32 [..., dim/2]: position · base^(-2i/dim)."""
    frequency = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return positions[..., None].astype(jnp.float32) * frequency


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split a head over (t, h, w) as Wan2.1 does: h and w take 2·(d // 6) each and t the rest (128 -> 44, 42, 42)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def grid_angles(shape: tuple[int, int, int], head_dim: int, base: float = 10_000.0) -> jax.Array:
    """Angles of a (t, h, w) grid in raster order, float32 [t·h·w, head_dim/2]."""
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    return jnp.concatenate([angles(grid[:, i], dim, base) for i, dim in enumerate(axis_dims(head_dim))], axis=-1)


def rotate(x: jax.Array, theta: jax.Array) -> jax.Array:
    """Rotate x [B S H d] by theta [B S d/2] or [S d/2]; pair i is (x[i], x[i + d/2]). Computed in float32."""
    theta = theta[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(theta), jnp.sin(theta)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
