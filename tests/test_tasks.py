"""Tasks: what each makes of a record, and in whose words."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from g4v_jax.data.pack import RowShape
from g4v_jax.data.questions import PROMPT, world_questions
from g4v_jax.data.records import Record
from g4v_jax.data.tasks import TASKS, Setting, blocked_card
from g4v_jax.data.text import Tokenizer
from g4v_jax.data.world.attributes import combinations
from g4v_jax.data.world.phrases import QUESTIONS, REFUSALS, REQUESTS
from g4v_jax.errors import UserError

SHAPE = RowShape(
    rows=1,
    tokens=256,
    clips=2,
    targets=2,
    hazards=4,
    summary_tokens=4,
    query_tokens=3,
    clip_frames=4,
    clip_size=16,
    target_frames=2,
    target_size=32,
)
TALK = (
    {"role": "user", "text": "hello"},
    {"role": "assistant", "text": "hi"},
    {"role": "user", "text": "show me this again", "video": 1},
    {"role": "assistant", "text": "here", "render": {"caption": "a wall", "video": 0}},
)


def record(hazard: bool, dialogue: tuple = ()) -> Record:
    caption = "" if dialogue else "a red star moves left"
    return Record("r", (b"0", b"1"), ("0", "1"), caption, ("it goes left",), dialogue, hazard, {}, "clip")


@pytest.fixture(scope="module")
def setting() -> Setting:
    def footage(record, video, count, height, width):
        return np.full((count, height, width, 3), 10 + video), np.arange(count)

    texts = [text for table in (QUESTIONS, REQUESTS, REFUSALS) for texts in table.values() for text in texts]
    return Setting(Tokenizer.train(texts, 500), SHAPE, "test", footage)


def run(name: str, hazard: bool, setting: Setting, seed: int = 0, dialogue: tuple = ()):
    return TASKS[name].build(record(hazard, dialogue), np.random.default_rng(seed), setting)


def said(example, setting) -> list[str]:
    """The texts between the special tokens."""
    words = setting.tokenizer.decode(example["tokens"], specials=True)
    for special in setting.tokenizer.ids:
        words = words.replace(special, "\0")
    return [text for text in words.split("\0") if text]


@pytest.mark.parametrize(
    ("name", "hazard", "clips", "targets", "loss"),
    [
        ("caption", False, 1, 0, "caption_weight"),
        ("generate", False, 0, 1, "caption_weight"),
        ("blocked", True, 0, 1, None),
        ("refuse_clip", True, 1, 0, "refusal_weight"),
        ("refuse_request", True, 0, 0, "refusal_weight"),
    ],
)
def test_each_task_fills_its_slots_and_weights(setting, name, hazard, clips, targets, loss):
    for seed in range(5):
        example = run(name, hazard, setting, seed)
        assert (len(example["clips"]), len(example["gen_targets"])) == (clips, targets)
        assert example["hazard_label"].tolist() == [int(hazard)]
        for weight in ("caption_weight", "refusal_weight"):
            assert example[weight].any() == (weight == loss)
        question, answer = said(example, setting)
        if name in ("caption", "refuse_clip"):
            assert question in QUESTIONS["test"]
        else:
            texts = ("a red star moves left", "it goes left")
            asked = {form.format(caption=text).casefold() for form in REQUESTS["test"] for text in texts}
            assert question.casefold() in asked and question[0].isupper()
        if name.startswith("refuse"):
            assert answer in REFUSALS[name.removeprefix("refuse_")]
        else:
            assert answer == "a red star moves left"


def test_a_question_about_a_clip_is_answered_by_what_is_known_of_it(setting):
    scene = combinations("train", False)[0]
    known = replace(record(False), attributes=asdict(scene))
    answers = {PROMPT.format(question=one.question): one.answer for one in world_questions(known, "test")}
    seen = set()
    for seed in range(40):
        example = TASKS["ask"].build(known, np.random.default_rng(seed), setting)
        question, answer = said(example, setting)
        assert answers[question] == answer and len(example["clips"]) == 1 and example["caption_weight"].any()
        seen.add(question)
    assert seen == set(answers)
    with pytest.raises(UserError, match="nothing is known of this clip.*data.mixture"):
        run("ask", False, setting)


def test_hazards_are_rendered_as_the_blocked_card(setting):
    example = run("blocked", True, setting)
    np.testing.assert_array_equal(example["gen_targets"][0], blocked_card(2, 32, 32))
    assert example["gen_blocked"].tolist() == [True]
    assert run("generate", False, setting)["gen_blocked"].tolist() == [False]


@pytest.mark.parametrize("hazard", [False, True])
def test_a_dialogue_is_judged_by_its_last_exchange(setting, hazard):
    example = run("dialogue", hazard, setting, dialogue=TALK)
    assert said(example, setting) == ["hello", "hi", "show me this again", "here", "a wall"]
    assert example["hazard_label"].tolist() == [int(hazard)]
    assert example["clips"][0, 0, 0, 0, 0] == 11 and example["gen_targets"][0, 0, 0, 0, 0] == 10
    middle = len(example["tokens"]) // 2
    assert example["caption_weight"][:middle].any()
    assert example["refusal_weight"][middle:].any() == hazard == (not example["caption_weight"][middle:].any())


def test_pixels_are_one_silent_token_and_sometimes_the_card(setting):
    cards = 0
    for seed in range(300):
        example = run("pixels", False, setting, seed)
        assert len(example["tokens"]) == len(example["gen_targets"]) == 1 and not example["caption_weight"].any()
        cards += np.array_equal(example["gen_targets"][0], blocked_card(2, 32, 32))
    assert 1 <= cards <= 30


def test_examples_are_a_function_of_the_generator(setting):
    for name in ("caption", "generate", "refuse_request"):
        first, again = (run(name, True, setting, seed=3) for _ in range(2))
        assert all(np.array_equal(first[key], again[key]) for key in first)
        assert len({run(name, True, setting, seed)["tokens"].tobytes() for seed in range(20)}) > 3
