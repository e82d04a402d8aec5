"""Putting summary tokens and generation queries into a row, and taking the queries' states out again.

Everything stays within a row, so nothing crosses devices when rows are sharded. Moves are products with one-hot
matrices: their transposes are products too, where a gather's would be a scatter, which CPUs and TPUs run slowly.
"""

import jax
import jax.numpy as jnp


def splice(
    x: jax.Array, summary: jax.Array, clip_index: jax.Array, queries: jax.Array, query_index: jax.Array
) -> jax.Array:
    """Replace the vectors at clip and query positions of x [B S D].

    summary [B K·Q D], clip_index i32 [B S] (-1: none) into it; queries [N D], query_index i32 [B S] (-1, or g·N+n).
    """
    count = queries.shape[0]
    clip = jax.nn.one_hot(clip_index, summary.shape[1], dtype=x.dtype)
    query = jax.nn.one_hot(jnp.where(query_index >= 0, query_index % count, -1), count, dtype=x.dtype)
    words = ((clip_index < 0) & (query_index < 0)).astype(x.dtype)
    inserted = jnp.einsum("bsm,bmd->bsd", clip, summary.astype(x.dtype))
    return x * words[..., None] + inserted + jnp.einsum("bsn,nd->bsd", query, queries.astype(x.dtype))


def query_positions(query_index: jax.Array, count: int) -> jax.Array:
    """Where each of `count` = G·N queries stands in its row: query_index [B S] -> i32 [B count]; 0 if absent."""
    return jnp.argmax(query_index[:, None, :] == jnp.arange(count)[None, :, None], axis=-1)


def take(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B S D], positions i32 [B M] -> [B M D]."""
    return jnp.einsum("bms,bsd->bmd", jax.nn.one_hot(positions, x.shape[1], dtype=x.dtype), x)
