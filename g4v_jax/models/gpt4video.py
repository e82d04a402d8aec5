"""The whole model: watch, read, answer, judge and render, as one pure function of (parameters, batch, draws)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from g4v_jax.diffusion.flow import Draws
from g4v_jax.diffusion.process import process
from g4v_jax.models.abstractor import Abstractor
from g4v_jax.models.autoencoder import Autoencoder
from g4v_jax.models.autoencoder_kl import KLAutoencoder
from g4v_jax.models.autoencoder_wan import WanAutoencoder
from g4v_jax.models.conditioner import Conditioner
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.models.llm import LLM
from g4v_jax.models.splice import query_positions, splice, take
from g4v_jax.models.summarizer import Summarizer
from g4v_jax.models.unet3d import UNet3D
from g4v_jax.models.vision import Vision
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.stack import one_by_one
from g4v_jax.sharding import constrain
from g4v_jax.types import Array, Batch


@struct.dataclass
class Outputs:
    """What the losses need of one forward pass."""

    inputs: Array  # [B S D] what the LLM read
    hidden: Array  # [B S D] what it made of it
    hazard_logits: Array  # f32 [B E]
    velocity: Array  # f32 [B G K t h w c] predicted; of a denoiser that predicts epsilon: the noise
    velocity_target: Array  # f32 [B G K t h w c]


@struct.dataclass
class Reading:
    """Rows before and after the LLM."""

    inputs: Array  # [B S D] words, with summary tokens and queries in their places
    hidden: Array  # [B S D] final states


def merge(x: jax.Array) -> jax.Array:
    """[B M ...] -> [B·M ...]: slots become rows of a tower's batch."""
    return x.reshape(-1, *x.shape[2:])


class GPT4Video(nn.Module):
    """The towers and how they meet.

    The denoiser attends to a generation's N queries and to the `caption_window` tokens before them, which hold the
    caption that the model has just written: a direct way for its words, which a model trained from nothing learns far
    sooner than to gather them in its queries. 0 leaves the queries alone. Of each position it gets the LLM's final
    state, made to foretell the next word, and what went in, which says what this word is.
    """

    vision: Vision
    summarizer: Summarizer | Abstractor
    llm: LLM
    conditioner: Conditioner
    autoencoder: Autoencoder | KLAutoencoder | WanAutoencoder
    denoiser: Denoiser | UNet3D
    num_queries: int = 4
    caption_window: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("channels", "embed"))
        self.queries = self.param("queries", init, (self.num_queries, self.llm.dim), jnp.float32)
        self.hazard = Linear((1,), ("embed", None), use_bias=True)

    def __call__(self, batch: Batch, draws: Draws) -> Outputs:
        """The training forward pass."""
        reading = self.read(batch)
        velocity, target = self._generate(reading, batch, draws)
        if self.is_initializing():  # training never decodes, but a run's weights hold the decoder for rendering
            self.autoencoder.decode_normalised(merge(draws.noise)[:, 0])
            self.llm.logits(reading.hidden)  # the losses score places by themselves, some at a time
        hazard = self.hazard_logits(reading.hidden, batch.hazard_position)
        return Outputs(reading.inputs, reading.hidden, hazard, velocity, target)

    def watch(self, clips: jax.Array, times: jax.Array) -> jax.Array:
        """clips u8 [X T H W 3], times f32 [X T] -> summary tokens [X Q D]."""
        features = self.vision(merge(clips), self.dtype, clips.shape[1])
        return self.summarizer(features.reshape(*clips.shape[:2], *features.shape[1:]), times)

    def embed(self, batch: Batch) -> jax.Array:
        """Rows as vectors [B S D]: words, with summary tokens and queries in their places."""
        summary = self.watch(merge(batch.clips), merge(batch.clip_times))
        summary = summary.reshape(batch.tokens.shape[0], -1, summary.shape[-1])
        x = self.llm.embed(batch.tokens, self.dtype)
        return splice(x, summary, batch.clip_index, self.queries, batch.query_index)

    def read(self, batch: Batch) -> Reading:
        """Every position of every row through the LLM."""
        inputs = self.embed(batch)
        return Reading(inputs, self.llm.hidden(inputs, batch.positions, batch.segments))

    def query_states(self, reading: Reading, batch: Batch) -> jax.Array:
        """Inputs and states at each slot's caption window and queries [B G M 2 D], M = caption_window + N.

        Tokens of the window that belong to another example are zero; an empty slot has states of no meaning.
        """
        slots = batch.gen_mask.shape[1]
        positions = query_positions(batch.query_index, slots * self.num_queries)
        first = positions[:, :: self.num_queries]
        window = first[..., None] + jnp.arange(-self.caption_window, self.num_queries)
        window = window.reshape(first.shape[0], -1)
        both = jnp.concatenate([reading.inputs, reading.hidden], axis=-1)
        states = take(both, window)  # a position before the row takes zeros

        def owner(at):
            return jnp.take_along_axis(batch.segments, jnp.maximum(at, 0), axis=1)

        own = owner(window).reshape(*first.shape, -1) == owner(first)[..., None]
        states = states.reshape(*own.shape, 2, -1)
        return states * own[..., None, None].astype(states.dtype)

    def hazard_logits(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """positions i32 [B E] -> f32 [B E]: log odds that the turn which ends there asks for, or shows, a hazard."""
        return self.hazard(take(hidden, positions).astype(jnp.float32))[..., 0]

    def encode(self, targets: jax.Array) -> jax.Array:
        """u8 [B G T H W 3] -> normalised latents f32 [B·G t h w c]; the work lies over `context` by the clips' height.

        Wan's autoencoder, which goes over a clip in a loop, also goes over a row's clips in one: a TPU's compiler takes
        two thirds longer over convolutions of two clips a device than over one's.
        """
        targets = constrain(targets, "rows", "slots", None, "height", None, None)
        if not isinstance(self.autoencoder, WanAutoencoder) or targets.shape[1] == 1:
            return self.autoencoder.encode_normalised(merge(targets), self.dtype)
        return merge(one_by_one(self.autoencoder, lambda one, clips: one.encode_normalised(clips, self.dtype), targets))

    def denoise(self, latents: jax.Array, times: jax.Array, context: jax.Array) -> jax.Array:
        """Velocity (see Outputs), f32, of normalised latents [X t h w c] at times [X] under context [X N D_context]."""
        out = self.denoiser(latents.astype(self.dtype), times, context.astype(self.dtype)).astype(jnp.float32)
        return process(self.denoiser.prediction).estimate(out, latents, times)

    def generate_from_words(self, batch: Batch, draws: Draws) -> tuple[jax.Array, jax.Array]:
        """Velocity and its target (see Outputs) where conditions are made of word vectors alone: no pass of the LLM."""
        words = self.llm.embed(batch.tokens, self.dtype)
        nothing = jnp.zeros_like(words[:, :1])
        inputs = splice(words, nothing, batch.clip_index, self.queries, batch.query_index)
        return self._generate(Reading(inputs, jnp.zeros_like(inputs)), batch, draws)

    def _generate(self, reading: Reading, batch: Batch, draws: Draws) -> tuple[jax.Array, jax.Array]:
        blocked = merge(batch.gen_blocked & draws.gate)
        context = self.conditioner(merge(self.query_states(reading, batch)), merge(draws.drop), blocked)
        return self._denoise(batch.gen_targets, draws, context)

    def _denoise(self, targets: jax.Array, draws: Draws, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Every clip at each of its K times; its latents and its context are made once."""
        x0 = jax.lax.stop_gradient(self.encode(targets))
        x0, context = (jnp.repeat(x, draws.times.shape[2], axis=0) for x in (x0, context))
        noise, times = merge(merge(draws.noise)), merge(merge(draws.times))
        path = process(self.denoiser.prediction)
        velocity = self.denoise(path.interpolate(x0, noise, times), times, context)
        shape = draws.noise.shape
        return velocity.reshape(shape), path.target(x0, noise).reshape(shape)
