"""The loop of greedy decoding, for whatever model gives the next token. May hold this loop alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BUCKET = 32  # prompts are padded to a multiple of this many tokens, so that few programs serve all


def bucket(length: int) -> int:
    """The least multiple of BUCKET that holds `length` tokens."""
    return -(-length // BUCKET) * BUCKET


def follow(
    advance: Callable, token: jax.Array, cache, lengths: jax.Array, max_tokens: int, stops: tuple[int, ...], limit=None
) -> jax.Array:
    """The tokens that follow rows of `lengths` i32 [B] tokens, i32 [B max_tokens]; after a stop, the stop again.

    `token` i32 [B] is the first of them; advance(token, places i32 [B], cache) -> (the next token, cache), where `places`
    is how many tokens stand before `token`. Ends as soon as every row has, or after `limit` tokens, an i32 [] that may be
    traced.
    """
    limit = max_tokens if limit is None else limit
    tokens = jnp.zeros((len(token), max_tokens), jnp.int32).at[:, 0].set(token)

    def ended(token):
        return jnp.isin(token, jnp.array(stops, jnp.int32))

    def more(carry):
        i, token, _, _ = carry
        return (i < limit) & ~jnp.all(ended(token))

    def step(carry):
        i, token, tokens, cache = carry
        following, cache = advance(token, lengths + i - 1, cache)
        token = jnp.where(ended(token), token, following)
        return i + 1, token, tokens.at[:, i].set(token), cache

    count, token, tokens, _ = jax.lax.while_loop(more, step, (1, token, tokens, cache))
    return jnp.where(jnp.arange(max_tokens) < count, tokens, token[:, None])
