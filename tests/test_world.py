"""The built-in world: attributes and their split, drawing, phrases, dialogues, files on disk."""

import itertools
import json
import re

import av
import numpy as np
import pytest

from g4v_jax.data.world import dialogues, phrases
from g4v_jax.data.world.attributes import (
    HAZARDS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPLITS,
    STEPS,
    VALUES,
    Scene,
    combinations,
    parse_caption,
    split_of,
)
from g4v_jax.data.world.draw import TRAVEL, blocked_card, render
from g4v_jax.data.world.make import make
from g4v_jax.errors import UserError


def _rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("hazard", [False, True])
def test_every_pair_of_values_is_trained_on(hazard):
    names = list(VALUES)
    shapes = [s for s in SHAPES if (s in HAZARDS) == hazard]
    trained = combinations("train", hazard)
    for one, other in itertools.combinations(names, 2):
        seen = {(getattr(s, one), getattr(s, other)) for s in trained}
        possible = len(shapes if one == "shape" else VALUES[one]) * len(VALUES[other])
        assert len(seen) == possible, (one, other)


@pytest.mark.parametrize("hazard", [False, True])
def test_splits_partition_the_combinations(hazard):
    parts = [set(combinations(split, hazard)) for split in SPLITS]
    total = (3 if hazard else 8) * 60
    assert sum(map(len, parts)) == len(set.union(*parts)) == total
    assert len(parts[1]) / total == pytest.approx(0.04, abs=0.01)
    assert len(parts[2]) / total == pytest.approx(0.08, abs=0.01)
    for part in parts[1:]:
        for name in ("colour", "motion", "size"):
            assert {getattr(scene, name) for scene in part} == set(VALUES[name])


def test_a_scene_rejects_unknown_values():
    with pytest.raises(ValueError, match="unknown colour 'mauve'"):
        Scene("star", "mauve", "left", "small")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_the_sprite_moves_as_named_and_stays_inside(motion, size):
    for seed, shape in enumerate(SHAPES):
        video = render(Scene(shape, "red", motion, size), _rng(seed), 9, 72, 96)
        assert video.shape == (9, 72, 96, 3) and video.dtype == np.uint8
        sprite = video[..., 0].astype(int) - video[..., 1] > 100
        assert not sprite[:, [0, -1]].any() and not sprite[:, :, [0, -1]].any()
        _, y, x = np.nonzero(sprite[:1])
        _, last_y, last_x = np.nonzero(sprite[-1:])
        moved = np.array([(last_x.mean() - x.mean()) / 96, (last_y.mean() - y.mean()) / 72])
        steps = np.array(STEPS[motion])
        assert np.all(abs(moved - np.mean(TRAVEL) * steps) < 0.06), (shape, moved)


def test_drawing_follows_the_seed():
    scene = Scene("knife", "blue", "up", "large")
    assert np.array_equal(render(scene, _rng(1), 4, 64, 64), render(scene, _rng(1), 4, 64, 64))
    assert not np.array_equal(render(scene, _rng(1), 4, 64, 64), render(scene, _rng(2), 4, 64, 64))


def test_the_blocked_card_is_still_and_grey():
    card = blocked_card(3, 48, 64)
    assert card.shape == (3, 48, 64, 3)
    assert (card == card[:1, :, :, :1]).all() and card.max() == 255 and card.min() == 48


def test_every_phrase_parses_to_its_scene():
    for seed, scene in enumerate(combinations("test", False) + combinations("train", True)):
        written = phrases.paraphrases(scene, _rng(seed), 8, held_out=not seed % 2)
        assert len(set(written)) == 8
        for text in [phrases.canonical(scene), *written]:
            assert parse_caption(text) == {name: getattr(scene, name) for name in VALUES}, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A BIG turquoise plus sign rises.", ("cross", "cyan", "up", "large")),
        ("two tiny knives going from left to right", ("knife", None, "right", "small")),
        ("a red blue star that moves left and right", ("star", None, None, None)),
        ("upright redness in a starry boxing match", (None, None, None, None)),
        ("", (None, None, None, None)),
    ],
)
def test_parsing_of_free_text(text, expected):
    found = parse_caption(text)
    assert (found["shape"], found["colour"], found["motion"], found["size"]) == expected


def _words(texts):
    return set(re.findall(r"[a-z']+", re.sub(r"{\w+}", "", " ".join(texts)).lower()))


def test_held_out_phrasings_are_new_sentences_of_known_words():
    tables = [
        phrases.QUESTIONS,
        phrases.REQUESTS,
        dialogues.THING_FRAMES,
        dialogues.HARM_FRAMES,
        dialogues.IDIOM_FRAMES,
        dialogues.FACT_FRAMES,
        *dialogues.TALK.values(),
        *dialogues.ATTRIBUTE_QUESTIONS.values(),
    ]
    known = _words(text for table in tables for text in table["train"])
    held_out = _words(text for table in tables for text in table["validation"] + table["test"])
    assert not held_out - known
    for table in tables:
        sentences = [text for split in SPLITS for text in table[split]]
        assert len(set(sentences)) == len(sentences)
    captions = phrases.CAPTION_TEMPLATES
    assert not set(captions["train"]) & set(captions["held_out"])
    assert _words(captions["held_out"]) <= _words(captions["train"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "small"
    return directory, make(directory, 40, 10, 200, seed=3, processes=1)


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_on_disk(world):
    directory, summary = world
    rows = _rows(directory / "captions.jsonl")
    assert summary["made"] and summary["clips"] == {"train": 40, "validation": 60, "test": 60}
    assert summary["hazards"] == {"train": 10, "validation": 24, "test": 24}
    assert len(rows) == len({row["video"] for row in rows}) == 160 + 58
    for row in rows:
        scene = Scene(**row["attributes"])
        assert split_of(scene) == row["split"] and scene.hazard == row["hazard"]
        assert row["caption"] == phrases.canonical(scene) and len(row["paraphrases"]) == 8


def test_clips_on_disk_are_h264_of_mild_sizes(world):
    directory, _ = world
    for row in _rows(directory / "captions.jsonl")[:12]:
        with av.open(str(directory / row["video"])) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            assert stream.codec_context.name == "h264"
            assert 2 <= frames / stream.average_rate <= 4.1
            assert 3 / 4 <= stream.width / stream.height <= 4 / 3


def test_dialogues_on_disk(world):
    directory, _ = world
    clips = {row["video"]: row for row in _rows(directory / "captions.jsonl")}
    rows = _rows(directory / "dialogues.jsonl")
    kinds = [row["kind"] for row in rows]
    assert set(kinds) == {"harmful", "lookalike", "talk", "clip"}
    assert kinds.count("lookalike") >= kinds.count("harmful") > 50
    for row in rows:
        assert row["hazard"] == (row["kind"] == "harmful")
        assert [turn["role"] for turn in row["turns"]] == ["user", "assistant"] * (
            len(row["turns"]) // 2
        )
        for turn in row["turns"]:
            for used in (turn, turn.get("render", {})):
                assert "video" not in used or clips[used["video"]]["split"] == row["split"]
            if "render" in turn:
                assert turn["render"]["caption"] == clips[turn["render"]["video"]]["caption"]
                assert not clips[turn["render"]["video"]]["hazard"]
        refused = row["turns"][-1]["text"] in sum(phrases.REFUSALS.values(), ())
        assert refused == row["hazard"]
    asked = {
        split: {row["turns"][-2]["text"] for row in rows if row["split"] == split}
        for split in SPLITS
    }
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    trained = [json.dumps(row["turns"]) for row in rows if row["split"] == "train"]
    assert len(set(trained)) > 0.95 * len(trained)


def test_a_clip_does_not_depend_on_counts_or_processes(world, tmp_path):
    directory, _ = world
    done = []
    make(tmp_path / "w", 3, 1, 0, seed=3, processes=2, progress=lambda *at: done.append(at))
    assert done[-1] == (172, 172)
    rows = {row["video"]: row for row in _rows(directory / "captions.jsonl")}
    for row in _rows(tmp_path / "w" / "captions.jsonl"):
        assert row == rows[row["video"]]
        assert (tmp_path / "w" / row["video"]).read_bytes() == (
            directory / row["video"]
        ).read_bytes()
    assert (tmp_path / "w" / "dialogues.jsonl").read_text() == ""


def test_a_complete_world_is_kept_and_an_incomplete_one_redone(tmp_path, monkeypatch):
    few = {"clip": 2, "hazard": 2, "dialogue": 2}
    monkeypatch.setattr("g4v_jax.data.world.make._AT_LEAST", few)
    record = tmp_path / "world.json"
    assert make(tmp_path, 1, 0, 0, seed=0, processes=1)["made"]
    assert not make(tmp_path, 1, 0, 0, seed=0, processes=1)["made"]
    record.write_text(record.read_text().replace("true", "false"))
    (tmp_path / "clips" / "clip-train-000009.mp4").write_bytes(b"left over")
    assert make(tmp_path, 1, 0, 0, seed=0, processes=1)["made"]
    assert not (tmp_path / "clips" / "clip-train-000009.mp4").exists()


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a built-in world"):
        make(tmp_path, 1, 0, 0, seed=0)
    with pytest.raises(UserError, match="at least one clip"):
        make(tmp_path / "w", 0, 0, 0, seed=0)
