"""Questions about the clips of built-in worlds and emoji, with their answers, from what is known of each clip.

May hold the form of a question, and the wordings; what a model answers is judged in `evals/questions.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from g4v_jax.data.fetch import GROUPS
from g4v_jax.data.records import SPLITS, Record
from g4v_jax.data.world.attributes import HAZARDS, VALUES, WORDS
from g4v_jax.data.world.phrases import motion_phrases

PROMPT = "{question} Answer with one word or a short phrase."


@dataclass(frozen=True)
class Question:
    """One question about one video."""

    id: str
    video: str  # the video file's name without its ending, or the id of the record
    question: str
    answer: str
    kind: str  # figures are given for each kind
    also: tuple[str, ...] = ()  # other answers that count


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
    known = record.attributes.get
    if record.attributes.keys() == VALUES.keys() and all(known(name) in some for name, some in VALUES.items()):
        values = {name: record.attributes[name] for name in VALUES}
        choices = {name: [value for value in some if value not in HAZARDS] for name, some in VALUES.items()}
    elif record.attributes.keys() == {"base", "tone", "group"} and known("group") in GROUPS and isinstance(known("tone"), str):
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
