"""Wan2.1's video autoencoder: a causal 3-D convolutional VAE that works chunk by chunk (Wan team 2025, §4.1).

Time is causal: the first frame stands alone, every later chunk of 4 frames sees only what came before, of which each
causal layer carries its last frames over. So memory does not grow with the clip beyond the clip and its latents.
Agrees with diffusers' `AutoencoderKLWan` (for pretrained weights: it has no objective of its own).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.models.autoencoder import require_whole, to_pixels, to_signed
from g4v_jax.nn.attention import attend
from g4v_jax.nn.linear import Linear

CHUNK = 4  # frames that are encoded at a time after the first
# per channel, of Wan2.1's latents over its training data
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
LATENT_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
LATENT_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


class Past:
    """Frames that causal layers carry from one chunk to the next, in the order in which the layers are called.

    `held`: what the chunk before `kept`, None for the first chunk.
    """

    def __init__(self, held: list[jax.Array] | None = None):
        self.first = held is None
        self.kept = []
        self._held = iter(held or ())

    def extend(self, x: jax.Array, frames: int) -> jax.Array:
        """x [X T ...] behind the last `frames` before it (zeros before the first); keeps the last of both."""
        before = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype) if self.first else next(self._held)
        x = jnp.concatenate([before, x], axis=1)
        self.kept.append(x[:, -frames:])
        return x


def _conv(x: jax.Array, features: int, taps: tuple[int, ...], name: str, **options) -> nn.Conv:
    """A convolution over the last axes of x but the channels, in x's dtype."""
    kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (*(None,) * len(taps), "channels", "channels"))
    bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("channels",))
    return nn.Conv(features, taps, dtype=x.dtype, kernel_init=kernel, bias_init=bias, name=name, **options)


def _causal(x: jax.Array, features: int, past: Past, name: str) -> jax.Array:
    """A 3x3x3 convolution that sees two frames before each."""
    conv = _conv(x, features, (3, 3, 3), name, padding=((0, 0), (1, 1), (1, 1)))
    return conv(past.extend(x, 2))


class Norm(nn.Module):
    """x / |x| · √C · scale over the last axis, |x| at least 1e-12; computed in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y = y / jnp.maximum(jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True)), 1e-12)
        return (y * math.sqrt(x.shape[-1]) * scale).astype(x.dtype)


class Residual(nn.Module):
    """x (mapped to `dim` where it has another width) + two rounds of norm, SiLU and causal convolution."""

    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        short = x
        if x.shape[-1] != self.dim:
            short = Linear((self.dim,), ("channels", "channels"), use_bias=True, name="short")(x)
        for i in (1, 2):
            x = _causal(jax.nn.silu(Norm(name=f"norm_{i}")(x)), self.dim, past, f"conv_{i}")
        return x + short


class Middle(nn.Module):
    """Two residual blocks, and between them attention with one head among the places of each frame."""

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        n, t, h, w, dim = x.shape
        x = Residual(dim, name="block_0")(x, past)
        y = Norm(name="norm")(x).reshape(n * t, h * w, dim)
        qkv = Linear((3, dim), ("channels", None, None), use_bias=True, name="qkv")(y)
        y = attend(*jnp.split(qkv, 3, axis=2))[:, :, 0]
        y = Linear((dim,), ("channels", "channels"), use_bias=True, name="out")(y)
        return Residual(dim, name="block_1")(x + y.reshape(x.shape), past)


class Down(nn.Module):
    """Halves height and width, and with `time` also the frames after the first."""

    time: bool

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        dim = x.shape[-1]
        x = _conv(x, dim, (3, 3), "space", strides=2, padding=((0, 1), (0, 1)))(x)
        if self.time:
            conv = _conv(x, dim, (3, 1, 1), "time", strides=(2, 1, 1), padding="VALID")
            extended = past.extend(x, 1)
            if self.is_initializing() and past.first:  # the first chunk skips this layer, but it has to be made
                conv(jnp.concatenate([extended, x], axis=1))
            if not past.first:
                x = conv(extended)
        return x


class Up(nn.Module):
    """Doubles height and width, halves the channels, and with `time` doubles the frames after the first."""

    time: bool

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        n, t, h, w, dim = x.shape
        if self.time:
            conv = _conv(x, 2 * dim, (3, 1, 1), "time", padding="VALID")
            # the first chunk skips this layer, to which the second is therefore the first: zeros lie before it
            extended = past.extend(jnp.zeros_like(x) if past.first else x, 2)
            if self.is_initializing() and past.first:
                conv(extended)
            if not past.first:
                x = conv(extended).reshape(n, t, h, w, 2, dim).transpose(0, 1, 4, 2, 3, 5).reshape(n, 2 * t, h, w, dim)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return _conv(x, dim // 2, (3, 3), "space", padding=1)(x)


class Encoder(nn.Module):
    """A chunk [X T H W 3] -> mean and log variance [X t h w 2c]."""

    widths: tuple[int, ...]  # of the stages
    num_blocks: int
    time: tuple[bool, ...]  # whether each stage's end halves time as well
    latent_channels: int

    @nn.compact
    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = _causal(x, self.widths[0], past, "in")
        for i, dim in enumerate(self.widths[1:]):
            for j in range(self.num_blocks):
                x = Residual(dim, name=f"stage_{i}_block_{j}")(x, past)
            if i < len(self.time):
                x = Down(self.time[i], name=f"stage_{i}_down")(x, past)
        x = jax.nn.silu(Norm(name="norm")(Middle(name="middle")(x, past)))
        x = _causal(x, 2 * self.latent_channels, past, "out")
        return Linear((x.shape[-1],), ("channels", "channels"), use_bias=True, name="latent")(x)


class Decoder(nn.Module):
    """A chunk [X t h w c] -> [X T H W 3], the encoder's mirror."""

    widths: tuple[int, ...]
    num_blocks: int
    time: tuple[bool, ...]  # whether each stage's end doubles time as well

    @nn.compact
    def __call__(self, z: jax.Array, past: Past) -> jax.Array:
        x = Linear((z.shape[-1],), ("channels", "channels"), use_bias=True, name="latent")(z)
        x = Middle(name="middle")(_causal(x, self.widths[0], past, "in"), past)
        for i, dim in enumerate(self.widths[1:]):
            for j in range(self.num_blocks + 1):
                x = Residual(dim, name=f"stage_{i}_block_{j}")(x, past)
            if i < len(self.time):
                x = Up(self.time[i], name=f"stage_{i}_up")(x, past)
        x = jax.nn.silu(Norm(name="norm")(x))
        return _causal(x, 3, past, "out")


class WanAutoencoder(nn.Module):
    """Video in [-1, 1] <-> latents, with the published statistics that normalise them for the denoiser."""

    latent_channels: int = 16
    dim: int = 96
    decoder_dim: int | None = None  # None: dim
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of dim, one a stage; each stage but the last halves the size
    num_blocks: int = 2
    time_downsample: tuple[bool, ...] = (False, True, True)  # which of these halve time as well: two at most
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    def setup(self):
        outside_in = [self.dim * m for m in (1, *self.multipliers)]
        inside_out = [(self.decoder_dim or self.dim) * m for m in (self.multipliers[-1], *self.multipliers[::-1])]
        self.encoder = Encoder(tuple(outside_in), self.num_blocks, self.time_downsample, self.latent_channels)
        self.decoder = Decoder(tuple(inside_out), self.num_blocks, self.time_downsample[::-1])

    @property
    def patch(self) -> int:
        """Pixels a side that make one place of the latents."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def time_stride(self) -> int:
        """Frames after the first that make one latent frame."""
        return 2 ** sum(self.time_downsample)

    @property
    def smallest(self) -> tuple[int, int, int]:
        """(frames, height, width) of a small video of more than one chunk."""
        return 1 + CHUNK, 2 * self.patch, 2 * self.patch

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t, h, w, c) of a clip. Raises ValueError where frames are not 1 + 4k or the sides do not divide."""
        require_whole(frames, height, width, CHUNK, self.patch)
        return 1 + (frames - 1) // self.time_stride, height // self.patch, width // self.patch, self.latent_channels

    def encode(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[X T H W 3] in [-1, 1] -> posterior mean and log variance [X t h w c]; the latter in [-30, 20]."""

        def after(moments):
            mean, log_variance = jnp.split(moments, 2, axis=-1)
            return mean, jnp.clip(log_variance, -30.0, 20.0)

        return self._encode(video, lambda chunk: chunk, after)

    def decode(self, z: jax.Array) -> jax.Array:
        """[X t h w c] -> [X T H W 3], clipped to [-1, 1] as the reference does."""
        return self._decode(z, lambda chunk: chunk, lambda video: jnp.clip(video, -1.0, 1.0))

    def encode_normalised(self, video: jax.Array, dtype=jnp.float32) -> jax.Array:
        """u8 [X T H W 3] -> latents of about zero mean and unit variance a channel, float32 [X t h w c]."""
        mean, std = jnp.array(self.latent_mean), jnp.array(self.latent_std)

        def after(moments):
            return (moments[..., : self.latent_channels].astype(jnp.float32) - mean) / std

        return self._encode(video, lambda chunk: to_signed(chunk).astype(dtype), after)

    def decode_normalised(self, latents: jax.Array) -> jax.Array:
        """Normalised latents f32 [X t h w c] -> u8 [X T H W 3]."""
        mean, std = jnp.array(self.latent_mean), jnp.array(self.latent_std)
        return self._decode(latents, lambda chunk: chunk * std + mean, to_pixels)

    def _encode(self, video, before, after):
        if (video.shape[1] - 1) % CHUNK:
            raise ValueError(f"autoencoder: {video.shape[1]} frames; needs 1 + {CHUNK}k")
        return _stream(self.encoder, video, CHUNK, CHUNK // self.time_stride, before, after)

    def _decode(self, z, before, after):
        return _stream(self.decoder, z, 1, self.time_stride, before, after)


def _stream(half: nn.Module, x: jax.Array, takes: int, gives: int, before: Callable, after: Callable):
    """after(half(before(x))) for the first frame of x [X T ...] and then for each `takes` frames, which make `gives`.

    Chunks are cut from x and laid into the whole as they come, so that never more than one is worked on.
    """

    def run(half, held, start, frames):
        past = Past(held)
        out = half(before(jax.lax.dynamic_slice_in_dim(x, start, frames, axis=1)), past)
        return after(out), past.kept

    first, held = run(half, None, 0, 1)
    chunks = (x.shape[1] - 1) // takes
    if not chunks:
        return first

    def start(leaf):
        return jnp.zeros((leaf.shape[0], 1 + chunks * gives, *leaf.shape[2:]), leaf.dtype).at[:, :1].set(leaf)

    def step(half, carry, i):
        held, whole = carry
        out, held = run(half, held, 1 + i * takes, takes)
        lay = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, 1 + i * gives, axis=1)  # noqa: E731
        return (held, jax.tree.map(lay, whole, out)), None

    loop = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    (_, whole), _ = loop(half, (held, jax.tree.map(start, first)), jnp.arange(chunks))
    return whole
