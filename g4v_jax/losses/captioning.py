"""Next-token cross-entropy, for captions and answers, and with other weights for refusals."""

import jax
import jax.numpy as jnp

from g4v_jax.types import Term


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits f32 [B S V], targets i32 [B S] -> nats f32 [B S]."""
    # a masked sum, whose gradient is no scatter
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)


def divergence(reference: jax.Array, logits: jax.Array, weights: jax.Array) -> Term:
    """KL(reference || model) of the next token, in nats, summed over weighted places: how far the model has moved.

    reference and logits f32 [B S V], weights f32 [B S]; the reference gets no gradient.
    """
    base = jax.nn.log_softmax(jax.lax.stop_gradient(reference))
    moved = jnp.sum(jnp.exp(base) * (base - jax.nn.log_softmax(logits)), axis=-1)
    return Term(jnp.sum(moved * weights), jnp.sum(weights))


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Term:
    """logits f32 [B S V], targets i32 [B S], weights f32 [B S] -> nats summed over weighted targets."""
    return Term(jnp.sum(token_losses(logits, targets) * weights), jnp.sum(weights))
