"""Losses of next tokens, token by token: cross-entropy, and divergence from another model; and their sums.

May hold what is computed of one place's scores over the vocabulary, and how it is done without holding all of them: scores of
a row are large where vocabularies are.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from g4v_jax.models.llm import LLM
from g4v_jax.sharding import on_one_cpu
from g4v_jax.types import Term

STATES = "gradients of states"  # name of what `in_chunks` keeps where a function makes it beside its values
HALVED = 64  # a row of fewer numbers is not cut in two


@jax.custom_vjp
def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits f32 [B S V], targets i32 [B S] -> nats f32 [B S].

    Its gradient keeps the logits alone and makes the softmax again: JAX's own keeps it beside them.
    """
    return _token_losses(logits, targets)[0]


def _token_losses(logits, targets):
    norm = _log_sum_exp(logits)
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_losses(head: Callable, params: dict, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """`token_losses` of the scores head(params, hidden), a product of both: states [B S D] and targets i32 [B S] -> nats f32 [B S].

    Where the head is frozen, the states' gradient is made with the losses, as each is of its own state alone, and no scores are kept.
    """
    return token_losses(head(params, hidden), targets)


def _head_losses(head, params, hidden, targets):
    learned = any(leaf.perturbed for leaf in jax.tree.leaves(params))
    params, hidden, targets = jax.tree.map(lambda leaf: leaf.value, (params, hidden, targets))
    if learned:
        scores, pull = jax.vjp(head, params, hidden)
        losses, kept = _token_losses(scores, targets)
        return losses, (pull, kept)
    scores, pull = jax.vjp(partial(head, params), hidden)
    losses, kept = _token_losses(scores, targets)
    (unit,) = pull(_token_losses_backward(kept, jnp.ones_like(losses))[0])
    return losses, checkpoint_name(unit, STATES)


def _head_losses_backward(head, residuals, g):
    if not isinstance(residuals, tuple):
        return None, g[..., None].astype(residuals.dtype) * residuals, None
    pull, kept = residuals
    return *pull(_token_losses_backward(kept, g)[0]), None


head_losses.defvjp(_head_losses, _head_losses_backward, symbolic_zeros=True)


@jax.custom_vjp
def token_divergences(reference: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(reference || model) of the next token, in nats: how far the model has moved. f32 [B S V] twice -> f32 [B S].

    The reference gets no gradient. Kept for the gradient are the scores alone, as by `token_losses`.
    """
    return _token_divergences(reference, logits)[0]


def _token_divergences(reference, logits):
    norms = _log_sum_exp(reference)[..., None], _log_sum_exp(logits)[..., None]

    def divergence(reference, logits):
        base = reference - norms[0]
        return jnp.exp(base) * (base - (logits - norms[1]))

    return _sum(divergence, reference, logits), (reference, logits, norms)


def _token_divergences_backward(kept, g):
    reference, logits, norms = kept
    return None, g[..., None] * (jnp.exp(logits - norms[1]) - jnp.exp(reference - norms[0]))


token_divergences.defvjp(_token_divergences, _token_divergences_backward)


def _log_sum_exp(x):
    top = jnp.max(x, axis=-1)
    return jnp.log(_sum(lambda x: jnp.exp(x - top[..., None]), x)) + top


def _sum(function, *arrays):
    """Σ function(*arrays) over their last axis. On one CPU by halves, which are vectors: its compiler adds a row up number by number."""
    half = arrays[0].shape[-1] // 2
    if not on_one_cpu() or half < HALVED:
        return jnp.sum(function(*arrays), axis=-1)
    both = function(*(x[..., :half] for x in arrays)) + function(*(x[..., half : 2 * half] for x in arrays))
    odd = function(*(x[..., 2 * half :] for x in arrays))  # one column, or none
    return _sum(lambda x: x, both) + jnp.sum(odd, axis=-1)


def score(
    llm: LLM, params: dict, targets: jax.Array, hidden: jax.Array, base: jax.Array | None = None, chunks: int = 1
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """What final states [B S D] of an LLM make of the next tokens i32 [B S], scored in `chunks`.

    Cross-entropy of each; and of `base`, states of the same LLM to compare with, which get no gradient: their cross-entropy,
    and how far the first moved from them. f32 [B S] each, the last two None where there is no `base`.
    """
    params = llm.head_of(params)

    def head(params, hidden):
        return llm.apply({"params": params}, hidden, method="logits")

    if base is None:
        return in_chunks(lambda t, x: head_losses(head, params, x, t), chunks, targets, hidden), None, None

    def both(targets, hidden, base):  # one gradient for the two of them
        logits, reference = head(params, hidden), head(jax.lax.stop_gradient(params), base)
        return token_losses(logits, targets), token_losses(reference, targets), token_divergences(reference, logits)

    return in_chunks(both, chunks, targets, hidden, base)


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
    kept = jax.checkpoint_policies.save_only_these_names(STATES)
    alone = jax.checkpoint(lambda parts: function(*parts), policy=kept)
    parts = tuple(jnp.moveaxis(x.reshape(rows, length // chunks, chunks, *x.shape[2:]), 2, 0) for x in arrays)
    found = jax.lax.map(alone, parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(rows, length), found)
