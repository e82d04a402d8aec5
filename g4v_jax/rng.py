"""Randomness as a pure function of (seed, stream name, step, row): resuming needs no generator state."""

import zlib

import jax


def stream(seed: int, name: str, step: jax.Array | int = 0) -> jax.Array:
    """Key of the named stream at a step. Streams of different names are independent."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """One key a row [B], so that a row's draws do not depend on how rows are split over micro-batches or devices."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jax.numpy.arange(rows))
