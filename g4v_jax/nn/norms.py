"""Normalisations, computed in float32 whatever the dtype of the activations.

For the gradient only what they are given is kept, in its own dtype: the rest is cheap to make again.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        return _rms(x, scale, self.epsilon)


@partial(jax.checkpoint, static_argnums=2)
def _rms(x, scale, epsilon):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std · scale + bias over the last axis; `affine=False` leaves scale and bias to a modulation."""

    epsilon: float = 1e-6
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.affine:
            return _layer(x, None, None, self.epsilon)
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], jnp.float32)
        return _layer(x, scale, self.param("bias", zeros, x.shape[-1:], jnp.float32), self.epsilon)


@partial(jax.checkpoint, static_argnums=3)
def _layer(x, scale, bias, epsilon):
    y = _standard(x.astype(jnp.float32), -1, epsilon)
    return (y if scale is None else y * scale + bias).astype(x.dtype)


class GroupNorm(nn.Module):
    """(x - mean) / std · scale + bias, the last axis cut into `groups` (Wu & He 2018).

    x [X ... C]: each sample and group has its own mean and std, over its channels and all axes between.
    """

    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], jnp.float32)
        return _group(x, scale, self.param("bias", zeros, x.shape[-1:], jnp.float32), self.groups, self.epsilon)


@partial(jax.checkpoint, static_argnums=(3, 4))
def _group(x, scale, bias, groups, epsilon):
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    return (_standard(y, (1, 3), epsilon).reshape(x.shape) * scale + bias).astype(x.dtype)


def _standard(y, axes, epsilon):
    """Mean zero and variance one over `axes`."""
    y = y - jnp.mean(y, axis=axes, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + epsilon)
