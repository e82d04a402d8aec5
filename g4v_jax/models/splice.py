"""Putting summary tokens and generation queries into a row, and taking the queries' states out again.

All gathers stay within a row, so they never cross devices when rows are sharded.
"""

import jax
import jax.numpy as jnp


def splice(
    x: jax.Array, summary: jax.Array, clip_index: jax.Array, queries: jax.Array, query_index: jax.Array
) -> jax.Array:
    """Replace the vectors at clip and query positions of x [B S D].

    summary [B K·Q D], clip_index i32 [B S] (-1: none) into it; queries [N D], query_index i32 [B S] (-1, or g·N+n).
    """
    clip = jnp.take_along_axis(summary, jnp.maximum(clip_index, 0)[..., None], axis=1)
    query = queries[jnp.maximum(query_index, 0) % queries.shape[0]]
    x = jnp.where((clip_index >= 0)[..., None], clip.astype(x.dtype), x)
    return jnp.where((query_index >= 0)[..., None], query.astype(x.dtype), x)


def query_positions(query_index: jax.Array, count: int) -> jax.Array:
    """Where each of `count` = G·N queries stands in its row: query_index [B S] -> i32 [B count]; 0 if absent."""
    return jnp.argmax(query_index[:, None, :] == jnp.arange(count)[None, :, None], axis=-1)


def take(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B S D], positions i32 [B M] -> [B M D]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)
