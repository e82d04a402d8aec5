"""The whole model: watch, read, answer, judge and render, as one pure function of (parameters, batch, draws)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from g4v_jax.diffusion import flow
from g4v_jax.diffusion.flow import Draws
from g4v_jax.models.autoencoder import Autoencoder
from g4v_jax.models.conditioner import Conditioner
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.models.llm import LLM
from g4v_jax.models.splice import query_positions, splice, take
from g4v_jax.models.summarizer import Summarizer
from g4v_jax.models.vision import Vision
from g4v_jax.nn.linear import Linear
from g4v_jax.types import Array, Batch


@struct.dataclass
class Outputs:
    """What the losses need of one forward pass."""

    logits: Array  # f32 [B S V]
    hazard_logits: Array  # f32 [B E]
    velocity: Array  # f32 [B G t h w c] predicted
    velocity_target: Array  # f32 [B G t h w c]


def merge(x: jax.Array) -> jax.Array:
    """[B M ...] -> [B·M ...]: slots become rows of a tower's batch."""
    return x.reshape(-1, *x.shape[2:])


class GPT4Video(nn.Module):
    """The towers and how they meet. `num_queries`: N, hidden states read per generation."""

    vision: Vision
    summarizer: Summarizer
    llm: LLM
    conditioner: Conditioner
    autoencoder: Autoencoder
    denoiser: Denoiser
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("channels", "embed"))
        self.queries = self.param("queries", init, (self.conditioner.num_queries, self.llm.dim), jnp.float32)
        self.hazard = Linear((1,), ("embed", None), use_bias=True)

    def __call__(self, batch: Batch, draws: Draws) -> Outputs:
        """The training forward pass."""
        hidden = self.read(batch)
        states = self.query_states(hidden, batch)
        blocked = merge(batch.gen_blocked & draws.gate)
        context = self.conditioner(merge(states), merge(draws.drop), blocked)
        velocity, target = self._denoise(batch.gen_targets, draws, context)
        return Outputs(self.llm.logits(hidden), self.hazard_logits(hidden, batch.hazard_position), velocity, target)

    def watch(self, clips: jax.Array, times: jax.Array) -> jax.Array:
        """clips u8 [X T H W 3], times f32 [X T] -> summary tokens [X Q D]."""
        features = self.vision(merge(clips), self.dtype)
        return self.summarizer(features.reshape(*clips.shape[:2], *features.shape[1:]), times)

    def embed(self, batch: Batch) -> jax.Array:
        """Rows as vectors [B S D]: words, with summary tokens and queries in their places."""
        summary = self.watch(merge(batch.clips), merge(batch.clip_times))
        summary = summary.reshape(batch.tokens.shape[0], -1, summary.shape[-1])
        x = self.llm.embed(batch.tokens, self.dtype)
        return splice(x, summary, batch.clip_index, self.queries, batch.query_index)

    def read(self, batch: Batch) -> jax.Array:
        """The LLM's final states of every position [B S D]."""
        return self.llm.hidden(self.embed(batch), batch.positions, batch.segments)

    def query_states(self, hidden: jax.Array, batch: Batch) -> jax.Array:
        """States at each slot's queries [B G N D]; of an empty slot, states of some other position."""
        slots, queries = batch.gen_mask.shape[1], self.conditioner.num_queries
        states = take(hidden, query_positions(batch.query_index, slots * queries))
        return states.reshape(hidden.shape[0], slots, queries, hidden.shape[-1])

    def hazard_logits(self, hidden: jax.Array, positions: jax.Array) -> jax.Array:
        """positions i32 [B E] -> f32 [B E]: log odds that the turn which ends there asks for, or shows, a hazard."""
        return self.hazard(take(hidden, positions).astype(jnp.float32))[..., 0]

    def denoise(self, latents: jax.Array, times: jax.Array, context: jax.Array) -> jax.Array:
        """Velocity of normalised latents [X t h w c] at times [X] under context [X N D_context], float32."""
        out = self.denoiser(latents.astype(self.dtype), times, context.astype(self.dtype)).astype(jnp.float32)
        return flow.to_velocity(out, latents, times, self.denoiser.prediction)

    def _denoise(self, targets: jax.Array, draws: Draws, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0 = jax.lax.stop_gradient(self.autoencoder.encode_normalised(merge(targets), self.dtype))
        noise, times = merge(draws.noise), merge(draws.times)
        velocity = self.denoise(flow.interpolate(x0, noise, times), times, context)
        shape = draws.noise.shape
        return velocity.reshape(shape), (noise - x0).reshape(shape)
