"""The latent video denoiser: a diffusion transformer of Wan2.1's shape (Wan team 2025).

Patches of the latents attend to each other (RMS-normed q and k over the full width, 3-D rotary positions) and to the
conditioner's context; one time MLP is shared by all layers, each with its own bias; modulation in float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn import rope
from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear, zeros
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import scan
from g4v_jax.sharding import constrain

TIME_SCALE = 1000.0  # times in [0, 1] are embedded as Wan's 0..1000
TIME_FEATURES = 256
PLACE_OCTAVES = 4


def _table(module: nn.Module, name: str, rows: int, dim: int) -> jax.Array:
    """Learned biases of a modulation, f32 [rows D]."""
    init = nn.with_logical_partitioning(nn.initializers.normal(dim**-0.5), ("channels", "embed"))
    return module.param(name, init, (rows, dim), jnp.float32)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return (x * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def _places(grid: tuple[int, int, int]) -> jax.Array:
    """Sines and cosines of each patch's place as a share of the clip, f32 [t·h·w, 3 · 2 · PLACE_OCTAVES]."""
    axes = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n for n in grid), indexing="ij")
    theta = jnp.stack(axes, axis=-1).reshape(-1, 3, 1) * math.pi * 2.0 ** jnp.arange(PLACE_OCTAVES)
    return jnp.concatenate([jnp.sin(theta), jnp.cos(theta)], axis=-1).reshape(theta.shape[0], -1)


class Block(nn.Module):
    """Self-attention and MLP under the time's shift, scale and gate; cross-attention between them."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float

    @nn.compact
    def __call__(self, x, layer, context, time, theta):
        """time: f32 [X 6 D]."""
        modulation = time + _table(self, "modulation", 6, x.shape[-1])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation[:, i] for i in range(6))
        attention = dict(
            num_heads=self.num_heads, head_dim=self.head_dim, qk_norm="full", use_bias=True, norm_eps=self.norm_eps
        )
        norm = LayerNorm(self.norm_eps, affine=False)
        h, _ = Attention(**attention, name="attention")(_modulate(norm(x), shift, scale), theta=theta)
        x = x + (h * gate[:, None]).astype(x.dtype)
        h = LayerNorm(self.norm_eps, name="cross_norm")(x)
        h, _ = Attention(**attention, name="cross_attention")(h, context)
        x = x + h
        h = MLP(self.mlp_dim, "gelu_tanh", use_bias=True, name="mlp")(_modulate(norm(x), mlp_shift, mlp_scale))
        return x + (h * mlp_gate[:, None]).astype(x.dtype), layer


class Denoiser(nn.Module):
    """Noisy latents, time and context -> prediction of the latents' shape (`prediction`: what it stands for)."""

    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    latent_channels: int
    patch: tuple[int, int, int] = (1, 2, 2)
    prediction: str = "velocity"
    absolute: bool = False  # also tell each patch where it is: a small model is slow to find that out from rotations
    norm_eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, latents: jax.Array, times: jax.Array, context: jax.Array) -> jax.Array:
        """latents [X t h w c], times f32 [X] in [0, 1], context [X N D_context] -> [X t h w c]."""
        x, grid = self._patchify(latents)
        x = Linear((self.dim,), ("channels", "embed"), use_bias=True, name="patch")(x)
        if self.absolute:
            x = x + Linear((self.dim,), ("channels", "embed"), name="place")(_places(grid).astype(x.dtype))

        frequency = jnp.exp(-math.log(10_000) * jnp.arange(TIME_FEATURES // 2) / (TIME_FEATURES // 2))
        theta = times[:, None] * TIME_SCALE * frequency
        waves = jnp.concatenate([jnp.cos(theta), jnp.sin(theta)], axis=-1)
        time = Linear((self.dim,), ("channels", "embed"), use_bias=True, name="time_in")(waves)
        time = Linear((self.dim,), ("embed", None), use_bias=True, name="time_out")(jax.nn.silu(time))
        modulation = Linear((6, self.dim), ("embed", None, None), use_bias=True, name="time_modulation")
        context = Linear((self.dim,), ("embed", "mlp"), use_bias=True, name="context_in")(context)
        context = constrain(jax.nn.gelu(context), "rows", "patches", "mlp")
        context = Linear((self.dim,), ("mlp", "embed"), use_bias=True, name="context_out")(context)

        head_dim = self.dim // self.num_heads
        fields = dict(num_heads=self.num_heads, head_dim=head_dim, mlp_dim=self.mlp_dim, norm_eps=self.norm_eps)
        blocks = scan(Block, self.num_layers, self.remat, self.unroll, 3, **fields, name="layers")
        x, _ = blocks(x, None, context, modulation(jax.nn.silu(time)), rope.grid_angles(grid, head_dim))

        shift_scale = time[:, None] + _table(self, "head_modulation", 2, self.dim)
        x = _modulate(LayerNorm(self.norm_eps, affine=False)(x), shift_scale[:, 0], shift_scale[:, 1])
        width = math.prod(self.patch) * self.latent_channels
        x = Linear((width,), ("embed", "channels"), use_bias=True, kernel_init=zeros, name="head")(x)
        return self._unpatchify(x, grid)

    def _patchify(self, x: jax.Array) -> tuple[jax.Array, tuple[int, int, int]]:
        n, *size, channels = x.shape
        grid = tuple(length // patch for length, patch in zip(size, self.patch))
        if any(length % patch for length, patch in zip(size, self.patch)):
            raise ValueError(f"denoiser: latents {tuple(size)} do not divide by patch {self.patch}")
        (t, h, w), (pt, ph, pw) = grid, self.patch
        x = x.reshape(n, t, pt, h, ph, w, pw, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(n, t * h * w, -1), grid

    def _unpatchify(self, x: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        (t, h, w), (pt, ph, pw) = grid, self.patch
        x = x.reshape(-1, t, h, w, pt, ph, pw, self.latent_channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(-1, t * pt, h * ph, w * pw, self.latent_channels)
