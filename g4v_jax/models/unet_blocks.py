"""Parts of the image and video UNets of latent diffusion (Rombach et al. 2022; Wang et al. 2023, ModelScope).

May hold the blocks that `unet3d.py` and `autoencoder_kl.py` are built of; knows neither. Each agrees with diffusers'
block that it names. Arrays are channel-last; frames are [F h w c] where each stands alone, [X t h w c] as clips.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.norms import GroupNorm, LayerNorm
from g4v_jax.nn.stack import residual
from g4v_jax.sharding import constrain


def conv(
    x: jax.Array,
    features: int,
    taps: tuple[int, ...],
    axes: tuple[str, str],
    name: str,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    kernel_init=nn.initializers.lecun_normal(),
) -> jax.Array:
    """Convolve the last axes of x [... *space C] -> [... *space features]; to be called where modules may be made.

    axes: logical names of the channels in and out. padding: zeros before and after each axis; None keeps the size.
    """
    kernel_init = nn.with_logical_partitioning(kernel_init, (None,) * len(taps) + axes)
    return nn.Conv(
        features,
        taps,
        strides=stride,
        padding=[padding or (n // 2, n // 2) for n in taps],
        kernel_init=kernel_init,
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dtype=x.dtype,
        name=name,
    )(x)


def double(x: jax.Array) -> jax.Array:
    """x [F h w c] with each pixel four times [F 2h 2w c]."""
    f, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (f, h, 2, w, 2, c)).reshape(f, 2 * h, 2 * w, c)


class Residual(nn.Module):
    """Two 3x3 convolutions of each frame, and a 1x1 one beside them where channels change (`ResnetBlock2D`)."""

    channels: int
    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x [F h w C], time [X D] with F a multiple of X, or None -> [F h w channels]."""
        h = jax.nn.silu(GroupNorm(self.groups, self.epsilon, name="norm_in")(x))
        h = conv(h, self.channels, (3, 3), ("embed", "mlp"), "in")
        if time is not None:
            shift = Linear((self.channels,), ("embed", "mlp"), use_bias=True, name="time")(jax.nn.silu(time))
            h = h + jnp.repeat(shift, x.shape[0] // time.shape[0], axis=0)[:, None, None]
        h = constrain(h, "rows", "patches", "patches", "mlp")
        h = jax.nn.silu(GroupNorm(self.groups, self.epsilon, name="norm_out")(h))
        h = conv(h, self.channels, (3, 3), ("mlp", "embed"), "out")
        if x.shape[-1] != self.channels:
            x = conv(x, self.channels, (1, 1), ("channels", "embed"), "shortcut")
        return constrain(x + h, "rows", "patches", "patches", "embed")


class TimeConv(nn.Module):
    """x + four convolutions over three frames each, the last of them silent at first (`TemporalConvLayer`)."""

    groups: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [X t h w c]."""
        h = x
        for i, axes in enumerate((("embed", "mlp"), ("mlp", "embed")) * 2):
            h = jax.nn.silu(GroupNorm(self.groups, 1e-5, name=f"norm_{i}")(h))
            if i:
                h = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(h)
            init = nn.initializers.zeros_init() if i == 3 else nn.initializers.lecun_normal()
            h = conv(h, x.shape[-1], (3, 1, 1), axes, f"conv_{i}", kernel_init=init)
            h = constrain(h, "rows", "patches", "patches", "patches", axes[1])
        return x + h


class Gated(nn.Module):
    """x [B S D] -> [B S D] through width 4D, gated by an exact GELU (`FeedForward` with "geglu")."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = Linear((2, 4 * width), ("embed", None, "mlp"), use_bias=True, name="up")(x)
        h = h[..., 0, :] * jax.nn.gelu(h[..., 1, :], approximate=False)
        h = constrain(h, "rows", "patches", "mlp")
        return Linear((width,), ("mlp", "embed"), use_bias=True, name="down")(h)


class Transformer(nn.Module):
    """x + one transformer block on it, over space or over time.

    Over space each place attends to its own frame and then to the context (`Transformer2DModel`); over time each
    frame attends to the others at its place, twice (`TransformerTemporalModel`, which takes no context).
    """

    num_heads: int
    head_dim: int
    groups: int
    over: str  # "space" or "time"

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """x [X t h w c], context [X N D] -> [X t h w c]."""
        batch, t, h, w, c = x.shape
        width = self.num_heads * self.head_dim
        attention = dict(num_heads=self.num_heads, head_dim=self.head_dim, out_bias=True, split_heads=False)
        if self.over == "space":
            y = GroupNorm(self.groups, 1e-6, name="norm")(x.reshape(batch * t, h * w, c))
        else:
            y = GroupNorm(self.groups, 1e-6, name="norm")(x)
            y = y.transpose(0, 2, 3, 1, 4).reshape(batch * h * w, t, c)
        y = Linear((width,), ("channels", "embed"), use_bias=True, name="in")(y)
        y = y + Attention(**attention, name="attention_1")(LayerNorm(1e-5, name="norm_1")(y))[0]
        folded = y.shape
        if self.over == "space":  # all frames share one context: no need to repeat its keys a frame
            y = y.reshape(batch, t * h * w, width)
        y = y + Attention(**attention, name="attention_2")(LayerNorm(1e-5, name="norm_2")(y), context)[0]
        y = y + Gated(name="mlp")(LayerNorm(1e-5, name="norm_3")(y).reshape(folded)).reshape(y.shape)
        y = Linear((c,), ("embed", "channels"), use_bias=True, name="out")(y)
        if self.over == "time":
            y = y.reshape(batch, h, w, t, c).transpose(0, 3, 1, 2, 4)
        return constrain(x + y.reshape(x.shape), "rows", "patches", "patches", "patches", "embed")


class Layer(nn.Module):
    """One layer of a 3-D UNet: residual and convolutions over time, then attention over space and over time.

    head_dim: of the attention; 0 for none. The number of heads is what the channels hold of them.
    """

    channels: int
    head_dim: int
    groups: int
    epsilon: float
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        """x [X t h w C], time [X D], context [X N D_context] -> [X t h w channels]."""
        x = residual(x)
        h = Residual(self.channels, self.groups, self.epsilon, name="residual")(x.reshape(-1, *x.shape[2:]), time)
        x = TimeConv(self.groups, self.dropout, name="time_conv")(h.reshape(*x.shape[:-1], self.channels))
        if self.head_dim:
            attention = self.channels // self.head_dim, self.head_dim, self.groups
            x = Transformer(*attention, "space", name="space")(x, context)
            x = Transformer(*attention, "time", name="time")(x)
        return x
