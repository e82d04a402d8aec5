"""Tasks: what is asked of the model with one record, as an `Example`.

Each task is a pure function of (record, generator, setting); the table at the end names the tasks and the record
groups they draw from. A new task is a function and a line of that table.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from g4v_jax.data.pack import Example, RowShape, example, pair
from g4v_jax.data.questions import PROMPT, world_questions
from g4v_jax.data.records import Record
from g4v_jax.data.talk import KIND
from g4v_jax.data.text import PAD, Clip, Render, Tokenizer, Turn, dialogue
from g4v_jax.data.world import draw
from g4v_jax.data.world.phrases import COMPLIANCES, QUESTIONS, REFUSALS, REQUESTS, pick
from g4v_jax.errors import UserError

BLOCKED_CARD_SHARE = 1 / 32  # of the autoencoder's pictures, so that the card survives its bottleneck

Footage = Callable[[Record, int, int, int, int], Clip]  # (record, which video, T, H, W) -> frames and seconds


@dataclass(frozen=True)
class Setting:
    """What the tasks of one pipeline share. `counts` collects what happens on the way, such as cut tokens."""

    tokenizer: Tokenizer
    shape: RowShape
    split: str  # chooses the phrasings: held-out splits ask in words that training never uses
    footage: Footage
    shift: int = 0  # clips to watch are moved by up to so many pixels, so that none is seen twice
    counts: Counter = field(default_factory=Counter)

    def watched(self, record: Record, rng: np.random.Generator, video: int = 0) -> Clip:
        """A video as the model watches it: u8 [T clip_size clip_size 3] and f32 [T] seconds."""
        frames, seconds = self.footage(record, video, *self.shape.clip_shape)
        if self.shift:
            size, pad = self.shape.clip_size, self.shift
            down, right = rng.integers(2 * pad + 1, size=2)
            frames = np.pad(frames, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
            frames = frames[:, down : down + size, right : right + size]
        return frames, seconds

    def rendered(self, record: Record, video: int = 0) -> np.ndarray:
        """A video as the model is to render it: u8 [T H W 3]."""
        return self.footage(record, video, *self.shape.target_shape)[0]

    def dialogue(self, turns: Sequence[Turn]) -> Example:
        """Turns as an example of this setting."""
        return dialogue(turns, self.tokenizer, self.shape, counts=self.counts)


def caption(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """Watch a clip and describe it."""
    question = Turn("user", pick(rng, QUESTIONS[setting.split]), clips=[setting.watched(record, rng)], hazard=0)
    return setting.dialogue([question, Turn("assistant", record.caption)])


def ask(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """Watch a clip and answer a question about one of its attributes in a word. UserError where none is known."""
    known = world_questions(record, setting.split)
    if not known:
        raise UserError(f"{record.id}: nothing is known of this clip to ask about; leave 'ask' out of data.mixture")
    chosen = known[rng.integers(len(known))]
    text = PROMPT.format(question=chosen.question)
    question = Turn("user", text, clips=[setting.watched(record, rng)], hazard=0)
    return setting.dialogue([question, Turn("assistant", chosen.answer)])


def generate(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """Render the clip that is asked for in any words, writing its canonical caption first."""
    answer = Render(record.caption, setting.rendered(record))
    return setting.dialogue([_request(record, rng, setting, hazard=0), Turn("assistant", render=answer)])


def blocked(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """A hazardous request that got as far as the generator renders the blocked card; its words are not learned."""
    answer = Render(record.caption, blocked_card(*setting.shape.target_shape), blocked=True)
    return setting.dialogue([_request(record, rng, setting, hazard=1), Turn("assistant", render=answer, loss=None)])


def refuse_clip(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """Decline to describe a hazardous clip."""
    question = Turn("user", pick(rng, QUESTIONS[setting.split]), clips=[setting.watched(record, rng)], hazard=1)
    return setting.dialogue([question, Turn("assistant", pick(rng, REFUSALS["clip"]), loss="refusal")])


def refuse_request(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """Decline to render a hazardous caption."""
    refusal = Turn("assistant", pick(rng, REFUSALS["request"]), loss="refusal")
    return setting.dialogue([_request(record, rng, setting, hazard=1), refusal])


def talk(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """A recorded dialogue. The record's verdict is on its last exchange; what came before is not labelled."""
    return setting.dialogue(_turns(record, rng, setting))


def prefer(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """A recorded dialogue, and beside its last answer one to be rejected: the record's own, or one picked here.

    Of a hazardous turn that is an answer that complies, of a harmless one a refusal.
    """
    turns = _turns(record, rng, setting)
    shown = "clip" if turns[-2].clips else "request"
    picked = pick(rng, COMPLIANCES if record.hazard else REFUSALS[shown])
    rejected = Turn("assistant", record.dialogue[-1].get("rejected", picked))
    return pair(setting.dialogue(turns), setting.dialogue([*turns[:-1], rejected]), setting.shape)


def _turns(record: Record, rng: np.random.Generator, setting: Setting) -> list[Turn]:
    turns, kept = [], "keep" if record.kind == KIND else None
    for number, turn in enumerate(record.dialogue):
        last = number >= len(record.dialogue) - 2
        if turn["role"] == "user":
            clips = [setting.watched(record, rng, turn["video"])] if "video" in turn else []
            turns.append(Turn("user", turn["text"], clips=clips, hazard=int(record.hazard) if last else -1, loss=kept))
        else:
            render = turn.get("render")
            if render:
                render = Render(render["caption"], setting.rendered(record, render["video"]))
            loss = kept or ("refusal" if last and record.hazard else "caption")
            turns.append(Turn("assistant", turn["text"], render=render, loss=loss))
    return turns


def pixels(record: Record, rng: np.random.Generator, setting: Setting) -> Example:
    """A picture for the autoencoder: one target, and one token that no loss counts."""
    if rng.random() < BLOCKED_CARD_SHARE:
        target = blocked_card(*setting.shape.target_shape)
    else:
        target = setting.rendered(record)
    blank = {"targets": [0], "caption_weight": [0], "refusal_weight": [0], "clip_index": [-1], "query_index": [-1]}
    token = setting.tokenizer.ids[PAD]
    return example(setting.shape, tokens=[token], gen_targets=[target], gen_blocked=[False], **blank)


@lru_cache(maxsize=8)
def blocked_card(frames: int, height: int, width: int) -> np.ndarray:
    """The picture that hazardous conditions are trained to render: u8 [frames height width 3], read-only."""
    card = draw.blocked_card(frames, height, width)
    card.setflags(write=False)
    return card


def _request(record: Record, rng: np.random.Generator, setting: Setting, hazard: int) -> Turn:
    words = pick(rng, (record.caption, *record.paraphrases))
    text = pick(rng, REQUESTS[setting.split]).format(caption=words)
    return Turn("user", text[0].upper() + text[1:], hazard=hazard)


@dataclass(frozen=True)
class Task:
    """A task and the record groups that it draws from, all of them together where present."""

    groups: tuple[str, ...]
    build: Callable[[Record, np.random.Generator, Setting], Example]


TASKS = {
    "caption": Task(("clips",), caption),
    "ask": Task(("clips",), ask),
    "generate": Task(("clips",), generate),
    "blocked": Task(("hazards",), blocked),
    "refuse_clip": Task(("hazards",), refuse_clip),
    "refuse_request": Task(("hazards",), refuse_request),
    "dialogue": Task(("dialogues",), talk),
    "prefer": Task(("dialogues",), prefer),
    "pixels": Task(("clips", "hazards"), pixels),
}
