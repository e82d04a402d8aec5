"""The vision tower: a ViT over single frames (Dosovitskiy et al. 2021), or over clips where it has temporal adapters.

One module for CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023), DINOv2 (Oquab et al. 2023), mPLUG-Owl-video's
tower (Ye et al. 2023) and our own; `weights/` says which fields make which. May hold nothing about pooled outputs:
every tower here ends with a feature for each patch.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear, zeros
from g4v_jax.nn.mlp import ACTIVATIONS, MLP
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import residual, scan
from g4v_jax.sharding import constrain


class Temporal(nn.Module):
    """mPLUG-Owl-video's adapter: each patch looks at itself one frame before and after, through a bottleneck.

    As published, what is added to the class token is the class token itself. Silent on the patches at the start.
    """

    @nn.compact
    def __call__(self, x: jax.Array, clip_frames: int) -> jax.Array:
        """x [X P D], class token first, frames of a clip one after another -> what is to be added, [X P D]."""
        frames, patches, dim = x.shape
        h = LayerNorm(1e-5, name="norm")(x[:, 1:])
        h = Linear((dim // 2,), ("embed", None), use_bias=True, name="down")(h)
        init = nn.with_logical_partitioning(nn.initializers.normal(3**-0.5), ("channels", None))
        taps = self.param("taps", init, (3, dim // 2), jnp.float32).astype(x.dtype)
        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None,))
        bias = self.param("bias", init, (dim // 2,), jnp.float32).astype(x.dtype)
        h = h.reshape(-1, clip_frames, patches - 1, dim // 2)
        h = jnp.pad(h, ((0, 0), (1, 1), (0, 0), (0, 0)))
        h = bias + sum(h[:, i : i + clip_frames] * taps[i] for i in range(3))
        h = ACTIVATIONS["quick_gelu"](h.reshape(frames, patches - 1, dim // 2))
        h = Linear((dim,), (None, "embed"), use_bias=True, kernel_init=zeros, name="up")(h)
        return jnp.concatenate([x[:, :1], h], axis=1)


class Block(nn.Module):
    """One pre-norm encoder layer."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    norm_eps: float
    gated: bool = False
    layer_scale: float | None = None
    kernel: str = "auto"
    clip_frames: int | None = None  # None: no temporal adapter

    @nn.compact
    def __call__(self, x, layer):
        x = residual(x)
        if self.clip_frames is not None:
            change = Temporal(name="temporal")(x, self.clip_frames)
            x = x + change if self.clip_frames > 1 else x  # a picture passes by the adapter
        h = LayerNorm(self.norm_eps, name="attention_norm")(x)
        attention = dict(use_bias=True, kernel=self.kernel, rows_axis="frames")
        h, _ = Attention(self.num_heads, self.head_dim, **attention, name="attention")(h)
        x = x + self._scaled("attention_scale", h)
        h = LayerNorm(self.norm_eps, name="mlp_norm")(x)
        h = MLP(self.mlp_dim, self.activation, self.gated, use_bias=True, rows_axis="frames", name="mlp")(h)
        return x + self._scaled("mlp_scale", h), layer

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        """LayerScale (Touvron et al. 2021): a learned factor a channel."""
        if self.layer_scale is None:
            return x
        init = nn.with_logical_partitioning(nn.initializers.constant(self.layer_scale), ("norm",))
        return x * self.param(name, init, x.shape[-1:], jnp.float32).astype(x.dtype)


class Vision(nn.Module):
    """Frames -> patch features. Each frame alone: time is the summarizer's affair, and that of `temporal` adapters.

    `stem`: "patch" is one linear map a patch; "conv" halves the frame by 3x3 convolutions of stride 2 until a patch
    is one position (Xiao et al. 2021, "Early convolutions help transformers see better"), which learns from few clips.
    """

    image_size: int
    patch_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    stem: str = "patch"
    patch_bias: bool = False
    class_token: bool = True
    temporal: bool = False  # adapters between the frames of a clip
    pre_norm: bool = True
    final_norm: bool = False
    layer_scale: float | None = None  # what LayerScale's factors start from; None: there are none
    gated: bool = False  # the MLP
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    position_std: float = 0.02  # of the position table at the start; from nothing, places are learned sooner from more
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    attention: str = "auto"  # kernel, see `nn/kernels.py`
    remat: str = "none"
    unroll: int = 1

    @property
    def patches(self) -> int:
        """P: features a frame, class token included."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    def __call__(self, frames: jax.Array, dtype, clip_frames: int = 1) -> jax.Array:
        """frames u8 [X H W 3] -> [X P D] in `dtype`. `clip_frames` as for `features`."""
        x = (frames.astype(jnp.float32) / 255.0 - jnp.array(self.mean)) / jnp.array(self.std)
        return self.features(x.astype(dtype), clip_frames)

    @nn.compact
    def features(self, frames: jax.Array, clip_frames: int = 1) -> jax.Array:
        """Normalised frames [X H W 3] -> [X P D] in their dtype.

        `clip_frames`: how many frames that follow each other are one clip. Only temporal adapters look at it.
        """
        if self.temporal and not self.class_token:
            raise ValueError("vision: temporal adapters need a class token")
        x, dtype = self._stem(constrain(frames, "frames", None, None, None)), frames.dtype
        x = x.reshape(x.shape[0], -1, self.dim)
        if self.class_token:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            token = self.param("class", init, (self.dim,), jnp.float32).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.dim)), x], axis=1)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.position_std), ("channels", "embed"))
        x = x + self.param("positions", init, x.shape[1:], jnp.float32).astype(dtype)
        if self.pre_norm:
            x = LayerNorm(self.norm_eps, name="pre_norm")(x)
        fields = dict(
            num_heads=self.num_heads,
            head_dim=self.dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            gated=self.gated,
            layer_scale=self.layer_scale,
            kernel=self.attention,
            clip_frames=clip_frames if self.temporal else None,
        )
        x, _ = scan(Block, self.num_layers, self.remat, self.unroll, 0, **fields, name="layers")(x, None)
        x = LayerNorm(self.norm_eps, name="norm")(x) if self.final_norm else x
        return constrain(x, "rows", "patches", "embed")

    def _stem(self, x: jax.Array) -> jax.Array:
        """[X H W 3] -> [X h w D], one position a patch."""
        if self.stem == "patch":
            size = self.patch_size
            n, height, width, channels = x.shape
            rows, columns = height // size, width // size
            x = x[:, : rows * size, : columns * size]  # pixels that fill no patch are not seen, as by a convolution
            x = x.reshape(n, rows, size, columns, size, channels)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows, columns, -1)
            return Linear((self.dim,), ("channels", "embed"), self.patch_bias, name="patch")(x)
        if self.stem != "conv" or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"vision: stem {self.stem!r} with patch_size {self.patch_size}; conv needs a power of two")
        halvings = self.patch_size.bit_length() - 1
        for i in range(halvings):
            width = self.dim >> (halvings - 1 - i)
            init = nn.with_logical_partitioning(
                nn.initializers.he_normal(), ("channels", "channels", "channels", "embed")
            )
            x = nn.Conv(width, (3, 3), (2, 2), kernel_init=init, name=f"stem_{i}")(x)
            x = jax.nn.gelu(x) if i + 1 < halvings else x
        return x
