"""The objective of a denoiser alone, on latents and contexts that are themselves noise: for measuring its step.

As trainers of one tower run it, with latents and texts encoded beforehand: no autoencoder and no language model is paid for,
and nothing is learned.
"""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.diffusion.process import Process, process
from g4v_jax.losses.generation import flow_matching
from g4v_jax.models.denoiser import Denoiser
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class DenoisingSpec:
    """Size of what stands for a clip and its text: latents (t, h, w), one a row, and vectors of context."""

    latents: tuple[int, ...]
    context: int
    generation: float = 1.0
    time_shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class Denoising:
    """`Objective` (see train/step.py) of a denoiser; of a batch it reads how many rows there are."""

    denoiser: Denoiser
    spec: DenoisingSpec
    dtype: jnp.dtype

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {"generation": self.spec.generation}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters, under the name that the whole model gives them."""
        keys = jax.random.split(key, batch.tokens.shape[0] + 1)
        noisy, _, times, context = self._noised(self.draw(keys[1:]))
        return {"denoiser": self.denoiser.init(keys[0], noisy, times, context)["params"]}

    def draw(self, row_keys: Array) -> tuple[Array, ...]:
        """(latents, noise, times, context) of each row, f32."""
        spec, way = self.spec, self._way
        latents = (*spec.latents, self.denoiser.latent_channels)

        def one(key):
            clip, noise, time, text = jax.random.split(key, 4)
            context = jax.random.normal(text, (spec.context, self.denoiser.context_dim))
            return jax.random.normal(clip, latents), jax.random.normal(noise, latents), way.times(time, ()), context

        return jax.vmap(one)(row_keys)

    def counts(self, batch: Batch) -> dict[str, Array]:
        """One latent a row."""
        return {"generation": jnp.float32(batch.tokens.shape[0])}

    def terms(self, params: dict, batch: Batch, draws: tuple[Array, ...], dropout: Array) -> dict[str, Term]:
        """Squared error averaged over each row's latents, summed over rows."""
        del batch, dropout
        noisy, target, times, context = self._noised(draws)
        with jax.named_scope("denoiser"):
            made = self.denoiser.apply({"params": params["denoiser"]}, noisy, times, context)
        estimate = self._way.estimate(made.astype(jnp.float32), noisy.astype(jnp.float32), times)
        slots = jnp.ones(target.shape[:1] + (1,), bool)
        return {"generation": flow_matching(estimate[:, None, None], target[:, None, None], slots)}

    @property
    def _way(self) -> Process:
        return process(self.denoiser.prediction, self.spec.time_shift)

    def _noised(self, draws: tuple[Array, ...]) -> tuple[Array, ...]:
        """(noisy latents [B t h w c], target f32 of the same shape, times f32 [B], context [B N D])."""
        latents, noise, times, context = draws
        noisy = self._way.interpolate(latents, noise, times)
        return noisy.astype(self.dtype), self._way.target(latents, noise), times, context.astype(self.dtype)
