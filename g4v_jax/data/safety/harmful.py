"""Published sets of harmful requests: how each is read, and how they are split so that nothing is asked in two splits.

May hold the reading of the sets, near duplicates and splits. Nothing here answers a request.

AdvBench (Zou et al. 2023, MIT) is what is learned from; HarmBench's standard text behaviours (Mazeika et al. 2024, MIT)
and Do-Not-Answer (Wang et al. 2023; not for commercial use) are only ever in the test split.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from g4v_jax.data import sources
from g4v_jax.data.folder import split_of
from g4v_jax.errors import UserError

NEAR = 0.6  # share of words in common (Jaccard) from which two requests count as one
COMMON = frozenset("a an the of for to and or in on at how i do can what is are write give me create provide that".split())


@dataclass(frozen=True)
class Request:
    """A request, the set that it comes from, and the split that it belongs to."""

    text: str
    origin: str  # "advbench", "harmbench", "do-not-answer"
    split: str


LICENCES = {"advbench": "MIT", "harmbench": "MIT", "do-not-answer": "CC BY-NC-SA 4.0, evaluation only"}


def read(archives: Path) -> list[Request]:
    """All requests, without exact duplicates, AdvBench's split 80 : 10 : 10 by clusters of near duplicates.

    A cluster that holds a request of another set belongs to the test split whole. Raises what `sources.bring_file` raises, and
    UserError where a file is not what it was.
    """
    texts: dict[str, str] = {}
    for origin, found in (
        ("harmbench", _lines(sources.bring_file(sources.HARMBENCH, archives))),
        ("do-not-answer", [t for file in sources.DO_NOT_ANSWER for t in _prompts(sources.bring_file(file, archives))]),
        ("advbench", _seeds(sources.bring_file(sources.ADVBENCH, archives))),
    ):
        known = {plain(text) for text in texts}
        for text in found:
            if plain(text) not in known:
                known.add(plain(text))
                texts[text] = origin
    requests = []
    for cluster in clusters(list(texts)):
        foreign = any(texts[text] != "advbench" for text in cluster)
        split = "test" if foreign else split_of(plain(min(cluster)))
        requests += [Request(text, texts[text], split) for text in cluster]
    return requests


def clusters(texts: Sequence[str], near: float = NEAR) -> list[list[str]]:
    """Texts joined where two have at least `near` of their words in common, in the order of their first members."""
    owner = list(range(len(texts)))

    def root(i: int) -> int:
        while owner[i] != i:
            owner[i] = owner[owner[i]]
            i = owner[i]
        return i

    for i, j in near_pairs(texts, texts, near):
        if i < j:
            first, second = sorted((root(i), root(j)))
            owner[second] = first
    groups: dict[int, list[str]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(root(i), []).append(text)
    return list(groups.values())


def near_pairs(left: Sequence[str], right: Sequence[str], near: float = NEAR) -> Iterable[tuple[int, int]]:
    """Places (i, j) of texts that have at least `near` of their words in common, words that say nothing left out."""
    bags = [frozenset(words(text)) for text in right]
    holders: dict[str, list[int]] = {}
    for j, bag in enumerate(bags):
        for word in bag:
            holders.setdefault(word, []).append(j)
    for i, text in enumerate(left):
        bag = frozenset(words(text))
        shared: dict[int, int] = {}
        for word in bag:
            for j in holders.get(word, ()):
                shared[j] = shared.get(j, 0) + 1
        yield from ((i, j) for j, n in sorted(shared.items()) if n >= near * (len(bag) + len(bags[j]) - n))


def words(text: str) -> list[str]:
    """The words of a text that carry meaning, lower-cased."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in COMMON]


def plain(text: str) -> str:
    """A text without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _seeds(path: Path) -> list[str]:
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [" ".join(seed["value"].split()) for seed in held["seeds"]]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a set of requests ({error}); remove it and try again") from error


def _lines(path: Path) -> list[str]:
    return [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _prompts(path: Path) -> list[str]:
    return [" ".join(json.loads(line)["prompt"].split()) for line in _lines(path)]
