"""The objective of the autoencoder's stage: reconstruct clips through a narrow, smooth latent.

    reconstruction  |error| + error²/2 of pixels in [-1, 1], saturated pixels weighing more
    kl              of the posterior to a standard normal
    statistics      quadratics whose gradient makes moving averages of the latents' mean and square (see optim)
"""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.models.autoencoder import Autoencoder, to_signed
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class ReconstructionSpec:
    """Weights of the terms."""

    reconstruction: float = 1.0
    kl: float = 1e-4
    statistics: float = 1.0
    saturated_weight: float = 2.0  # added weight of pixels of strong colour: small coloured things matter most
    latent_noise: float = 0.0  # standard deviation (in latent units) added before decoding: a smoother latent


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """`Objective` (see train/step.py) of an autoencoder; reads a batch's targets alone."""

    autoencoder: Autoencoder
    spec: ReconstructionSpec
    latents: tuple[int, ...]  # (G, t, h, w, c)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {name: getattr(self.spec, name) for name in ("reconstruction", "kl", "statistics")}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters, under the name that the whole model gives them."""
        return {"autoencoder": self.autoencoder.init(key, batch.gen_targets[:, 0])["params"]}

    def draw(self, row_keys: Array) -> Array:
        """Posterior noise f32 [B G t h w c] and smoothing noise of the same shape, stacked on axis 1 [B 2 ...]."""
        return jax.vmap(lambda key: jax.random.normal(key, (2, *self.latents)))(row_keys)

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Each term counts used slots."""
        used = jnp.sum(batch.gen_mask).astype(jnp.float32)
        return dict.fromkeys(self.weights, used)

    def terms(self, params: dict, batch: Batch, draws: Array, dropout: Array) -> dict[str, Term]:
        """Sum and count of each term; each slot's share is a mean over its pixels or latents."""
        del dropout
        noise = jnp.moveaxis(draws, 1, 0).reshape(2, -1, *self.latents[1:])
        video = batch.gen_targets.reshape(-1, *batch.gen_targets.shape[2:])
        out = self.autoencoder.apply({"params": params["autoencoder"]}, video, noise, self.spec.latent_noise)

        pixels = to_signed(video)
        saturated = jnp.max(pixels, -1, keepdims=True) - jnp.min(pixels, -1, keepdims=True) > 0.6
        error = jnp.abs(out.video - pixels)
        error = (error + 0.5 * error**2) * (1.0 + self.spec.saturated_weight * saturated)
        kl = 0.5 * (out.mean**2 + jnp.exp(out.log_variance) - 1.0 - out.log_variance)
        mean = jax.lax.stop_gradient(out.mean)
        statistics = 0.5 * ((out.latent_mean - mean) ** 2 + (out.latent_square - mean**2) ** 2)
        # channels are summed: the gradient of each statistic is then its distance from the batch's
        statistics = jnp.sum(statistics, axis=-1)

        def term(x):
            used = batch.gen_mask.reshape(-1).astype(jnp.float32)
            return Term(jnp.sum(jnp.mean(x, axis=tuple(range(1, x.ndim))) * used), jnp.sum(used))

        return {"reconstruction": term(error), "kl": term(kl), "statistics": term(statistics)}
