"""The objective of a language model alone: the next token of every answer, and of whatever a data set has besides.

For comparisons with trainers of one tower, and for talk without clips; all else of the whole model is absent.
"""

import dataclasses

import jax
import jax.numpy as jnp

from g4v_jax.losses.captioning import score, weighted
from g4v_jax.models.llm import LLM
from g4v_jax.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True)
class LanguageSpec:
    """Weight of the term, and in how many chunks a row is scored (see `captioning.in_chunks`)."""

    tokens: float = 1.0
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Language:
    """`Objective` (see train/step.py) of an LLM; reads a batch's tokens alone."""

    llm: LLM
    spec: LanguageSpec
    dtype: jnp.dtype

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {"tokens": self.spec.tokens}

    def init(self, key: Array, batch: Batch) -> dict:
        """Boxed parameters, under the name that the whole model gives them."""

        def use(llm: LLM, batch: Batch):
            return llm.logits(self._hidden(llm, batch))

        return {"llm": self.llm.init(key, batch, method=use)["params"]}

    def draw(self, row_keys: Array) -> Array:
        """Nothing is random but dropout: the keys themselves."""
        return row_keys

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Tokens that are learned."""
        return {"tokens": jnp.sum(_learned(batch))}

    def terms(self, params: dict, batch: Batch, draws: Array, dropout: Array) -> dict[str, Term]:
        """Nats summed over tokens."""
        del draws
        llm = params["llm"]
        with jax.named_scope("llm"):  # the tower's name, which the whole model's towers have by themselves
            hidden = self.llm.apply({"params": llm}, batch, method=self._hidden, rngs={"dropout": dropout})
            losses, _, _ = score(self.llm, llm, batch.targets, hidden, chunks=self.spec.chunks)
        return {"tokens": weighted(losses, _learned(batch))}

    def _hidden(self, llm: LLM, batch: Batch) -> Array:
        return llm.hidden(llm.embed(batch.tokens, self.dtype), batch.positions, batch.segments)


def _learned(batch: Batch) -> Array:
    return batch.caption_weight + batch.refusal_weight + batch.keep_weight
