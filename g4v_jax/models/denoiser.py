"""The latent video denoiser: Wan2.1's diffusion transformer, text-to-video and image-to-video (Wan team 2025).

Patches of the latents attend to each other (RMS-normed q and k over the full width, 3-D rotary positions) and to the
conditioner's context; one time MLP is shared by all layers, each with its own bias; modulation in float32. With
`image_dim` the patches also attend to an image's features. Agrees with diffusers' `WanTransformer3DModel`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax.nn import rope
from g4v_jax.nn.attention import Attention, attend
from g4v_jax.nn.linear import Linear, zeros
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import residual, scan
from g4v_jax.sharding import constrain

TIME_SCALE = 1000.0  # times in [0, 1] are embedded as Wan's 0..1000
PLACE_OCTAVES = 4
AXES = ("rows", "latents", "heads", "kv_heads")  # of attention from a clip's patches


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


def _frequencies(features: int) -> np.ndarray:
    """Of the time's waves, f32 [features/2]: on the host, because a last bit off is 6e-5 off at time 999."""
    exponent = np.float32(-math.log(10_000)) * np.arange(features // 2, dtype=np.float32) / np.float32(features // 2)
    return np.exp(exponent.astype(np.float64)).astype(np.float32)


class ImageAttention(Attention):
    """x [B S D] attends to a context and, apart from it, to an image; the answers are added before the last map."""

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, image: jax.Array) -> jax.Array:
        """context [B N D], image [B M D] -> [B S D]."""

        def project(name, value, length):
            y = self._linear(name, (self.num_heads, self.head_dim), ("embed", "heads", "head_dim"))(value)
            return constrain(y, "rows", length, "heads", "head_dim")

        q = self._normalise("q_norm", project("q", x, "latents"))
        out = 0.0
        for prefix, source in (("", context), ("image_", image)):
            k = self._normalise(f"{prefix}k_norm", project(f"{prefix}k", source, "keys"))
            out = out + attend(q, k, project(f"{prefix}v", source, "keys"), kernel=self.kernel, axes=AXES)
        out = constrain(out, *AXES[:3], "head_dim")
        return self._linear("o", (x.shape[-1],), ("heads", "head_dim", "embed"))(out)


class ImageEmbedding(nn.Module):
    """Features of an image [X M D_image] -> what the blocks attend to [X M D]."""

    dim: int
    positions: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.positions:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("channels", "channels"))
            x = x + self.param("positions", init, x.shape[1:], jnp.float32).astype(x.dtype)
        x = LayerNorm(1e-5, name="norm_in")(x)  # the reference leaves these two at torch's epsilon
        x = Linear((x.shape[-1],), ("embed", "mlp"), use_bias=True, name="in")(x)
        x = constrain(jax.nn.gelu(x, approximate=False), "rows", "patches", "mlp")
        x = Linear((self.dim,), ("mlp", "embed"), use_bias=True, name="out")(x)
        return LayerNorm(1e-5, name="norm_out")(x)


class Block(nn.Module):
    """Self-attention and MLP under the time's shift, scale and gate; cross-attention between them."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    norm_cross: bool
    kernel: str

    @nn.compact
    def __call__(self, x, layer, context, image, time, theta):
        """time: f32 [X 6 D]; image: None without one."""
        x = residual(x)
        modulation = time + _table(self, "modulation", 6, x.shape[-1])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (modulation[:, i] for i in range(6))
        attention = dict(
            num_heads=self.num_heads, head_dim=self.head_dim, qk_norm="full", use_bias=True, norm_eps=self.norm_eps,
            kernel=self.kernel, length_axis="latents",
        )  # fmt: skip
        norm = LayerNorm(self.norm_eps, affine=False)
        h, _ = Attention(**attention, name="attention")(_modulate(norm(x), shift, scale), theta=theta)
        x = x + (h * gate[:, None]).astype(x.dtype)
        h = LayerNorm(self.norm_eps, name="cross_norm")(x) if self.norm_cross else x
        if image is None:
            h, _ = Attention(**attention, name="cross_attention")(h, context)
        else:
            h = ImageAttention(**attention, name="cross_attention")(h, context, image)
        x = x + h
        h = MLP(self.mlp_dim, "gelu_tanh", use_bias=True, length_axis="latents", name="mlp")(_modulate(norm(x), mlp_shift, mlp_scale))
        return constrain(x + (h * mlp_gate[:, None]).astype(x.dtype), "rows", "latents", "embed"), layer


class Denoiser(nn.Module):
    """Noisy latents, time and context -> prediction of the latents' shape (`prediction`: what it stands for)."""

    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    latent_channels: int  # that go in: where an image is given, its latents and their mask lie beside the noisy ones
    context_dim: int  # of the conditioner's output; Wan's UMT5 gives 4096
    out_channels: int | None = None  # None: latent_channels
    patch: tuple[int, int, int] = (1, 2, 2)
    prediction: str = "velocity"
    absolute: bool = False  # also tell each patch where it is: a small model is slow to find that out from rotations
    cross_norm: bool = True  # before the attention to the context
    time_features: int = 256
    max_side: int = 1024  # longest side, in patches, that has rotary positions
    image_dim: int = 0  # width of an image's features (CLIP ViT-H: 1280); 0: text-to-video
    image_tokens: int = 257  # features of an image: its patches and class token; twice as many for first and last frame
    image_positions: bool = False  # learned positions of these features
    norm_eps: float = 1e-6
    attention: str = "auto"  # kernel, see `nn/kernels.py`
    remat: str = "none"
    unroll: int = 1

    @property
    def smallest(self) -> tuple[int, int, int]:
        """(t, h, w) of small latents: two patches a side."""
        return tuple(2 * side for side in self.patch)

    def __call__(self, latents: jax.Array, times: jax.Array, context: jax.Array, image_context=None) -> jax.Array:
        """`predict` at times f32 [X] in [0, 1]."""
        return self.predict(latents, times * TIME_SCALE, context, image_context)

    @nn.compact
    def predict(self, latents: jax.Array, timestep: jax.Array, context: jax.Array, image_context=None) -> jax.Array:
        """latents [X t h w c], timestep f32 [X] in [0, 1000], context [X N D_context] -> [X t h w c_out].

        image_context [X M D_image] where there is an `image_dim`; first and last frame lie one after the other in M.
        Raises ValueError where it is missing or too many, where latents do not divide by `patch` or exceed `max_side`.
        """
        if (image_context is None) != (self.image_dim == 0):
            verb = "needs" if self.image_dim else "takes no"
            raise ValueError(f"denoiser: {verb} image_context (image_dim is {self.image_dim})")
        x, grid = self._patchify(latents)
        if max(grid) > self.max_side:
            raise ValueError(f"denoiser: {grid} patches; no side may exceed {self.max_side}")
        x = constrain(Linear((self.dim,), ("channels", "embed"), use_bias=True, name="patch")(x), "rows", "latents", "embed")
        if self.absolute:
            x = x + Linear((self.dim,), ("channels", "embed"), name="place")(_places(grid).astype(x.dtype))

        theta = timestep[:, None] * _frequencies(self.time_features)
        waves = jnp.concatenate([jnp.cos(theta), jnp.sin(theta)], axis=-1)
        time = Linear((self.dim,), ("channels", "embed"), use_bias=True, name="time_in")(waves)
        time = Linear((self.dim,), ("embed", None), use_bias=True, name="time_out")(jax.nn.silu(time))
        modulation = Linear((6, self.dim), ("embed", None, None), use_bias=True, name="time_modulation")
        context = Linear((self.dim,), ("embed", "mlp"), use_bias=True, name="context_in")(context)
        context = constrain(jax.nn.gelu(context), "rows", "patches", "mlp")
        context = Linear((self.dim,), ("mlp", "embed"), use_bias=True, name="context_out")(context)
        image = None
        if image_context is not None:
            image = ImageEmbedding(self.dim, self.image_positions, name="image")(image_context)

        head_dim = self.dim // self.num_heads
        fields = dict(num_heads=self.num_heads, head_dim=head_dim, mlp_dim=self.mlp_dim, norm_eps=self.norm_eps)
        fields |= dict(norm_cross=self.cross_norm, kernel=self.attention)
        blocks = scan(Block, self.num_layers, self.remat, self.unroll, 4, **fields, name="layers")
        x, _ = blocks(x, None, context, image, modulation(jax.nn.silu(time)), rope.grid_angles(grid, head_dim))

        shift_scale = time[:, None] + _table(self, "head_modulation", 2, self.dim)
        x = _modulate(LayerNorm(self.norm_eps, affine=False)(x), shift_scale[:, 0], shift_scale[:, 1])
        width = math.prod(self.patch) * (self.out_channels or self.latent_channels)
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
        x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(x.shape[0], t * pt, h * ph, w * pw, -1)
