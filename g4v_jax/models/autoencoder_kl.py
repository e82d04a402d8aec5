"""The paper's autoencoder: Stable Diffusion's image VAE (Rombach et al. 2022), on each frame of a clip alone.

Agrees with diffusers' `AutoencoderKL`. Time is not compressed: T frames become T latent frames. Frames go through one
after another (those of all clips together), so that memory does not grow with the length of a clip.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.models.autoencoder import to_pixels, to_signed
from g4v_jax.models.unet_blocks import Residual, conv, double
from g4v_jax.nn.attention import Attention
from g4v_jax.nn.norms import GroupNorm
from g4v_jax.nn.stack import one_by_one

EPSILON = 1e-6  # of every norm


class Middle(nn.Module):
    """Residual, attention of each pixel to its frame, residual (`UNetMidBlock2D`)."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [F h w c]."""
        channels = x.shape[-1]
        x = Residual(channels, self.groups, EPSILON, name="residual_0")(x)
        h = GroupNorm(self.groups, EPSILON, name="norm")(x).reshape(x.shape[0], -1, channels)
        h, _ = Attention(1, channels, use_bias=True, split_heads=False, name="attention")(h)
        return Residual(channels, self.groups, EPSILON, name="residual_1")(x + h.reshape(x.shape))


class Encoder(nn.Module):
    """Frames [F H W 3] -> mean and log variance [F h w 2c]."""

    latent_channels: int
    channels: tuple[int, ...]
    num_layers: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(x, self.channels[0], (3, 3), ("channels", "embed"), "in")
        for i, channels in enumerate(self.channels):
            for j in range(self.num_layers):
                x = Residual(channels, self.groups, EPSILON, name=f"down_{i}_{j}")(x)
            if i < len(self.channels) - 1:  # zeros lie only after the pixels, as the reference pads
                x = conv(x, channels, (3, 3), ("channels", "embed"), f"down_{i}", stride=2, padding=(0, 1))
        x = Middle(self.groups, name="middle")(x)
        x = jax.nn.silu(GroupNorm(self.groups, EPSILON, name="norm")(x))
        x = conv(x, 2 * self.latent_channels, (3, 3), ("embed", "channels"), "out")
        return conv(x, 2 * self.latent_channels, (1, 1), ("channels", "channels"), "moments")


class Decoder(nn.Module):
    """[F h w c] -> frames [F H W 3]."""

    latent_channels: int
    channels: tuple[int, ...]
    num_layers: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(x, self.latent_channels, (1, 1), ("channels", "channels"), "latents")
        x = conv(x, self.channels[-1], (3, 3), ("channels", "embed"), "in")
        x = Middle(self.groups, name="middle")(x)
        for i, channels in reversed(list(enumerate(self.channels))):
            for j in range(self.num_layers + 1):
                x = Residual(channels, self.groups, EPSILON, name=f"up_{i}_{j}")(x)
            if i:
                x = conv(double(x), channels, (3, 3), ("channels", "embed"), f"up_{i}")
        x = jax.nn.silu(GroupNorm(self.groups, EPSILON, name="norm")(x))
        return conv(x, 3, (3, 3), ("embed", "channels"), "out")


class KLAutoencoder(nn.Module):
    """Video in [-1, 1] <-> latents, which `scaling_factor` brings to unit variance for the denoiser."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level, all multiples of `groups`
    num_layers: int = 2  # residual blocks a level on the way down; one more on the way up
    groups: int = 32
    scaling_factor: float = 0.18215

    def setup(self):
        sizes = self.latent_channels, self.channels, self.num_layers, self.groups
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)

    @property
    def smallest(self) -> tuple[int, int, int]:
        """(T, H, W) of a small clip."""
        return 2, 2 * self._factor, 2 * self._factor

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a clip. Raises ValueError where the sides do not divide."""
        if height % self._factor or width % self._factor:
            raise ValueError(f"autoencoder: frames of {height}x{width} px; needs k·{self._factor} px a side")
        return frames, height // self._factor, width // self._factor, self.latent_channels

    def encode(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[X T H W 3] in [-1, 1] -> posterior mean and log variance [X t h w c]."""
        mean, log_variance = jnp.split(_each_frame(self.encoder, video), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """[X t h w c] -> [X T H W 3], near [-1, 1]."""
        return _each_frame(self.decoder, latents)

    def encode_normalised(self, video: jax.Array, dtype=jnp.float32) -> jax.Array:
        """u8 [X T H W 3] -> latents of about unit variance, float32 [X t h w c]."""
        mean, _ = self.encode(to_signed(video).astype(dtype))
        return mean.astype(jnp.float32) * self.scaling_factor

    def decode_normalised(self, latents: jax.Array) -> jax.Array:
        """Normalised latents f32 [X t h w c] -> u8 [X T H W 3]."""
        return to_pixels(self.decode(latents / self.scaling_factor))

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.channels) - 1)


def _each_frame(module: nn.Module, clips: jax.Array) -> jax.Array:
    """`module` on clips [X T ...], one frame of each at a time."""
    return one_by_one(module, lambda module, frames: module(frames), clips)
