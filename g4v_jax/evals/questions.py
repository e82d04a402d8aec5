"""Answers to questions about videos: which of them count as right, and the measure.

May hold the rules by which an answer counts, and the figures; who answers is any function.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from g4v_jax.data.questions import PROMPT, Question
from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure

RULES = 1  # version of `normalise`; raise it when an answer may count otherwise
CHUNK = 64  # questions asked at once

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
_NUMBERS += "fifteen sixteen seventeen eighteen nineteen twenty".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}


def exact(text: str, answer: str) -> bool:
    """Whether a text is the answer letter by letter, but for white space around it."""
    return text.strip() == answer.strip()


def rule_normalised(text: str, answer: str) -> bool:
    """Whether a text is the answer once both are normalised. Where the answer is yes or no, the text's first word is
    compared, so that "No, it is red." is a no. Where nothing is left of an answer ("the"), case alone is ignored.
    """
    said, wanted = normalise(text), normalise(answer)
    if not wanted:
        return text.strip().lower() == answer.strip().lower()
    return (said.split(" ")[0] if wanted in ("yes", "no") else said) == wanted


def normalise(text: str) -> str:
    """A text as answers are compared, after the rules of the VQA evaluation (Antol et al. 2015): lower case; no
    articles and no punctuation but points between digits; number words to twenty as digits, "none" as 0; contractions
    without their apostrophe, so that "dont" is "don't"; single spaces.
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = re.sub("['’]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_", " ", text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)



@dataclass(frozen=True)
class Asked:
    """One judged answer."""

    question: Question
    text: str
    exact: bool
    right: bool  # by `rule_normalised`


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    figures: dict[str, Figure]
    asked: list[Asked] = field(repr=False)
    prompts: dict[str, str | int]  # what was asked, to be stored with the figures
    each: dict[str, dict[str, float]] = field(repr=False)  # figure -> question's id -> 0 or 1
    videos: dict[str, str] = field(repr=False)  # question's id -> its video


def measure(
    answer: Callable[[list[tuple[Any, str]]], Sequence[str]],
    questions: Sequence[Question],
    clip: Callable[[str], Any],
    prefix: str = "qa",
    prompt: str = PROMPT,
) -> Measured:
    """Ask every question once, with the clip that `clip(question.video)` gives.

    `answer` takes (clip, text) pairs, CHUNK at most, and gives a text for each. Figures: "{prefix}/exact",
    "{prefix}/accuracy" (by `rule_normalised`), "{prefix}/accuracy/{kind}", and "{prefix}/guess", the accuracy of always
    giving the commonest answer of the question's kind. n counts questions; intervals are of resampled videos, since
    questions about one video are no samples of their own.

    Raises UserError without questions, for ids that come twice and a prompt without {question}; ValueError where
    `answer` gives another number of texts.
    """
    if not questions:
        raise UserError(f"{prefix}: no questions to ask; give a set that has some")
    if "{question}" not in prompt:
        raise UserError(f"{prefix}: the prompt {prompt!r} has no {{question}} in it; say where the question goes")
    if repeated := [key for key, times in Counter(q.id for q in questions).items() if times > 1]:
        raise UserError(f"{prefix}: question {repeated[0]!r} comes more than once; give each an id of its own")
    prompts = [prompt.replace("{question}", q.question) for q in questions]
    texts: list[str] = []
    for start in range(0, len(questions), CHUNK):
        part = questions[start : start + CHUNK]
        clips = {video: clip(video) for video in dict.fromkeys(q.video for q in part)}
        pairs = [(clips[q.video], text) for q, text in zip(part, prompts[start:])]
        said = list(answer(pairs))
        if len(said) != len(pairs):
            raise ValueError(f"{len(said)} answers to {len(pairs)} questions")
        texts += said
    asked = [_judged(q, text) for q, text in zip(questions, texts)]
    videos = [q.video for q in questions]
    right = [one.right for one in asked]
    kinds = {kind: [i for i, q in enumerate(questions) if q.kind == kind] for kind in {q.kind for q in questions}}
    answers = [normalise(q.answer) for q in questions]
    guess = {kind: Counter(answers[i] for i in rows).most_common(1)[0][0] for kind, rows in kinds.items()}
    figures = {
        f"{prefix}/exact": accuracy([one.exact for one in asked], videos),
        f"{prefix}/accuracy": accuracy(right, videos),
        f"{prefix}/guess": accuracy([said == guess[q.kind] for said, q in zip(answers, questions)], videos),
    }
    for kind, rows in sorted(kinds.items()):
        figures[f"{prefix}/accuracy/{kind}"] = accuracy([right[i] for i in rows], [videos[i] for i in rows])
    told = json.dumps([[q.id, q.video, text, q.answer, q.also] for q, text in zip(questions, prompts)])
    record = {"prompt": prompt, "rules": RULES, "questions": len(questions)}
    record["fingerprint"] = hashlib.sha256(told.encode()).hexdigest()
    each = {f"{prefix}/exact": {one.question.id: float(one.exact) for one in asked}}
    each[f"{prefix}/accuracy"] = {one.question.id: float(one.right) for one in asked}
    return Measured(figures, asked, record, each, {q.id: q.video for q in questions})


def accuracy(hits: Sequence[bool], videos: Sequence[str]) -> Figure:
    """Share of hits, n of them, with an interval over resampled videos (percentile bootstrap).

    Wilson's interval for the number of videos where bootstrap has none: all hits, or no hit.
    """
    places = {video: place for place, video in enumerate(dict.fromkeys(videos))}
    rows = [places[video] for video in videos]
    right, asked = np.bincount(rows, hits), np.bincount(rows)
    if right.sum() in (0, len(hits)):
        figure = Figure.share([right.sum() > 0] * len(places))
    else:
        figure = Figure.bootstrap(lambda chosen: float(right[chosen].sum() / asked[chosen].sum()), len(places))
    return replace(figure, n=len(hits))


def _judged(question: Question, text: str) -> Asked:
    hits = [(exact(text, answer), rule_normalised(text, answer)) for answer in (question.answer, *question.also)]
    return Asked(question, text, *map(any, zip(*hits)))
