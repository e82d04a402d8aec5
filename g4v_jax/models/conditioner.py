"""From what the LLM read and made of a generation's caption and queries to what the denoiser attends to."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.linear import Linear
from g4v_jax.nn.norms import RMSNorm


class Conditioner(nn.Module):
    """Inputs and states [X M 2 D_llm] -> context [X M D_context], or one of two learned contexts in its place.

    `null` stands for "no condition" (classifier-free guidance, Ho & Salimans 2022), `blocked` for a hazardous one:
    the denoiser learns to render the blocked card from it.
    """

    dim: int
    length: int  # M: states a generation

    @nn.compact
    def __call__(self, states: jax.Array, drop: jax.Array, block: jax.Array) -> jax.Array:
        """drop and block bool [X] choose the learned contexts; block wins."""
        x = RMSNorm(name="norm")(states)
        x = jax.nn.gelu(Linear((self.dim,), (None, "embed", None), use_bias=True, name="up")(x))
        x = Linear((self.dim,), ("embed", None), use_bias=True, name="out")(x)

        def learned(name):
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("channels", "embed"))
            return self.param(name, init, (self.length, self.dim), jnp.float32).astype(x.dtype)

        x = jnp.where(drop[:, None, None], learned("null"), x)
        return jnp.where(block[:, None, None], learned("blocked"), x)
