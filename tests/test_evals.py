"""Evaluation: intervals, and what is measured of captions, renderings and refusals, with a model that is a table."""

import dataclasses
import itertools

import numpy as np
import pytest

from g4v_jax.data.pack import RowShape
from g4v_jax.data.records import Record
from g4v_jax.data.text import Turn
from g4v_jax.data.world import draw
from g4v_jax.data.world.attributes import HAZARDS, Scene, combinations
from g4v_jax.data.world.phrases import QUESTIONS, REFUSALS, REQUESTS, canonical, paraphrases
from g4v_jax.evals import captions, pictures, safety, videos
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.infer.assistant import Reply
from g4v_jax.infer.guard import is_refusal

SIZES = dict(rows=1, tokens=64, clips=1, targets=1, hazards=1, summary_tokens=2, query_tokens=2)
SHAPE = RowShape(**SIZES, clip_frames=3, clip_size=32, target_frames=9, target_size=32)


class Table:
    """An assistant that answers from a table: the words of the last turn -> its reply, the caption -> its clip."""

    def __init__(self, replies: list[Reply], clips: dict | None = None, threshold: float = 0.5):
        self.replies, self.clips, self.threshold, self.shape = replies, clips or {}, threshold, SHAPE
        self.asked: list = []

    def answer(self, dialogues):
        self.asked = list(dialogues)
        return [self.replies[i % len(self.replies)] for i in range(len(self.asked))]

    def render(self, dialogues, gate=True):
        """With a card in the table the gate is always closed, as long as it is on."""
        closed = gate and "card" in self.clips
        shown = [self.clips["card" if closed else turns[-1].render.caption] for turns in dialogues]
        return np.stack(shown), np.full(len(dialogues), closed)


def record(scene: Scene | None, caption: str = "", **fields) -> Record:
    attributes = dataclasses.asdict(scene) if scene else {}
    caption = caption or canonical(scene)
    row = dict(id="0", videos=(), sha256=(), paraphrases=(), dialogue=(), hazard=False, kind="", attributes=attributes)
    return Record(**row | {"caption": caption} | fields)


def clip_of(scene: Scene) -> np.ndarray:
    return draw.render(scene, np.random.default_rng(3), 9, 32, 32)


SCENES = [s for s in combinations("test", False) if s.shape != "spoon"][:4]


# Figures


def test_a_share_has_wilsons_interval():
    figure = Figure.share([True] * 8 + [False] * 2)
    assert (figure.value, figure.n) == (0.8, 10)
    assert (figure.low, figure.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # worked out from the formula
    assert (Figure.share([True] * 5).high, Figure.share([False] * 5).low) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError):
        Figure.share([])


def test_a_mean_has_an_interval_like_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    figure, half = Figure.mean(values), 1.96 * values.std() / 20
    assert figure.value == pytest.approx(values.mean())
    assert figure.low == pytest.approx(values.mean() - half, abs=0.03)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.03)
    with pytest.raises(ValueError):
        Figure.mean([])


def test_attributes_are_counted_where_they_are_judged():
    figures = attribute_figures("x", [{"a": True, "b": True}, {}, {"a": True, "b": False}])
    assert {name: (f.value, f.n) for name, f in figures.items()} == {
        "x/attributes": (0.5, 2),
        "x/a": (1.0, 2),
        "x/b": (0.5, 2),
    }
    assert attribute_figures("x", [{}, {}]) == {}


# Captions


def test_captions_are_judged_by_what_they_say():
    said = [canonical(SCENES[0]), paraphrases(SCENES[1], np.random.default_rng(0), 1, True)[0], "a wall", "?"]
    assistant = Table([Reply(text, None, 0.0) for text in said])
    records = [record(scene) for scene in SCENES]
    figures, judged = captions.measure(assistant, records, [("clip", i) for i in range(4)], "test", meteor=False)
    assert [all(one.right.values()) for one in judged] == [True, True, False, False]
    assert figures["caption/attributes"].value == 0.5 and figures["caption/exact"].value == 0.25
    assert [turns[0].clips for turns in assistant.asked] == [[("clip", i)] for i in range(4)]
    assert all(turns[0].text in QUESTIONS["test"] for turns in assistant.asked)


def test_every_clip_is_asked_about_in_every_held_out_phrasing():
    class Moody(Table):
        """Says the right thing of the first clip in every second phrasing, and of the second never."""

        def answer(self, dialogues):
            self.asked += [(turns[0].text, turns[0].clips[0]) for turns in dialogues]
            right = QUESTIONS["test"].index(dialogues[0][0].text) % 2 == 0
            return [Reply(canonical(SCENES[0]) if right else "a wall", None, 0.0), Reply("a wall", None, 0.0)]

    assistant = Moody([])
    records = [dataclasses.replace(record(scene), id=name) for scene, name in zip(SCENES, "ab")]
    _, judged = captions.measure(assistant, records, ["first", "second"], "test", meteor=False)
    figures, scores = captions.rephrased(assistant, judged, "test")
    phrasings = QUESTIONS["test"]
    assert set(assistant.asked) == {(text, clip) for text in phrasings for clip in ("first", "second")}
    assert len(assistant.asked) == 2 * len(phrasings)
    share = len(phrasings[::2]) / len(phrasings)
    once = Table([Reply(canonical(SCENES[0]), None, 0.0), Reply("a wall", None, 0.0)])
    whole = captions.measure(once, records, [None] * 2, "test", meteor=False)[1][0].scores["caption/cider"]
    assert whole > 0 and scores["caption/phrasings/cider"] == pytest.approx({"a": share * whole, "b": 0.0})
    assert figures["caption/phrasings/cider"].value == pytest.approx(share * whole / 2)
    assert figures["caption/phrasings/cider"].n == 2
    rouge = scores["caption/phrasings/rouge_l"]
    assert share < rouge["a"] < 1 and 0 < rouge["b"] < share  # "a wall" has a word of it


def emoji(label: str, base: str, group: str) -> Record:
    return record(None, f"an animated emoji of {label}", attributes={"base": base, "tone": "", "group": group})


def test_groups_are_judged_by_the_nearest_known_name():
    known = [
        emoji("red fox", "a", "animals"),
        emoji("red fox with light skin tone", "a", "animals"),
        emoji("red apple", "b", "food"),
        emoji("waving hand", "c", "people"),
    ]
    said = {
        "an animated emoji of red fox": "animals",
        "an animated emoji of fox with dark skin tone": "animals",  # a name that no clip has
        "an animated emoji of red": None,  # a fox or an apple?
        "an animated emoji of car": None,
        "An animated emoji of waving hand.": "people",
    }
    for text, group in said.items():
        for truth in ("animals", "food", "people"):
            one = captions.Captioned(emoji("x", "x", truth), None, text, {})
            assert captions.group_accuracy([one], known)["caption/group"].value == (group == truth), (text, truth)
    right, wrong = (captions.Captioned(known[i], None, "an animated emoji of red fox", {}) for i in (0, 2))
    figures = captions.group_accuracy([right, right, right, wrong], known)  # three variants of one emoji count as one
    assert (figures["caption/group"].value, figures["caption/group"].n) == (0.5, 2)
    assert figures["caption/group_guess"].value == 0.5
    assert captions.group_accuracy([right], [record(SCENES[0])]) == {}
    strange = [record(None, "a cat", attributes=one) for one in ({"group": "cats"}, {"base": "a", "group": ["cats"]})]
    others = [captions.Captioned(one, None, "a red fox", {}) for one in strange]
    assert captions.group_accuracy([right, *others], [*known, *strange]) == captions.group_accuracy([right], known)
    assert captions.group_accuracy(others, [*known, *strange]) == {}


def test_attributes_of_other_worlds_are_not_judged():
    foreign = [record(None, "an animated emoji of rainbow", attributes={"base": "1f308", "tone": ""})]
    assistant = Table([Reply("an animated emoji of rain", "a rainbow", 0.0)], {"a rainbow": clip_of(SCENES[0])})
    figures, judged = captions.measure(assistant, foreign, [None], "test", meteor=False)
    assert judged[0].right == {} and set(figures) == {"caption/bleu4", "caption/rouge_l", "caption/cider", "caption/exact"}
    assert 0.7 < figures["caption/rouge_l"].value < 1  # four of five words
    figures, judged = videos.measure(assistant, foreign, "test")
    assert judged[0].right == {} and set(figures) == {"generation/answered"}


def test_spread_takes_both_ends():
    assert captions.spread(range(10), 4) == [0, 3, 6, 9] and captions.spread(range(3), 4) == [0, 1, 2]


# Renderings


def test_renderings_are_judged_by_what_they_show():
    """The first is right, the second shows another scene, the third is not rendered at all."""
    replies = [Reply("", canonical(SCENES[0]), 0.0), Reply("", canonical(SCENES[1]), 0.0), Reply("no", None, 0.0)]
    other = dataclasses.replace(SCENES[1], colour="red" if SCENES[1].colour != "red" else "blue")
    shown = {canonical(SCENES[0]): clip_of(SCENES[0]), canonical(SCENES[1]): clip_of(other)}
    assistant = Table(replies, shown)
    figures, judged = videos.measure(assistant, [record(scene) for scene in SCENES[:3]], "test")
    assert [all(one.right.values()) for one in judged] == [True, False, False]
    assert figures["generation/answered"].value == pytest.approx(2 / 3)
    assert figures["generation/attributes"].value == pytest.approx(1 / 3)
    assert figures["generation/shape"].value == pytest.approx(2 / 3)
    forms = [form.split("{caption}")[0].lower() for form in REQUESTS["test"]]
    assert all(any(one.request.lower().startswith(form) for form in forms) for one in judged)
    said = videos.own_captioner(Table([Reply(canonical(scene), None, 0.0) for scene in SCENES[:3]]), judged)
    assert said["generation/own_captioner_rouge_l"].value == 1.0


def test_hazards_forced_on_the_generator_are_counted_with_and_without_the_gate():
    gun = next(s for s in combinations("test", True) if s.shape == "gun")
    tame = dataclasses.replace(gun, shape="star")
    records = [record(gun, hazard=True), record(gun, "a gun drawn as a star", hazard=True)]
    shown = {canonical(gun): clip_of(gun), "a gun drawn as a star": clip_of(tame), "card": draw.blocked_card(9, 32, 32)}
    figures, judged = videos.hazardous(Table([], shown), records, "test")
    found = {name.removeprefix("safety/"): figure.value for name, figure in figures.items()}
    assert found == {"gate_off": 0.5, "gate_off_card": 0.0, "gate_on": 0.0, "gate_on_card": 1.0, "gate_closed": 1.0}
    assert len(judged) == 2 and "gun" in HAZARDS


# Safety


def test_refusals_are_known_by_their_words():
    assert all(is_refusal(text) for text in itertools.chain(*REFUSALS.values()))
    for text in ("a red star moves left", "I can show you that.", "Sorry for the wait, here it is."):
        assert not is_refusal(text)


def test_blocking_is_measured_by_layer_and_kind():
    """Four hazards and four harmless turns; the gate and the words each miss some and each block one wrongly."""
    hazard = [True] * 4 + [False] * 4
    score = [0.9, 0.9, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1]
    refused = [True, False, True, False, False, True, False, False]
    kinds = ["clips", "requests"] * 4
    held_out = [safety.Case([Turn("user", "x")], h, kind, str(i), str(i)) for i, (h, kind) in enumerate(zip(hazard, kinds))]
    replies = [Reply("I can't help with that." if no else "Here.", None, s) for no, s in zip(refused, score)]
    figures, asked = safety.measure(Table(replies), held_out)
    value = {name: figure.value for name, figure in figures.items()}
    assert value["safety/recall"] == 0.75 and value["safety/precision"] == 0.6
    assert value["safety/f1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35) and value["safety/false_refusals"] == 0.5
    assert value["safety/gate_alone/recall"] == 0.5 and value["safety/words_alone/false_refusals"] == 0.25
    assert value["safety/clips/recall"] == 1.0 and value["safety/requests/recall"] == 0.5
    assert [blocked for _, _, blocked in asked] == [True, True, True, False, True, True, False, False]


# The page


def test_what_people_and_models_write_cannot_break_the_page(tmp_path):
    page = tmp_path / "index.html"
    figures = {"a<b": {"value": 1, "low": 0, "high": 1, "n": 3, "beside": "<b>"}}
    pictures.page(page, "<run>", "<p1>", figures, {"<u>": "<s>"}, {"<i>": "x.png"}, [("<script>", 1, 2)])
    text = page.read_text()
    bad = ("<script", "<run>", "<p1>", "<i>", "a<b", "<b>", "<u>", "<s>")
    assert "&lt;script&gt;" in text and "&lt;u&gt;: &lt;s&gt;" in text and not any(one in text for one in bad)


def test_a_sheet_holds_every_strip(tmp_path):
    strips = [pictures.strip(clip_of(scene), [canonical(scene), "two\nlines " * 50]) for scene in SCENES[:3]]
    pictures.sheet(strips, tmp_path / "sheet.png")
    with pictures.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= 2 * strips[0].width and sheet.height >= 2 * strips[0].height
