"""The paper's latent video denoiser: ModelScope's 3-D UNet (Wang et al. 2023), whose weights ZeroScope tunes.

May hold the UNet alone; its blocks are in `unet_blocks.py`. Agrees with diffusers' `UNet3DConditionModel`: frames go
down and up through a UNet of images, and after every residual block and attention of a frame the frames meet in time.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax.models.unet_blocks import Layer, Transformer, conv, double
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.norms import GroupNorm
from g4v_jax.nn.stack import policy_of

TIMESTEPS = 1000  # of the discrete process the weights were trained with
FIRST_HEADS = 8  # of the attention over time that stands before the first level, at any width


def _waves(timestep: jax.Array, features: int) -> jax.Array:
    """Cosines and sines of timesteps f32 [X] -> f32 [X features]."""
    half = features // 2
    # on the host: a last bit of a frequency is 6e-5 of an angle at step 999
    exponent = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    theta = timestep[:, None] * np.exp(exponent.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(theta), jnp.sin(theta)], axis=-1)


class UNet3D(nn.Module):
    """Noisy latents, time and context -> prediction of the latents' shape (`prediction`: what it stands for)."""

    latent_channels: int
    context_dim: int
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level, all multiples of `groups`
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels attend
    num_layers: int = 2  # a level on the way down; one more on the way up
    head_dim: int = 64
    groups: int = 32
    norm_eps: float = 1e-5  # of the residual blocks and the last norm; others are constants of the reference
    dropout: float = 0.1  # in the convolutions over time, where a dropout key is given
    prediction: str = "epsilon"
    remat: str = "none"  # of each layer

    image_dim = 0  # takes no image
    image_tokens = 0

    @property
    def smallest(self) -> tuple[int, int, int]:
        """(t, h, w) of small latents."""
        return 2, 2 ** len(self.channels), 2 ** len(self.channels)

    def __call__(self, latents: jax.Array, times: jax.Array, context: jax.Array) -> jax.Array:
        """`predict` at times f32 [X] in [0, 1], where 1 is the last timestep."""
        return self.predict(latents, times * (TIMESTEPS - 1), context)

    @nn.compact
    def predict(self, latents: jax.Array, timestep: jax.Array, context: jax.Array) -> jax.Array:
        """latents [X t h w c], timestep f32 [X] in 0 ... 999, context [X N D_context] -> [X t h w c].

        Any t, h and w. Raises ValueError where `attention` and `channels` do not say as many levels.
        """
        if len(self.attention) != len(self.channels):
            raise ValueError(f"unet3d: attention {self.attention} and channels {self.channels} differ in length")
        first, last = self.channels[0], self.channels[-1]
        policy = policy_of(self.remat)
        kind = Layer if policy is None else nn.remat(Layer, policy=policy)

        def layer(channels, attends, name):
            head_dim = self.head_dim if attends else 0
            return kind(channels, head_dim, self.groups, self.norm_eps, self.dropout, name=name)

        time = Linear((4 * first,), ("channels", "embed"), use_bias=True, name="time_in")(_waves(timestep, first))
        time = Linear((4 * first,), ("embed", None), use_bias=True, name="time_out")(jax.nn.silu(time))
        time = time.astype(latents.dtype)

        x = conv(latents, first, (3, 3), ("channels", "embed"), "in")
        x = Transformer(FIRST_HEADS, self.head_dim, self.groups, "time", name="time_first")(x)
        skips = [x]
        for i, channels in enumerate(self.channels):
            for j in range(self.num_layers):
                x = layer(channels, self.attention[i], f"down_{i}_{j}")(x, time, context)
                skips.append(x)
            if i < len(self.channels) - 1:
                x = conv(x, channels, (3, 3), ("channels", "embed"), f"down_{i}", stride=2)
                skips.append(x)
        x = layer(last, True, "middle_0")(x, time, context)
        x = layer(last, False, "middle_1")(x, time, context)
        for i, channels in reversed(list(enumerate(self.channels))):
            for j in range(self.num_layers + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = layer(channels, self.attention[i], f"up_{i}_{j}")(x, time, context)
            if i:
                _, _, h, w, _ = skips[-1].shape
                x = double(x.reshape(-1, *x.shape[2:]))[:, :h, :w]  # cut by one where the level below rounded up
                x = conv(x.reshape(*skips[-1].shape[:-1], -1), channels, (3, 3), ("channels", "embed"), f"up_{i}")
        x = GroupNorm(self.groups, self.norm_eps, name="norm")(x.reshape(-1, *x.shape[2:])).reshape(x.shape)
        zeros = nn.initializers.zeros_init()
        return conv(jax.nn.silu(x), self.latent_channels, (3, 3), ("embed", "channels"), "out", kernel_init=zeros)
