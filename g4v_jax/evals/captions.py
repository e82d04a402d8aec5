"""Captioning on held-out clips: attributes by rule where the clips have them, words against the caption (see `words`)."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
from rouge_score import rouge_scorer

from g4v_jax.data.records import Record
from g4v_jax.data.text import Clip, Turn
from g4v_jax.data.world.attributes import judge, parse_caption
from g4v_jax.data.world.phrases import QUESTIONS
from g4v_jax.evals import words
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.infer.assistant import Assistant


@dataclasses.dataclass(frozen=True)
class Captioned:
    """One judged clip."""

    record: Record
    clip: Clip
    text: str
    right: dict[str, bool]  # by attribute; empty where the record has none that can be judged
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # by figure: what runs are compared by


def question(record: Record, clip: Clip, split: str, number: int) -> list[Turn]:
    """A held-out phrasing of "what does this show", cycled by number."""
    phrasings = QUESTIONS[split]
    return [Turn("user", phrasings[number % len(phrasings)], clips=[clip])]


def measure(
    assistant: Assistant, records: Sequence[Record], clips: Sequence[Clip], split: str, meteor: bool = True,
    notes: dict[str, str] | None = None,
) -> tuple[dict[str, Figure], list[Captioned]]:
    """Caption each clip once, greedily -> (figures, the judged clips). `notes` gets what is not measured, and why."""
    return _judged(records, clips, _answers(assistant, records, clips, split), "caption", meteor, notes)


def judged_texts(
    texts: Sequence[str], records: Sequence[Record], notes: dict[str, str]
) -> tuple[dict[str, Figure], list[Captioned]]:
    """The same figures of texts from anywhere, one for each clip."""
    return _judged(records, [None] * len(records), texts, "caption", True, notes)


def rephrased(
    assistant: Assistant, judged: Sequence[Captioned], split: str
) -> tuple[dict[str, Figure], dict[str, dict[str, float]]]:
    """Ask about each clip that `measure` judged in the other held-out phrasings too -> (figures, their values by record).

    "caption/phrasings/cider" and "caption/phrasings/rouge_l": a clip's value is its mean over all phrasings, so that
    less of a figure is the luck of one greedy answer; the interval is over clips.
    """
    records, clips = [one.record for one in judged], [one.clip for one in judged]
    rounds = [judged]
    for first in range(1, len(QUESTIONS[split])):
        texts = _answers(assistant, records, clips, split, first)
        rounds.append(_judged(records, clips, texts, "caption", meteor=False)[1])
    scores = {
        f"caption/phrasings/{name}": {
            same[0].record.id: float(np.mean([one.scores[f"caption/{name}"] for one in same])) for same in zip(*rounds)
        }
        for name in ("cider", "rouge_l")
    }
    return {name: Figure.mean(list(values.values())) for name, values in scores.items()}, scores


def copied(records: Sequence[Record], known: Sequence[Record]) -> dict[str, Figure]:
    """The figures of captions that are copied, each from a `known` clip drawn by chance: what watching nothing gives."""
    draw = np.random.default_rng(0)
    texts = [known[int(i)].caption for i in draw.integers(len(known), size=len(records))]
    return _judged(records, [None] * len(records), texts, "caption_copy", meteor=False)[0]


def _answers(assistant, records, clips, split: str, first: int = 0) -> list[str]:
    """What is said of each clip, asked in phrasing `first` and on."""
    asked = [question(record, clip, split, first + i) for i, (record, clip) in enumerate(zip(records, clips))]
    return [reply.text for reply in assistant.answer(asked)]


def _judged(records, clips, texts, prefix: str, meteor: bool, notes=None) -> tuple[dict[str, Figure], list[Captioned]]:
    found = words.measure(texts, [[record.caption] for record in records], prefix, meteor)
    if notes is not None:
        notes |= found.reasons
    judged = []
    for i, (record, clip, text) in enumerate(zip(records, clips, texts)):
        right = judge(record.attributes, partial(parse_caption, text))
        scores = {name: float(values[i]) for name, values in found.each.items()}
        scores |= {f"{prefix}/attributes": float(all(right.values()))} if right else {}
        judged.append(Captioned(record, clip, text, right, scores))
    figures = dict(found.figures)
    figures[f"{prefix}/exact"] = Figure.share([_plain(j.text) == _plain(j.record.caption) for j in judged])
    return figures | attribute_figures(prefix, [j.right for j in judged]), judged


def group_accuracy(judged: Sequence[Captioned], known: Sequence[Record]) -> dict[str, Figure]:
    """Share of emoji whose caption names one of the same group ("animals and nature"): "caption/group".

    The group is that of the `known` record whose caption has the most words of it in order (ROUGE-L), tones aside; none
    where several groups are as near, or no name has a word in common. Each base emoji counts once: variants of one
    differ by skin tone alone and are no samples of their own, so theirs are averaged. "caption/group_guess" is the
    share of the commonest group. Clips without a group and a base are left out; {} where none has both.
    """
    judged, known = [one for one in judged if _grouped(one.record)], [record for record in known if _grouped(record)]
    groups = {name_words(record.caption): record.attributes["group"] for record in known}
    if not judged or not groups:
        return {}
    shared = set.intersection(*map(set, groups))  # words that every caption has tell nothing
    names = {tuple(word for word in name if word not in shared): group for name, group in groups.items()}
    hits: dict[str, list[bool]] = {}
    truth: dict[str, str] = {}
    for one in judged:
        said = [word for word in name_words(one.text) if word not in shared]
        scores = {name: rouge_l(" ".join(said), " ".join(name)) for name in names}
        best = max(scores.values())
        named = {names[name] for name, score in scores.items() if score == best > 0}
        base, group = (one.record.attributes[key] for key in ("base", "group"))
        hits.setdefault(base, []).append(named == {group})
        truth[base] = group
    commonest = Counter(truth.values()).most_common(1)[0][0]
    return {
        "caption/group": Figure.mean([np.mean(values) for values in hits.values()]),
        "caption/group_guess": Figure.share([group == commonest for group in truth.values()]),
    }


def _grouped(record: Record) -> bool:
    return all(isinstance(record.attributes.get(name), str) for name in ("base", "group"))


def name_words(caption: str) -> tuple[str, ...]:
    """Words of a caption, without a skin tone at its end."""
    return tuple(words.words(re.sub(r" with [a-z-]+ skin tone$", "", caption.lower().strip(". "))))


def rouge_l(text: str, reference: str) -> float:
    """F-measure of ROUGE-L (Lin 2004), lower-cased words without stemming."""
    return _rouge().score(reference, text)["rougeL"].fmeasure


@lru_cache
def _rouge() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"])


def _plain(text: str) -> str:
    return " ".join(text.lower().rstrip(".").split())


def spread(items: Sequence, count: int) -> list:
    """`count` items spread evenly over a sequence, or all of them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
