"""The objective of the whole model: captioning, generation and safety in one pass, as named terms.

    caption     next token of assistant turns                       captioning
    generation  velocity or noise of the clips to render            generation
    refusal     next token of refusals                              safety
    hazard      is this turn hazardous?                             safety
    blocked     the same toward the blocked card                    safety
    preference  the preferred answer over the rejected one          safety
    keep        next token of ordinary talk, as the LLM had it      captioning
"""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.diffusion import flow
from g4v_jax.losses import generation
from g4v_jax.losses.captioning import score, weighted
from g4v_jax.losses.preference import preference, reference_hidden
from g4v_jax.losses.safety import detection, detection_count
from g4v_jax.models.gpt4video import GPT4Video
from g4v_jax.types import Array, Batch, Term


TERMS = ("caption", "generation", "refusal", "hazard", "blocked", "preference", "keep")


@dataclasses.dataclass(frozen=True)
class JointSpec(generation.GenerationSpec):
    """Weights of the other terms."""

    caption: float = 1.0
    refusal: float = 1.0
    hazard: float = 1.0
    preference: float = 1.0
    preference_beta: float = 0.1  # nats of margin count for so much
    keep: float = 0.0  # needs an LLM with LoRA; 0: ordinary talk is learned like captions
    hazard_positive_weight: float = 1.0
    chunks: int = 1  # of a row, in which tokens are scored: more take less memory and some time


@dataclasses.dataclass(frozen=True)
class Joint:
    """`Objective` (see train/step.py) of a GPT4Video and the latent shape (G, t, h, w, c) of a row."""

    model: GPT4Video
    spec: JointSpec
    latents: tuple[int, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {name: getattr(self.spec, name) for name in TERMS}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters of every tower."""
        draws = self.draw(jax.random.split(key, batch.tokens.shape[0]))
        return self.model.init(key, batch, draws)["params"]

    def draw(self, row_keys: Array) -> flow.Draws:
        """Times, noise, dropped conditions and gates of each row."""
        return generation.draw(self.model.denoiser.prediction, self.spec, self.latents, row_keys)

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Counts of the terms below, from the masks alone."""
        return {
            "caption": jnp.sum(self._captions(batch)),
            "refusal": jnp.sum(batch.refusal_weight),
            "hazard": detection_count(batch.hazard_label, self.spec.hazard_positive_weight),
            "preference": jnp.sum(batch.preference_owner > 0).astype(jnp.float32),
            "keep": jnp.sum(batch.keep_weight) if self.spec.keep else jnp.zeros(()),
            **generation.counts(batch),
        }

    def terms(self, params: dict, batch: Batch, draws: flow.Draws, dropout: Array) -> dict[str, Term]:
        """Sum and count of each term."""
        out = self.model.apply({"params": params}, batch, draws, rngs={"dropout": dropout})
        pairs = batch.preference_owner.shape[1] > 0
        # a second pass of the LLM, only where a term may need it
        base = reference_hidden(self.model.llm, params["llm"], out.inputs, batch) if pairs or self.spec.keep else None
        own, reference, moved = score(self.model.llm, params["llm"], batch.targets, out.hidden, base, self.spec.chunks)
        none = Term(jnp.zeros(()), jnp.zeros(()))
        return {
            "caption": weighted(own, self._captions(batch)),
            "refusal": weighted(own, batch.refusal_weight),
            "hazard": detection(out.hazard_logits, batch.hazard_label, self.spec.hazard_positive_weight),
            "preference": preference(own, reference, batch, self.spec.preference_beta) if pairs else none,
            "keep": weighted(moved, batch.keep_weight) if self.spec.keep else none,
            **generation.terms(out.velocity, out.velocity_target, batch),
        }

    def _captions(self, batch: Batch) -> Array:
        return batch.caption_weight if self.spec.keep else batch.caption_weight + batch.keep_weight
