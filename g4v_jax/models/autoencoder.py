"""The video autoencoder: a causal 3-D convolutional VAE of Wan2.1's kind (Wan team 2025, §4.1) at any size.

Time is causal: the first frame stands alone, every later latent frame covers the next 4 frames, so 1 + 4k frames
become 1 + k; space shrinks by `patch`. Each block of 4 x patch x patch pixels meets one linear map (a convolution
whose stride is its kernel), beside which residual blocks on the latent grid see its neighbours, in space (3x3) and in
time (3, causal). The linear path alone learns within seconds what principal components would; the rest adds to it.
"""


import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from g4v_jax.nn.linear import Linear, zeros
from g4v_jax.nn.norms import RMSNorm
from g4v_jax.types import Array

TIME_STRIDE = 4
BLOCKS = "n (t s) (h p) (w q) c -> n t h w (s p q c)"


@struct.dataclass
class Reconstructed:
    """What the autoencoder's losses need."""

    video: Array  # f32 [X T H W 3] in [-1, 1]
    mean: Array  # f32 [X t h w c]
    log_variance: Array  # f32 [X t h w c]
    latent_mean: Array  # f32 [c]
    latent_square: Array  # f32 [c]


def require_whole(frames: int, height: int, width: int, chunk: int, patch: int) -> None:
    """Raises ValueError where a clip's frames are not 1 + chunk·k, or a side is not k·patch pixels."""
    if (frames - 1) % chunk or height % patch or width % patch:
        needs = f"1 + {chunk}k frames and k·{patch} px a side"
        raise ValueError(f"autoencoder: {frames} frames of {height}x{width} px; needs {needs}")


def to_signed(video: jax.Array) -> jax.Array:
    """u8 [...] -> float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(video: jax.Array) -> jax.Array:
    """float in [-1, 1] -> u8, rounded and clipped."""
    return jnp.clip(jnp.round((video.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _past(x: jax.Array, frames: int) -> jax.Array:
    """x delayed by some frames; before the first frame stands the first frame."""
    return jnp.concatenate([jnp.repeat(x[:, :1], frames, axis=1), x[:, :-frames]], axis=1)


class Residual(nn.Module):
    """x + time(act(norm(space(act(norm(x)))))): a 3x3 convolution of each frame, then a causal one over 3 frames."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, "channels", "embed"))
        h = jax.nn.silu(RMSNorm(name="space_norm")(x))
        h = nn.Conv(dim, (3, 3), use_bias=False, kernel_init=init, name="space")(h.reshape(-1, *h.shape[2:]))
        h = jax.nn.silu(RMSNorm(name="time_norm")(h.reshape(x.shape)))
        h = jnp.concatenate([_past(h, 2), _past(h, 1), h], axis=-1)
        return x + Linear((dim,), ("channels", "embed"), kernel_init=zeros, name="time")(h)


class Encoder(nn.Module):
    """[X T H W 3] -> mean and log variance [X t h w 2c]: a linear map of each block of pixels, refined by its neighbours."""

    patch: int
    dim: int
    num_blocks: int
    latent_channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # the first frame is a block of its own: it stands for the frames before it
        x = jnp.concatenate([jnp.repeat(x[:, :1], TIME_STRIDE - 1, axis=1), x], axis=1)
        x = rearrange(x, BLOCKS, s=TIME_STRIDE, p=self.patch, q=self.patch)
        mean = Linear((self.latent_channels,), ("channels", "channels"), name="linear")(x)
        x = Linear((self.dim,), ("channels", "embed"), use_bias=True, name="patch")(x)
        for i in range(self.num_blocks):
            x = Residual(name=f"block_{i}")(x)
        x = RMSNorm(name="norm")(x)
        out = Linear((2 * self.latent_channels,), ("embed", "channels"), use_bias=True, kernel_init=zeros, name="out")
        return out(x) + jnp.concatenate([mean, jnp.zeros_like(mean)], axis=-1)


class Decoder(nn.Module):
    """[X t h w c] -> [X T H W 3], the encoder's mirror."""

    patch: int
    dim: int
    num_blocks: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        pixels = TIME_STRIDE * self.patch**2 * 3
        video = Linear((pixels,), ("channels", "channels"), use_bias=True, name="linear")(z)
        x = Linear((self.dim,), ("channels", "embed"), use_bias=True, name="latent")(z)
        for i in range(self.num_blocks):
            x = Residual(name=f"block_{i}")(x)
        x = RMSNorm(name="norm")(x)
        video = video + Linear((pixels,), ("embed", "channels"), kernel_init=zeros, name="out")(x)
        video = rearrange(video, " -> ".join(BLOCKS.split(" -> ")[::-1]), s=TIME_STRIDE, p=self.patch, q=self.patch, c=3)
        return video[:, TIME_STRIDE - 1 :]


class Autoencoder(nn.Module):
    """Video in [-1, 1] <-> latents, with the per-channel statistics that normalise them for the denoiser."""

    latent_channels: int
    patch: int = 8
    dim: int = 128
    num_blocks: int = 1

    def setup(self):
        self.encoder = Encoder(self.patch, self.dim, self.num_blocks, self.latent_channels)
        self.decoder = Decoder(self.patch, self.dim, self.num_blocks)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("channels",))
        ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("channels",))
        self.latent_mean = self.param("latent_mean", zeros, (self.latent_channels,), jnp.float32)
        self.latent_square = self.param("latent_square", ones, (self.latent_channels,), jnp.float32)

    @property
    def smallest(self) -> tuple[int, int, int]:
        """(frames, height, width) of a small video."""
        return 1 + TIME_STRIDE, 2 * self.patch, 2 * self.patch

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a clip. Raises ValueError where frames are not 1 + 4k or the sides do not divide."""
        require_whole(frames, height, width, TIME_STRIDE, self.patch)
        return 1 + (frames - 1) // TIME_STRIDE, height // self.patch, width // self.patch, self.latent_channels

    def __call__(self, video: jax.Array, noise: jax.Array | None = None, smoothing: float = 0.0) -> Reconstructed:
        """u8 [X T H W 3]; noise f32 [2 X t h w c]: the posterior's, and that of smoothing (None: decode the mean)."""
        mean, log_variance = self.encode(to_signed(video))
        z = mean
        if noise is not None:
            z = mean + jnp.exp(0.5 * log_variance) * noise[0] + smoothing * noise[1]
        return Reconstructed(self.decode(z), mean, log_variance, self.latent_mean, self.latent_square)

    def encode(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[X T H W 3] in [-1, 1] -> posterior mean and log variance [X t h w c]."""
        mean, log_variance = jnp.split(self.encoder(video), 2, axis=-1)
        return mean, jnp.clip(log_variance - 3.0, -12.0, 4.0)

    def decode(self, z: jax.Array) -> jax.Array:
        """[X t h w c] -> [X T H W 3] in about [-1, 1]."""
        return self.decoder(z)

    def encode_normalised(self, video: jax.Array, dtype=jnp.float32) -> jax.Array:
        """u8 [X T H W 3] -> latents of zero mean and unit variance a channel, float32 [X t h w c]."""
        mean, _ = self.encode(to_signed(video).astype(dtype))
        return (mean.astype(jnp.float32) - self.latent_mean) / self._latent_std()

    def decode_normalised(self, latents: jax.Array) -> jax.Array:
        """Normalised latents f32 [X t h w c] -> u8 [X T H W 3]."""
        return to_pixels(self.decode(latents * self._latent_std() + self.latent_mean))

    def _latent_std(self) -> jax.Array:
        variance = self.latent_square - self.latent_mean**2
        return jnp.sqrt(jnp.maximum(variance, 1e-6))
