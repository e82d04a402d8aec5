"""Preference of one answer over another: DPO within packed rows.

Direct preference optimization (Rafailov et al. 2023, equation 7), with the reference that LoRA gives for free: the same
LLM with LoRA off. A model without LoRA has no base to stay near; its reference is uniform, which with cross-entropy on
the preferred answers is contrastive preference optimization (Xu et al. 2024, equation 6).
"""

import jax
import jax.numpy as jnp

from g4v_jax.models.llm import LLM
from g4v_jax.types import Batch, Term


def margins(gains: jax.Array, batch: Batch) -> jax.Array:
    """How much more each pair's preferred answer gains than its rejected one: f32 [B R], 0 in empty slots.

    gains f32 [B S]: log p(target) less the reference's, in nats.
    """
    length = batch.segments.shape[1]
    example = jnp.where(batch.segments > length, batch.segments - length, batch.segments)
    owned = (example[:, None, :] == batch.preference_owner[:, :, None]) & (batch.preference_owner > 0)[:, :, None]
    return jnp.einsum("brs,bs->br", owned.astype(jnp.float32), gains * batch.preference)


def preference(losses: jax.Array, reference: jax.Array | None, batch: Batch, beta: float) -> Term:
    """-log sigmoid(beta · margin) summed over pairs, of each token's cross-entropy f32 [B S] under the model and under the
    reference, which gets no gradient; None: a uniform one.
    """
    gains = -losses if reference is None else jax.lax.stop_gradient(reference) - losses
    used = (batch.preference_owner > 0).astype(jnp.float32)
    return Term(jnp.sum(jax.nn.softplus(-beta * margins(gains, batch)) * used), jnp.sum(used))


def reference_hidden(llm: LLM, params: dict, inputs: jax.Array, batch: Batch) -> jax.Array | None:
    """States [B S D] of `llm` with LoRA off on the same vectors [B S D]; None where it has no LoRA."""
    if not llm.lora:
        return None
    base = llm.clone(lora=(), name=None, parent=None)
    params, inputs = jax.lax.stop_gradient((params, inputs))
    return base.apply({"params": params}, inputs, batch.positions, batch.segments, method="hidden")
