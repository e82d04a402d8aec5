"""Questions about videos: the files of public sets, questions about the clips of built-in worlds, and right answers.

May hold where questions come from, the rules by which an answer counts, and the measure; who answers is any function.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from g4v_jax.data.fetch import GROUPS
from g4v_jax.data.records import SPLITS, Record
from g4v_jax.data.world.attributes import HAZARDS, VALUES, WORDS
from g4v_jax.data.world.phrases import motion_phrases
from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure

PROMPT = "{question} Answer with one word or a short phrase."
RULES = 1  # version of `normalise`; raise it when an answer may count otherwise
CHUNK = 64  # questions asked at once


@dataclass(frozen=True)
class Question:
    """One question about one video."""

    id: str
    video: str  # the video file's name without its ending, or the id of the record
    question: str
    answer: str
    kind: str  # figures are given for each kind
    also: tuple[str, ...] = ()  # other answers that count


# Public sets

# Questions of ActivityNet-QA by the numbers of their "type" (Yu et al. 2019).
ACTIVITYNET_KINDS = ("motion", "space", "time", "yes-no", "colour", "object", "location", "number", "other")
_AUXILIARIES = frozenset(  # "ca" and "wo": of can't and won't
    "is are was were am do does did can ca could has have had will wo would should may might must".split()
)
_ASKING = {"whom": "who", "whose": "who", "what's": "what", "who's": "who", "where's": "where"}
_ASKING |= {word: word for word in ("what", "who", "where", "when", "which", "why", "how")}


def kind_of(question: str) -> str:
    """Kind of a question by its words: "yes-no" where an auxiliary comes first, else its first question word, else
    "other". "how many" is a kind of its own beside "how".
    """
    tokens = re.findall(r"[a-z']+", question.lower().replace("’", "'"))
    if tokens and tokens[0].removesuffix("n't") in _AUXILIARIES:
        return "yes-no"
    for token, following in zip(tokens, [*tokens[1:], ""]):
        if token in _ASKING:
            return "how many" if (token, following) == ("how", "many") else _ASKING[token]
    return "other"


def read_msvd_qa(path: str | Path, mapping: str | Path) -> list[Question]:
    """MSVD-QA (Xu et al. 2017): a list of {"id", "video_id", "question", "answer"}, and youtube_mapping.txt, whose
    lines "name vidN" name the video file of `video_id` N. Kinds are those of `kind_of`.

    Raises UserError, naming file and entry, for one that is malformed or has no answer, an id that comes twice, and a
    video that the mapping lacks.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(_read(mapping).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not re.fullmatch(r"vid\d+", parts[1]):
            raise UserError(f"{mapping}:{number}: expected a line 'name vidN', found {line[:80]!r}")
        if parts[1] in names:
            raise UserError(f"{mapping}:{number}: a second video for {parts[1]}; keep one of them")
        names[parts[1]] = _stem(parts[0], f"{mapping}:{number}")

    def stem(row: dict, where: str) -> str:
        key = f"vid{_id(row, 'video_id', where)}"
        if key not in names:
            raise UserError(f"{where}: {key} is not in {mapping}; give the mapping that belongs to these questions")
        return names[key]

    return _questions(path, stem)


def read_msrvtt_qa(path: str | Path) -> list[Question]:
    """MSRVTT-QA (Xu et al. 2017): a list of {"id", "video_id", "question", "answer", "category_id"}; the video file of
    `video_id` N is "videoN". Kinds are those of `kind_of`.

    Raises UserError, naming file and entry, for one that is malformed or has no answer, and an id that comes twice.
    """
    return _questions(path, lambda row, where: _stem(f"video{_id(row, 'video_id', where)}", where))


def read_activitynet_qa(questions: str | Path, answers: str | Path) -> list[Question]:
    """ActivityNet-QA (Yu et al. 2019): a list of {"question_id", "video_name", "question"}, and one of {"question_id",
    "answer", "type"}; the video file of a `video_name` is "v_" and that name. Kinds are ACTIVITYNET_KINDS.

    Raises UserError, naming file and entry, for one that is malformed, an id that comes twice, a question without an
    answer, and an answer without a question.
    """
    known: dict[str, tuple[str, str]] = {}
    for row, where in _entries(answers):
        key, number = _id(row, "question_id", where), row.get("type")
        if type(number) is not int or not 0 <= number < len(ACTIVITYNET_KINDS):
            raise UserError(f"{where}: 'type' must be a number from 0 to {len(ACTIVITYNET_KINDS) - 1}, not {number!r}")
        if key in known:
            raise UserError(f"{where}: a second answer to question {key!r}; keep one of them")
        known[key] = _text(row, "answer", where), ACTIVITYNET_KINDS[number]
    found: dict[str, Question] = {}
    for row, where in _entries(questions):
        key = _id(row, "question_id", where)
        if key not in known:
            raise UserError(f"{where}: question {key!r} has no answer in {answers}; give the file that belongs to it")
        name = _stem(f"v_{_text(row, 'video_name', where)}", where)
        _add(found, Question(key, name, _text(row, "question", where), *known[key]), where)
    if extra := sorted(known.keys() - found.keys()):
        raise UserError(f"{answers}: {len(extra)} answers without a question in {questions}; the first: {extra[0]!r}")
    return list(found.values())


def _questions(path: str | Path, stem: Callable[[dict, str], str]) -> list[Question]:
    found: dict[str, Question] = {}
    for row, where in _entries(path):
        asked, answer = _text(row, "question", where), _text(row, "answer", where)
        _add(found, Question(_id(row, "id", where), stem(row, where), asked, answer, kind_of(asked)), where)
    return list(found.values())


def _add(found: dict[str, Question], one: Question, where: str) -> None:
    if found.setdefault(one.id, one) is not one:
        raise UserError(f"{where}: a second question {one.id!r}; keep one of them")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _entries(path: str | Path) -> Iterator[tuple[dict, str]]:
    try:
        rows = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of entries {{...}} that is not empty")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {index}: expected an object {{...}}, found {type(row).__name__}")
        yield row, f"{path}: entry {index}"


def _text(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name!r} must be a text that is not empty, not {value!r}")
    return value.strip()


def _id(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if type(value) not in (int, str) or not str(value).strip():
        raise UserError(f"{where}: {name!r} must be a number or a name, not {value!r}")
    return str(value).strip()


def _stem(name: str, where: str) -> str:
    if re.search(r"[/\\\0]|^\.", name):
        raise UserError(f"{where}: video {name!r} must be a file's name without folders")
    return name


# Built-in worlds

# The phrasings of a split are its own; those for tuning and testing are made of words that training's have.
_OPEN = {
    "train": {
        "shape": ("What shape is it?", "Which shape do you see?", "Tell me the shape."),
        "colour": ("What colour is it?", "Which colour do you see?", "Tell me the colour."),
        "size": ("Is it small or large?", "What size is it, small or large?", "Tell me the size: small or large."),
        "motion": ("Which way does it move, or is it still?", "Tell me where it does go, or if it is still."),
        "group": ("Which group does it belong to: {choices}?", "Tell me the group, one of these: {choices}."),
        "tone": ("Which skin tone does it have?", "Tell me the skin tone."),
    },
    "validation": {
        "shape": ("Tell me which shape it is.",),
        "colour": ("Tell me which colour it is.",),
        "size": ("Tell me if it is small or large.",),
        "motion": ("Tell me which way it does move, or if it is still.",),
        "group": ("Tell me which group it is, one of these: {choices}.",),
        "tone": ("Tell me which skin tone it does have.",),
    },
    "test": {
        "shape": ("What is the shape?", "Which shape is it?"),
        "colour": ("What is the colour?", "Which colour is it?"),
        "size": ("Which size is it, small or large?", "What do you see, is it small or large?"),
        "motion": ("Which way does it go, or is it still?", "Is it still, or where does it move?"),
        "group": ("What group is it: {choices}?", "To which of these does it belong: {choices}?"),
        "tone": ("What is the skin tone?", "Which skin tone do you see?"),
    },
}
_YES_NO = {
    "train": ("Is it {what}?", "Tell me if it is {what}, yes or no.", "Do you see that it is {what}?"),
    "validation": ("Yes or no, is it {what}?",),
    "test": ("Is it {what}, yes or no?", "Tell me yes or no: is it {what}?"),
}
_WHAT = {"shape": "a {}", "colour": "{}", "size": "{}", "motion": "moving {}", "group": "in the group {}"}


def world_questions(record: Record, split: str) -> list[Question]:
    """Questions about a clip of a built-in world or an emoji, from its attributes, in the phrasings of a split.

    An open question for each attribute, its kind, and two questions of kind "yes-no" about one of the attributes, one
    with its value and one with another, so that yes and no are as frequent, and where values are evenly distributed,
    for every wording alike. What is drawn (phrasing, attribute, other value) hangs on the bytes of the clip and the
    split alone. Synonyms count. [] for hazards, which a model must not describe, and clips of other worlds.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
    if record.hazard:
        return []
    if record.attributes.keys() == VALUES.keys():
        values = {name: record.attributes[name] for name in VALUES}
        choices = {name: [value for value in some if value not in HAZARDS] for name, some in VALUES.items()}
    elif record.attributes.keys() == {"base", "tone", "group"}:
        values = {name: record.attributes[name] for name in ("group", "tone") if record.attributes[name]}
        choices = {"group": list(GROUPS)}
    else:
        return []

    def draw(some: Sequence, purpose: str):
        seed = f"{record.sha256[0] if record.sha256 else record.id}\0{split}\0{purpose}"
        return some[int(hashlib.sha256(seed.encode()).hexdigest(), 16) % len(some)]

    def ask(name: str, text: str, answer: str, kind: str, also: Sequence[str] = ()) -> Question:
        return Question(f"{record.id}/{name}", record.id, text, answer, kind, tuple(also))

    found = []
    for name, value in values.items():
        text = draw(_OPEN[split][name], name).format(choices="; ".join(choices.get(name, ())))
        found.append(ask(name, text, value, name, _synonyms(name, value)))
    name = draw([name for name in values if name in choices], "yes-no")
    other = draw([value for value in choices[name] if value != values[name]], "other")
    for answer, value in (("yes", values[name]), ("no", other)):
        what = "standing still" if value == "still" else _WHAT[name].format(value)
        found.append(ask(answer, draw(_YES_NO[split], answer).format(what=what), answer, "yes-no"))
    return found


def _synonyms(name: str, value: str) -> list[str]:
    if name == "motion":  # "moves to the left", "moving to the left", "to the left"
        phrases = [phrase for pair in motion_phrases(value) for phrase in pair]
        return list(dict.fromkeys([*phrases, *(phrase.partition(" ")[2] or phrase for phrase in phrases)]))
    if name == "tone":
        return [value.removesuffix(" skin tone")]
    return list(WORDS.get(name, {}).get(value, ()))


# Right answers

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


# The measure


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
