"""The vision tower: a ViT over single frames (Dosovitskiy et al. 2021; CLIP, Radford et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import scan


class Block(nn.Module):
    """One pre-norm encoder layer."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    norm_eps: float

    @nn.compact
    def __call__(self, x, layer):
        h = LayerNorm(self.norm_eps, name="attention_norm")(x)
        h, _ = Attention(self.num_heads, self.head_dim, use_bias=True, name="attention")(h)
        x = x + h
        h = LayerNorm(self.norm_eps, name="mlp_norm")(x)
        return x + MLP(self.mlp_dim, self.activation, use_bias=True, name="mlp")(h), layer


class Vision(nn.Module):
    """Frames -> patch features. Each frame alone: time is the summarizer's affair.

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
    class_token: bool = True
    pre_norm: bool = True
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    position_std: float = 0.02  # of the position table at the start; from nothing, places are learned sooner from more
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    remat: str = "none"
    unroll: int = 1

    @property
    def patches(self) -> int:
        """P: features a frame, class token included."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @nn.compact
    def __call__(self, frames: jax.Array, dtype) -> jax.Array:
        """frames u8 [X H W 3] -> [X P D] in `dtype`."""
        x = (frames.astype(jnp.float32) / 255.0 - jnp.array(self.mean)) / jnp.array(self.std)
        x = self._stem(x.astype(dtype))
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
        )
        x, _ = scan(Block, self.num_layers, self.remat, self.unroll, 0, **fields, name="layers")(x, None)
        return x

    def _stem(self, x: jax.Array) -> jax.Array:
        """[X H W 3] -> [X h w D], one position a patch."""
        if self.stem == "patch":
            size = self.patch_size
            n, height, width, channels = x.shape
            x = x.reshape(n, height // size, size, width // size, size, channels)
            x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // size, width // size, -1)
            return Linear((self.dim,), ("channels", "embed"), name="patch")(x)
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
