"""Captioning on held-out clips: attributes by rule where the clips have them, ROUGE-L against the caption always."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
from rouge_score import rouge_scorer

from g4v_jax.data.records import Record
from g4v_jax.data.text import Clip, Turn
from g4v_jax.data.world.attributes import judge, parse_caption
from g4v_jax.data.world.phrases import QUESTIONS
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.infer.assistant import Assistant


@dataclasses.dataclass(frozen=True)
class Captioned:
    """One judged clip."""

    record: Record
    clip: Clip
    text: str
    right: dict[str, bool]  # by attribute; empty where the record has none that can be judged


def question(record: Record, clip: Clip, split: str, number: int) -> list[Turn]:
    """A held-out phrasing of "what does this show", cycled by number."""
    phrasings = QUESTIONS[split]
    return [Turn("user", phrasings[number % len(phrasings)], clips=[clip])]


def measure(
    assistant: Assistant, records: Sequence[Record], clips: Sequence[Clip], split: str
) -> tuple[dict[str, Figure], list[Captioned]]:
    """Caption each clip once, greedily -> (figures, the judged clips)."""
    asked = [question(record, clip, split, i) for i, (record, clip) in enumerate(zip(records, clips))]
    judged = []
    for record, clip, reply in zip(records, clips, assistant.answer(asked)):
        right = judge(record.attributes, partial(parse_caption, reply.text))
        judged.append(Captioned(record, clip, reply.text, right))
    figures = {"caption/rouge_l": Figure.mean([rouge_l(j.text, j.record.caption) for j in judged])}
    figures["caption/exact"] = Figure.share([_plain(j.text) == _plain(j.record.caption) for j in judged])
    figures |= attribute_figures("caption", [j.right for j in judged])
    return figures, judged


def rouge_l(text: str, reference: str) -> float:
    """F-measure of ROUGE-L (Lin 2004), lower-cased words without stemming."""
    return rouge_scorer.RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure


def _plain(text: str) -> str:
    return " ".join(text.lower().rstrip(".").split())


def spread(items: Sequence, count: int) -> list:
    """`count` items spread evenly over a sequence, or all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
