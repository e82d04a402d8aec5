"""Denoising diffusion on Stable Diffusion's noise schedule (Ho et al. 2020; Rombach et al. 2022), sampled by DDIM.

x_k = √ā_k·x0 + √(1 - ā_k)·ε at timesteps k = 0 ... 999, target ε. Pure functions; times are per sample, in [0, 1],
t = k / 999. Agrees with diffusers' `DDIMScheduler` as ModelScope and ZeroScope set it: scaled-linear β, η = 0,
leading spacing, an offset of one step, and a last step that ends at ā_0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 1000
BETAS = (0.00085, 0.012)  # at the first step and at the last, their roots evenly spaced
OFFSET = 1


def alphas() -> np.ndarray:
    """ā f64 [STEPS]: the share of the data's variance that is left at each step."""
    return np.cumprod(1.0 - np.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, STEPS) ** 2)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Times f32 of a shape, each step as likely as any."""
    return jax.random.randint(key, shape, 0, STEPS) / jnp.float32(STEPS - 1)


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t of samples x0 [X ...], noise [X ...], t [X]."""
    step = jnp.round(t * (STEPS - 1)).astype(jnp.int32)
    signal, sigma = (jnp.asarray(np.sqrt(share), jnp.float32)[step] for share in (alphas(), 1 - alphas()))
    shape = t.shape + (1,) * (x0.ndim - t.ndim)
    return signal.reshape(shape) * x0 + sigma.reshape(shape) * noise


def schedule(steps: int) -> np.ndarray:
    """Timesteps i32 [steps] from noise to data. Raises ValueError for none, or for more than the process has."""
    if not 0 < steps < STEPS:
        raise ValueError(f"{steps} sampling steps; must be in 1 ... {STEPS - 1}")
    return (np.arange(steps)[::-1] * (STEPS // steps) + OFFSET).astype(np.int32)


def ddim(epsilon: Callable, noise: jax.Array, steps: int) -> jax.Array:
    """Sample in `steps` deterministic steps (Song et al. 2021, eq. 12); epsilon(x [X ...], t [X]) -> [X ...]."""
    now = schedule(steps)
    share, after = alphas()[now], alphas()[np.maximum(now - STEPS // steps, 0)]
    # x0 and ε of eq. 12 put together: x moves by two numbers a step, made here in float64
    scale = np.sqrt(after / share)
    move = np.sqrt(1 - after) - scale * np.sqrt(1 - share)

    def step(x, numbers):
        t, scale, move = numbers
        return scale * x + move * epsilon(x, jnp.full(x.shape[:1], t)), None

    numbers = (jnp.asarray(values, jnp.float32) for values in (now / (STEPS - 1), scale, move))
    return jax.lax.scan(step, noise, tuple(numbers))[0]
