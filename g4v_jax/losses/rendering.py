"""The objective of a generator's warm start: the words of a caption, as the LLM's table has them, render its clip.

Conditions are made of word vectors alone, so that no pass of the LLM is paid for. A conditioner and a denoiser that start
from nothing need thousands of steps before a clip has any shape, and a step of a language model costs a hundred times as
much as theirs; the joint objective then goes on from here and adds the LLM's states.
"""

import dataclasses

import jax

from g4v_jax.diffusion import flow
from g4v_jax.losses import generation
from g4v_jax.models.gpt4video import GPT4Video
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class Rendering:
    """`Objective` (see train/step.py) of a GPT4Video's word table, conditioner, queries and denoiser."""

    model: GPT4Video
    spec: generation.GenerationSpec
    latents: tuple[int, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {"generation": self.spec.generation, "blocked": self.spec.blocked}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters of what is used."""
        draws = self.draw(jax.random.split(key, batch.tokens.shape[0]))
        return self.model.init(key, batch, draws, method="generate_from_words")["params"]

    def draw(self, row_keys: Array) -> flow.Draws:
        """Times, noise, dropped conditions and gates of each row."""
        return generation.draw(self.model.denoiser.prediction, self.spec, self.latents, row_keys)

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Counts of the terms below, from the masks alone."""
        return generation.counts(batch)

    def terms(self, params: dict, batch: Batch, draws: flow.Draws, dropout: Array) -> dict[str, Term]:
        """Sum and count of each term."""
        del dropout  # of the LLM's LoRA
        velocity, target = self.model.apply({"params": params}, batch, draws, method="generate_from_words")
        return generation.terms(velocity, target, batch)
