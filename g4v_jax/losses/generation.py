"""The flow-matching loss of the denoiser, and the autoencoder's own losses."""

import jax
import jax.numpy as jnp

from g4v_jax.types import Term


def flow_matching(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> Term:
    """Squared error averaged over each slot's noises and latents, summed over used slots.

    velocity and target f32 [B G K t h w c], mask bool [B G].
    """
    error = jnp.mean(jnp.square(velocity - target), axis=tuple(range(2, target.ndim)))
    weight = mask.astype(jnp.float32)
    return Term(jnp.sum(error * weight), jnp.sum(weight))
