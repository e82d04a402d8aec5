"""The two ways from data to noise and back behind one interface, chosen by what a denoiser predicts.

May hold the interface and its members; their mathematics is in `flow.py`, `sampler.py` and `ddpm.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from g4v_jax.diffusion import ddpm, flow, sampler


class Process(Protocol):
    """How latents are noised, what the denoiser learns of it, and how that is undone. Times in [0, 1], 1 is noise."""

    def times(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Times to train on, f32 of a shape."""

    def interpolate(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t of samples x0 [X ...], noise [X ...], t [X]."""

    def estimate(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The denoiser's output as what is compared with `target`, guided, and given to `sample`."""

    def target(self, x0: jax.Array, noise: jax.Array) -> jax.Array:
        """What a perfect estimate would be on average."""

    def sample(self, estimate: Callable, noise: jax.Array, steps: int) -> jax.Array:
        """Noise [X ...] to samples; estimate(x [X ...], t [X]) -> [X ...]."""


@dataclasses.dataclass(frozen=True)
class Flow:
    """Rectified flow matching: estimates are velocities."""

    prediction: str
    shift: float  # of times toward noise

    def times(self, key, shape):
        return flow.logit_normal(key, shape, self.shift)

    def interpolate(self, x0, noise, t):
        return flow.interpolate(x0, noise, t)

    def estimate(self, prediction, x_t, t):
        return flow.to_velocity(prediction, x_t, t, self.prediction)

    def target(self, x0, noise):
        return noise - x0

    def sample(self, estimate, noise, steps):
        return sampler.euler(estimate, noise, sampler.schedule(steps, self.shift))


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion: estimates are of the noise."""

    def times(self, key, shape):
        return ddpm.uniform(key, shape)

    def interpolate(self, x0, noise, t):
        return ddpm.interpolate(x0, noise, t)

    def estimate(self, prediction, x_t, t):
        return prediction

    def target(self, x0, noise):
        return noise

    def sample(self, estimate, noise, steps):
        return ddpm.ddim(estimate, noise, steps)


def process(prediction: str, shift: float = 1.0) -> Process:
    """The process of a denoiser that predicts "epsilon", or else "velocity" or "x0"; `shift`: see flow.shift_times.

    Raises ValueError for a shift of diffusion's times, whose schedule is fixed.
    """
    if prediction != "epsilon":
        return Flow(prediction, shift)
    if shift != 1.0:
        raise ValueError(f"times of a denoiser that predicts epsilon are not shifted; got {shift}")
    return Diffusion()
