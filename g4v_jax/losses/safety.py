"""Hazard detection: is the turn that ends here hazardous?"""

import jax
import jax.numpy as jnp

from g4v_jax.types import Term


def detection(logits: jax.Array, labels: jax.Array, positive_weight: float) -> Term:
    """Weighted binary cross-entropy. logits f32 [B E], labels i32 [B E] (0 safe, 1 hazardous, -1 empty)."""
    used = (labels >= 0).astype(jnp.float32)
    weight = used * jnp.where(labels == 1, positive_weight, 1.0)
    nats = jax.nn.softplus(jnp.where(labels == 1, -logits, logits))
    return Term(jnp.sum(nats * weight), jnp.sum(weight))


def detection_count(labels: jax.Array, positive_weight: float) -> jax.Array:
    """The count of `detection`, known before the forward pass."""
    return jnp.sum((labels >= 0) * jnp.where(labels == 1, positive_weight, 1.0))
