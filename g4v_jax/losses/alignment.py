"""The objective of a warm start: what a summary says of a clip foretells the words of its caption.

The mean of a clip's summary tokens is scored against the LLM's own word vectors, and each word of the caption counts as a
class: a bag of words, and no pass of the LLM. A summarizer that starts from nothing so learns in minutes to speak in the LLM's
word space; the joint objective then goes on from it. The idea is that of predicting caption words from an image (Joulin et
al. 2016), through a frozen table.
"""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.models.gpt4video import GPT4Video, merge
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class AlignmentSpec:
    """Weight of the term, and how sharp the choice among words is."""

    words: float = 1.0
    sharpness: float = 8.0  # that dot products with word vectors are multiplied by


@dataclasses.dataclass(frozen=True)
class Alignment:
    """`Objective` (see train/step.py) of a GPT4Video's tower, summarizer and word table; reads captions of clips alone."""

    model: GPT4Video
    spec: AlignmentSpec
    latents: tuple[int, ...]  # as other objectives take it; unused

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {"words": self.spec.words}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters of what is used: the tower, the summarizer, and of the rest what has no part of its own."""
        return self.model.init(key, batch, method=self._scores)["params"]

    def draw(self, row_keys: Array) -> Array:
        """Nothing is random: the keys themselves."""
        return row_keys

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Words of captions that follow a clip."""
        return {"words": jnp.sum(self._used(batch), dtype=jnp.float32)}

    def terms(self, params: dict, batch: Batch, draws: Array, dropout: Array) -> dict[str, Term]:
        """Nats summed over words of captions, each under the clip before it."""
        del draws, dropout
        scores = self.model.apply({"params": params}, batch, method=self._scores)
        log = jax.nn.log_softmax(self.spec.sharpness * scores)
        slots = jnp.maximum(clip_before(batch, self.model.summarizer.tokens), 0)
        of_words = jnp.take_along_axis(log, batch.targets[:, None, :], axis=2)  # [B K S]
        picked = jnp.take_along_axis(of_words, slots[:, None, :], axis=1)[:, 0]
        used = self._used(batch)
        return {"words": Term(-jnp.sum(picked * used), jnp.sum(used, dtype=jnp.float32))}

    def _used(self, batch: Batch) -> Array:
        return (clip_before(batch, self.model.summarizer.tokens) >= 0) & (batch.caption_weight > 0)

    @staticmethod
    def _scores(model: GPT4Video, batch: Batch) -> Array:
        """Dot products of each clip's mean summary token with every word, f32 [B K V]."""
        summary = model.watch(merge(batch.clips), merge(batch.clip_times))[:, :-1]  # without the end vector
        means = jnp.mean(summary, axis=1).reshape(*batch.clip_mask.shape, -1)
        return model.llm.logits(means)


def clip_before(batch: Batch, tokens: int) -> Array:
    """i32 [B S]: the slot of the clip last shown before each place of a dialogue, -1 where there is none.

    `tokens`: Q, summary tokens a clip.
    """
    shown = batch.clip_index >= 0
    latest = jax.lax.cummax(jnp.where(shown, jnp.arange(shown.shape[1]), -1), axis=1)
    at = jnp.maximum(latest, 0)
    own = jnp.take_along_axis(batch.segments, at, axis=1) == batch.segments
    slot = jnp.take_along_axis(batch.clip_index, at, axis=1) // tokens
    return jnp.where((latest >= 0) & own & (batch.segments > 0), slot, -1)
