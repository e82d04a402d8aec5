"""Losses of next tokens, token by token: cross-entropy, and divergence from another model; and their sums.

May hold what is computed of one place's scores over the vocabulary, and how it is done without holding all of them: scores of
a row are large where vocabularies are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from g4v_jax.models.llm import LLM
from g4v_jax.sharding import on_one_cpu
from g4v_jax.types import Term


@jax.custom_vjp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits f32 [B S V], targets i32 [B S] -> nats f32 [B S].

    Its gradient keeps the logits alone and makes the softmax again: JAX's own keeps it beside them.
    """
    return _token_losses(logits, targets)[0]


def _token_losses(logits, targets):
    norm = jax.nn.logsumexp(logits, axis=-1)
    if on_one_cpu():
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    else:  # a sum: a vocabulary that lies over several devices is not gathered
        own = jnp.sum(jnp.where(_hit(logits, targets), logits, 0.0), axis=-1)
    return norm - own, (logits, targets, norm)


def _token_losses_backward(kept, g):
    logits, targets, norm = kept
    return g[..., None] * (jnp.exp(logits - norm[..., None]) - _hit(logits, targets)), None


def _hit(logits, targets):
    return jnp.arange(logits.shape[-1]) == targets[..., None]


token_losses.defvjp(_token_losses, _token_losses_backward)


def token_divergences(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(reference || model) of the next token, in nats: how far the model has moved. f32 [B S V] twice -> f32 [B S].

    The reference gets no gradient.
    """
    base = jax.nn.log_softmax(jax.lax.stop_gradient(reference))
    return jnp.sum(jnp.exp(base) * (base - jax.nn.log_softmax(logits)), axis=-1)


def score(
    llm: LLM, params: dict, targets: jax.Array, hidden: jax.Array, base: jax.Array | None = None, chunks: int = 1
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """What final states [B S D] of an LLM make of the next tokens i32 [B S], scored in `chunks`.

    Cross-entropy of each; and of `base`, states of the same LLM to compare with, which get no gradient: their cross-entropy,
    and how far the first moved from them. f32 [B S] each, the last two None where there is no `base`.
    """

    def place(targets, hidden, base=None):
        logits = llm.apply({"params": params}, hidden, method="logits")
        own = token_losses(logits, targets)
        if base is None:
            return own
        reference = llm.apply({"params": jax.lax.stop_gradient(params)}, base, method="logits")
        return own, token_losses(reference, targets), token_divergences(reference, logits)

    if base is None:
        return in_chunks(place, chunks, targets, hidden), None, None
    return in_chunks(place, chunks, targets, hidden, base)


def weighted(values: jax.Array, weights: jax.Array) -> Term:
    """Values f32 [B S] of places, summed by their weights f32 [B S]."""
    return Term(jnp.sum(values * weights), jnp.sum(weights))


def in_chunks(function: Callable, chunks: int, *arrays: jax.Array):
    """function(*arrays) of arrays [B S ...], in `chunks` parts along S whose inner values are not kept for the gradient.

    The function is of each place alone, and gives arrays [B S]. Parts take every so-manieth place, so that each has its
    share of every device where S is sharded. 1: at once, everything kept. Raises ValueError where S does not divide.
    """
    if chunks == 1:
        return function(*arrays)
    rows, length = arrays[0].shape[:2]
    if length % chunks:
        raise ValueError(f"{length} places do not divide into {chunks} chunks")

    def part(x):
        return jnp.moveaxis(x.reshape(rows, length // chunks, chunks, *x.shape[2:]), 2, 0)

    found = jax.lax.map(jax.checkpoint(lambda parts: function(*parts)), tuple(part(x) for x in arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(rows, length), found)
