"""Video questions: public layouts and their faults, right answers, and questions about built-in worlds."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest

from g4v_jax.data.questions import Question, world_questions
from g4v_jax.data.records import Record
from g4v_jax.data.world.attributes import HAZARDS, Scene, combinations
from g4v_jax.errors import UserError
from g4v_jax.evals import question_sets
from g4v_jax.evals import questions as qa
from g4v_jax.evals.figures import Figure

MSVD = [
    {"answer": "man", "id": 7, "question": "who plays the guitar?", "video_id": 2},
    {"answer": "two", "id": 8, "question": "how many dogs run?", "video_id": 1},
]
MSRVTT = [{"answer": "car", "category_id": 9, "id": 0, "question": "what is driven?", "video_id": 7010}]
ASKED = [
    {"question": "is the person outside", "question_id": "a_0", "video_name": "1QIUV7WYKXg"},
    {"question": "what happens after jumping", "question_id": "a_1", "video_name": "1QIUV7WYKXg"},
]
ANSWERED = [
    {"answer": "yes", "question_id": "a_0", "type": 3},
    {"answer": "land", "question_id": "a_1", "type": 2},
]


def put(path, rows) -> str:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(path)


def msvd(folder, rows=MSVD, mapping="-4wsuPCjDBc_5_15 vid1\n\n-7KMZQEsJW4_205_208 vid2\n"):
    return question_sets.read_msvd_qa(put(folder / "test_qa.json", rows), put(folder / "youtube_mapping.txt", mapping))


def activitynet(folder, asked=ASKED, answered=ANSWERED):
    return question_sets.read_activitynet_qa(put(folder / "test_q.json", asked), put(folder / "test_a.json", answered))


# Public sets


def test_public_layouts_are_read(tmp_path):
    assert msvd(tmp_path) == [
        Question("7", "-7KMZQEsJW4_205_208", "who plays the guitar?", "man", "who"),
        Question("8", "-4wsuPCjDBc_5_15", "how many dogs run?", "two", "how many"),
    ]
    found = question_sets.read_msrvtt_qa(put(tmp_path / "test_qa.json", MSRVTT))
    assert found == [Question("0", "video7010", "what is driven?", "car", "what")]
    assert activitynet(tmp_path) == [
        Question("a_0", "v_1QIUV7WYKXg", "is the person outside", "yes", "yes-no"),
        Question("a_1", "v_1QIUV7WYKXg", "what happens after jumping", "land", "time"),
    ]


def test_kinds_follow_the_words():
    for text, kind in {
        "What is it?": "what",
        "with what does he cut?": "what",
        "Whose dog is it?": "who",
        "how many cats": "how many",
        "How does it end?": "how",
        "who's there": "who",
        "Isn’t it red?": "yes-no",
        "can't he swim?": "yes-no",
        "Does a man, who sings, dance?": "yes-no",
        "name the animal": "other",
        "?": "other",
    }.items():
        assert question_sets.kind_of(text) == kind, text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"answer": ""}, "entry 1: 'answer' must be a text that is not empty, not ''"),
        ({"answer": None}, "entry 1: 'answer'"),
        ({"question": 3}, "entry 1: 'question'"),
        ({"id": True}, "entry 1: 'id' must be a number or a name"),
        ({"id": 7}, "entry 1: a second question '7'"),
        ({"video_id": 3}, "entry 1: vid3 is not in"),
        ({"video_id": []}, "entry 1: 'video_id'"),
    ],
)
def test_faults_of_an_entry_are_named(tmp_path, change, said):
    with pytest.raises(UserError) as error:
        msvd(tmp_path, [MSVD[0], MSVD[1] | change])
    assert said in str(error.value) and "test_qa.json" in str(error.value) and "\n" not in str(error.value)
    for missing in MSVD[1]:
        with pytest.raises(UserError, match=f"entry 1: '{missing}'"):
            msvd(tmp_path, [MSVD[0], {name: value for name, value in MSVD[1].items() if name != missing}])


@pytest.mark.parametrize("rows", ["[", "{}", "[]", "3", '["x"]', "[" * 100_000])
def test_faults_of_a_file_are_named(tmp_path, rows):
    with pytest.raises(UserError, match="test_qa.json: (not JSON|expected a list|entry 0: expected an object)"):
        msvd(tmp_path, rows)
    with pytest.raises(UserError, match="absent.json: cannot be read"):
        question_sets.read_msrvtt_qa(tmp_path / "absent.json")


def test_faults_of_the_mapping_are_named(tmp_path):
    for mapping, said in {
        "a vid1\na": ":2: expected a line 'name vidN'",
        "a 1": ":1: expected a line",
        "a vid1\nb vid1": ":2: a second video for vid1",
        "../a vid1": ":1: video '../a'",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            msvd(tmp_path, mapping=mapping)


def test_questions_and_answers_must_belong_together(tmp_path):
    for asked, answered, said in [
        (ASKED, ANSWERED[:1], "test_q.json: entry 1: question 'a_1' has no answer in"),
        (ASKED[:1], ANSWERED, "test_a.json: 1 answers without a question in"),
        (ASKED, [*ANSWERED, ANSWERED[0]], "test_a.json: entry 2: a second answer to question 'a_0'"),
        ([*ASKED, ASKED[0]], ANSWERED, "test_q.json: entry 2: a second question 'a_0'"),
        (ASKED, [ANSWERED[0] | {"type": 9}, ANSWERED[1]], "test_a.json: entry 0: 'type' must be a number from 0 to 8"),
        ([ASKED[0] | {"video_name": "../x"}, ASKED[1]], ANSWERED, "test_q.json: entry 0: video 'v_../x'"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            activitynet(tmp_path, asked, answered)


# Right answers


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("Red.", "red", True),
        ("a red", "the red", True),
        ("redder", "red", False),
        ("red car", "red", False),
        ("Two", "2", True),
        ("2", "two", True),
        ("twenty", "20", True),
        ("none", "zero", True),
        ("1,000", "1000", True),
        ("2.5", "2.5", True),
        ("25", "2.5", False),
        ("2.", "two", True),
        ("t-shirt", "T shirt", True),
        ("dont know", "Don’t know!", True),
        ("Yes, it is red.", "yes", True),
        ("no it does not", "No", True),
        ("Nothing", "no", False),
        ("it is yes", "yes", False),
        ("not yes", "no", False),
        ("", "red", False),
        ("The", "the", True),
        ("a", "the", False),
        ("", "the", False),
        ("cafe\u0301", "café", True),
    ],
)
def test_answers_count_by_the_rules(text, answer, right):
    assert qa.rule_normalised(text, answer) is right
    assert qa.normalise(qa.normalise(text)) == qa.normalise(text)


def test_exact_answers_are_letter_by_letter():
    assert qa.exact(" red\n", "red") and not qa.exact("Red", "red") and not qa.exact("red.", "red")


# Built-in worlds


def record(number: int, attributes: dict, **fields) -> Record:
    row = dict(id=f"captions.jsonl:{number}", videos=(), sha256=(f"{number:064x}",), caption="", paraphrases=())
    return Record(**row | dict(dialogue=(), hazard=False, attributes=attributes, kind="clip") | fields)


SCENES = [dataclasses.asdict(scene) for scene in combinations("train", False)]


def test_worlds_are_asked_about_every_attribute():
    scene = Scene("star", "cyan", "up", "large")
    found = {q.id.split("/")[-1]: q for q in world_questions(record(0, dataclasses.asdict(scene)), "test")}
    assert list(found) == ["shape", "colour", "motion", "size", "yes", "no"]
    assert [found[name].answer for name in ("shape", "colour", "motion", "size")] == ["star", "cyan", "up", "large"]
    assert {q.video for q in found.values()} == {"captions.jsonl:0"} and found["yes"].kind == "yes-no"
    assert {"to the top", "rising", "moves up", "upwards"} <= {*found["motion"].also}
    assert "turquoise" in found["colour"].also
    assert world_questions(record(0, {"base": "1"}), "test") == []
    assert world_questions(record(0, dataclasses.asdict(scene), hazard=True), "test") == []
    with pytest.raises(ValueError):
        world_questions(record(0, {}), "dev")


def test_emoji_are_asked_about_their_group_and_tone():
    attributes = {"base": "1f44b", "tone": "light skin tone", "group": "people and body"}
    group, tone, yes, no = world_questions(record(0, attributes), "test")
    assert (group.answer, tone.answer, tone.also) == ("people and body", "light skin tone", ("light",))
    assert "people and body" in group.question and "flags" in group.question and "{" not in group.question
    assert "people and body" in yes.question and "people and body" not in no.question
    untoned = world_questions(record(0, attributes | {"tone": ""}), "train")
    assert [q.kind for q in untoned] == ["group", "yes-no", "yes-no"]


def test_questions_hang_on_the_clip_and_the_split_alone():
    one, same, other = (record(n, SCENES[5], sha256=(sha,)) for n, sha in ((1, "a"), (2, "a"), (3, "b")))
    texts = [[(q.question, q.answer) for q in world_questions(r, "train")] for r in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]


def test_phrasings_of_splits_differ_and_have_training_words():
    asked = {}
    for split in ("train", "validation", "test"):
        found = [q for n in range(400) for q in world_questions(record(n, SCENES[n % len(SCENES)]), split)]
        emoji = {"base": "x", "tone": "dark skin tone", "group": "flags"}
        found += [q for n in range(50) for q in world_questions(record(n, emoji), split)]
        asked[split] = {q.question for q in found}
    for split in ("validation", "test"):
        assert not asked["train"] & asked[split]
        strange = set(re.findall("[a-z]+", " ".join(asked[split]).lower()))
        strange -= set(re.findall("[a-z]+", " ".join(asked["train"]).lower()))
        assert not strange
    assert not asked["validation"] & asked["test"]


def test_yes_and_no_are_balanced():
    """In all exactly, and for every wording about, when clips are evenly distributed."""
    scenes = [dataclasses.asdict(s) for split in ("train", "validation", "test") for s in combinations(split, False)]
    records = [record(n, scene) for n, scene in enumerate(scenes * 6)]
    found = [q for r in records for q in world_questions(r, "test") if q.kind == "yes-no"]
    assert Counter(q.answer for q in found) == {"yes": len(records), "no": len(records)}
    assert not any(hazard in q.question for q in found for hazard in HAZARDS)
    by_text = Counter((q.question, q.answer) for q in found)
    for text in {q.question for q in found}:
        yes, no = by_text[text, "yes"], by_text[text, "no"]
        assert abs(yes - no) < 4.5 * np.sqrt(yes + no), (text, yes, no)
    truth = {q.id: q for q in found}
    for r in records[:200]:  # and they are true
        for answer in ("yes", "no"):
            told = set(re.findall("[a-z]+", truth[f"{r.id}/{answer}"].question))
            assert bool(told & set(r.attributes.values())) == (answer == "yes"), (r.attributes, told)


# The measure


def ask(kind: str, number: int, answer: str, video: str) -> Question:
    return Question(f"{kind}{number}", video, f"{kind} {number}?", answer, kind)


def test_answers_are_measured_by_kind():
    rows = [("what", "dog", "a"), ("what", "dog", "a"), ("who", "man", "b"), ("what", "cat", "c")]
    asked = [ask(kind, number, answer, video) for number, (kind, answer, video) in enumerate(rows)]
    table = {"what 0?": "The dog.", "what 1?": "cat", "who 2?": "man", "what 3?": ""}
    seen = []

    def answer(pairs):
        seen.extend(pairs)
        return [table[text.removeprefix("Look. ")] for _, text in pairs]

    found = qa.measure(answer, asked, str.upper, "x", "Look. {question}")
    assert seen[0] == ("A", "Look. what 0?") and [clip for clip, _ in seen] == ["A", "A", "B", "C"]
    value = {name: (figure.value, figure.n) for name, figure in found.figures.items()}
    assert value == {
        "x/exact": (0.25, 4),
        "x/accuracy": (0.5, 4),
        "x/guess": (0.75, 4),
        "x/accuracy/what": (pytest.approx(1 / 3), 3),
        "x/accuracy/who": (1.0, 1),
    }
    assert [one.right for one in found.asked] == [True, False, True, False]
    assert found.each["x/accuracy"] == {"what0": 1.0, "what1": 0.0, "who2": 1.0, "what3": 0.0}
    assert found.videos["what1"] == "a"
    assert (found.prompts["prompt"], found.prompts["questions"]) == ("Look. {question}", 4)
    again = qa.measure(answer, asked, str.upper, "y", "Look. {question}").prompts
    assert again == found.prompts  # the fingerprint tells what was asked, and nothing else
    other = [*asked[:3], dataclasses.replace(asked[3], answer="cow")]
    assert qa.measure(answer, other, str.upper, "x", "Look. {question}").prompts["fingerprint"] != again["fingerprint"]


def test_synonyms_count_and_questions_come_in_chunks():
    scene = Scene("circle", "pink", "left", "small")
    asked = [q for n in range(40) for q in world_questions(record(n, dataclasses.asdict(scene)), "test")]
    said = {"shape": "disc", "colour": "Magenta.", "motion": "to the left", "size": "tiny"}
    truth = {f"{q.question} {q.video}": said.get(q.kind, q.answer) for q in asked}
    sizes = []

    def answer(pairs):
        sizes.append(len(pairs))
        return [truth[f"{text.split(' Answer with')[0]} {clip}"] for clip, text in pairs]

    found = qa.measure(answer, asked, str)
    assert found.figures["qa/accuracy"].value == 1 and sizes == [64, 64, 64, 48]
    figure = found.figures["qa/accuracy"]
    assert (figure.low, figure.n) == (Figure.share([True] * 40).low, 240)  # no certainty from 40 videos


def test_intervals_are_of_videos():
    """Ten questions about each video that are all right or all wrong tell no more than one does."""
    rng = np.random.default_rng(0)
    hits = rng.random(60) < 0.5
    one = qa.accuracy(list(hits), [str(n) for n in range(60)])
    ten = qa.accuracy(list(np.repeat(hits, 10)), [str(n) for n in np.repeat(np.arange(60), 10)])
    assert (one.value, one.low, one.high) == pytest.approx((ten.value, ten.low, ten.high))
    assert (one.n, ten.n) == (60, 600)


def test_faults_of_asking_are_named():
    asked = [ask("what", 0, "dog", "a")]
    with pytest.raises(UserError, match="qa: no questions to ask"):
        qa.measure(lambda pairs: [], [], str)
    with pytest.raises(UserError, match="has no {question} in it"):
        qa.measure(lambda pairs: [], asked, str, prompt="Say it.")
    with pytest.raises(UserError, match="question 'what0' comes more than once"):
        qa.measure(lambda pairs: [], asked * 2, str)
    with pytest.raises(ValueError, match="0 answers to 1 questions"):
        qa.measure(lambda pairs: [], asked, str)


@pytest.mark.parametrize("attributes", [
    {"shape": "circle", "colour": "red", "size": "small", "motion": "zigzag"},
    {"shape": ["circle"], "colour": "red", "size": "small", "motion": "left"},
    {"base": "a", "tone": "", "group": "cats"}, {"base": "a", "tone": 3, "group": "animals and nature"}, {"group": "cats"},
])  # fmt: skip
def test_attributes_that_a_stranger_wrote_are_of_another_world(attributes):
    assert world_questions(record(0, attributes), "test") == []
