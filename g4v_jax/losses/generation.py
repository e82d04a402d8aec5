"""The flow-matching loss of the denoiser: what is drawn for it, and its two terms."""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.diffusion import flow
from g4v_jax.diffusion.process import process
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """Weights of the two terms, and how generation is trained."""

    generation: float = 1.0
    blocked: float = 1.0
    time_shift: float = 1.0  # of the flow's times toward noise
    drop_rate: float = 0.1  # of conditions, for classifier-free guidance
    gate_rate: float = 0.5  # of blocked slots that train the learned blocked context
    noises: int = 1  # drawn for each clip: more, where the LLM's pass costs more than the denoiser's (Li et al. 2024)


def draw(prediction: str, spec: GenerationSpec, latents: tuple[int, ...], row_keys: Array) -> flow.Draws:
    """Times, noise, dropped conditions and gates of each row."""
    times = process(prediction, spec.time_shift).times
    return flow.draw(row_keys, latents, times, spec.drop_rate, spec.gate_rate, spec.noises)


def counts(batch: Batch) -> dict[str, Array]:
    """Clips to render of each term: what was asked for, and the blocked card in its place."""
    return {
        "generation": jnp.sum(batch.gen_mask & ~batch.gen_blocked).astype(jnp.float32),
        "blocked": jnp.sum(batch.gen_mask & batch.gen_blocked).astype(jnp.float32),
    }


def terms(velocity: Array, target: Array, batch: Batch) -> dict[str, Term]:
    """Both terms, of f32 [B G K t h w c]."""
    return {
        "generation": flow_matching(velocity, target, batch.gen_mask & ~batch.gen_blocked),
        "blocked": flow_matching(velocity, target, batch.gen_mask & batch.gen_blocked),
    }


def flow_matching(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> Term:
    """Squared error averaged over each slot's noises and latents, summed over used slots.

    velocity and target f32 [B G K t h w c], mask bool [B G].
    """
    error = jnp.mean(jnp.square(velocity - target), axis=tuple(range(2, target.ndim)))
    weight = mask.astype(jnp.float32)
    return Term(jnp.sum(error * weight), jnp.sum(weight))
