"""Next-token cross-entropy, for captions and answers, and with other weights for refusals."""

import jax
import jax.numpy as jnp

from g4v_jax.types import Term


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Term:
    """logits f32 [B S V], targets i32 [B S], weights f32 [B S] -> nats summed over weighted targets."""
    # a masked sum, whose gradient is no scatter
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - target
    return Term(jnp.sum(nats * weights), jnp.sum(weights))
