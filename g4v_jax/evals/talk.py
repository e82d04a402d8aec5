"""Is ordinary language kept? Perplexity of a model on held-out talk, beside that of the LLM it started from.

May hold the measure on dialogues without clips; what the model says of clips is judged in `captions.py`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import trees
from g4v_jax.data import records
from g4v_jax.data.talk import KIND
from g4v_jax.data.text import Turn
from g4v_jax.evals.figures import Figure
from g4v_jax.infer.assistant import Assistant
from g4v_jax.losses.captioning import token_losses
from g4v_jax.models.gpt4video import GPT4Video
from g4v_jax.sharding import gathered


def measure(assistant: Assistant, directory: str, split: str) -> dict[str, Figure]:
    """Perplexity of every assistant's turn in the split's talks between people, {} where there are none.

    "talk/perplexity" is the model's; where it carries LoRA, "talk/perplexity_base" is the same model's with LoRA off,
    which is the LLM that it started from, and "talk/perplexity_ratio" the first over the second (intervals by
    bootstrap over talks).
    """
    talks = [record for record in records.listed(directory, split, "dialogues") if record.kind == KIND]
    if not talks:
        return {}
    dialogues = [[Turn(turn["role"], turn["text"]) for turn in record.dialogue] for record in talks]
    own = losses(assistant, assistant.params, dialogues)
    figures = {"talk/perplexity": _perplexity(*own)}
    base = without_lora(assistant.params)
    if base is not None:
        before = losses(assistant, base, dialogues)
        figures["talk/perplexity_base"] = _perplexity(*before)
        figures["talk/perplexity_ratio"] = _perplexity(own[0] - before[0], own[1])
    return figures


def losses(assistant: Assistant, params: dict, dialogues: Sequence[Sequence[Turn]]) -> tuple[np.ndarray, np.ndarray]:
    """Summed cross-entropy of the assistant's turns of each dialogue, and how many tokens it sums: f64 [n] each."""
    sums, counts = [], []
    for used, batch in assistant.whole(dialogues):
        with jax.set_mesh(assistant.mesh):
            total, count = _row_losses(assistant.model, params, batch)
        sums.append(np.asarray(total, np.float64)[:used])
        counts.append(np.asarray(count, np.float64)[:used])
    return np.concatenate(sums), np.concatenate(counts)


def without_lora(params: dict) -> dict | None:
    """The same parameters with LoRA silent, None where there is none."""
    flat = trees.flatten(params)
    off = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if path.endswith("/lora_b")}
    return trees.unflatten(flat | off) if off else None


@partial(jax.jit, static_argnums=0)
def _row_losses(model: GPT4Video, params: dict, batch):
    """Cross-entropy of each row's weighted targets: (sum, count), f32 [B] each."""

    def logits(m, b):
        x = m.llm.embed(b.tokens, m.dtype)
        return m.llm.logits(m.llm.hidden(x, b.positions, b.segments))

    found = token_losses(model.apply({"params": params}, batch, method=logits), batch.targets)
    return gathered((jnp.sum(found * batch.caption_weight, axis=1), jnp.sum(batch.caption_weight, axis=1)))


def _perplexity(sums: np.ndarray, counts: np.ndarray) -> Figure:
    return Figure.bootstrap(lambda rows: float(np.exp(sums[rows].sum() / counts[rows].sum())), len(sums))
