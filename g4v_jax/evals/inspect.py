"""What batches hold: padding of tokens and slots, and a sheet of the clips with their text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from g4v_jax.data.text import Tokenizer
from g4v_jax.evals import pictures
from g4v_jax.types import Batch

SHOWN = 16


def measure(batches: Sequence[Batch]) -> dict:
    """Shares of empty token, clip and target slots, and examples a row."""

    def empty(used) -> float:
        return 1.0 - float(np.mean([np.mean(used(batch)) for batch in batches]))

    return {
        "padding": empty(lambda b: b.segments > 0),
        "empty_clips": empty(lambda b: b.clip_mask),
        "empty_targets": empty(lambda b: b.gen_mask),
        "examples_a_row": float(np.mean([np.mean(b.segments.max(axis=1)) for b in batches])),
    }


def sheet(batch: Batch, tokenizer: Tokenizer, path: str) -> None:
    """Draw the clips and targets of a batch, each with the text of the example that it belongs to."""
    strips = []
    for row in range(len(batch.tokens)):
        for slots, mask, index in (
            (batch.clips, batch.clip_mask, batch.clip_index),
            (batch.gen_targets, batch.gen_mask, batch.query_index),
        ):
            used = int(mask[row].sum())
            for slot in range(used):
                width = (int(index[row].max()) + 1) // used
                where = np.flatnonzero(index[row] == slot * width)
                segment = batch.segments[row, where[0]]
                words = tokenizer.decode(batch.tokens[row, batch.segments[row] == segment], specials=False)
                strips.append(pictures.strip(slots[row, slot], [words[:80], words[80:160]]))
    if strips:
        pictures.sheet(strips[:SHOWN], Path(path))
