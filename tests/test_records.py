"""Records: what is built is what was written, and what is wrong is named."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from folder import make, write_lines

from g4v_jax.data import records
from g4v_jax.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "records"
    return out, records.build(source, out)


def test_records_are_what_was_written(source, built):
    out, summary = built
    assert summary == records.summary(out) | {"reused": False}
    assert summary["records"] == {
        "test_clips": 3, "train_clips": 6, "train_dialogues": 6, "train_hazards": 4, "validation_clips": 3,
    }  # fmt: skip
    assert (summary["skipped"], summary["videos"], summary["reused"]) == (0, 16, False)
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    wanted = [row for row in rows if row["split"] == "train" and not row["hazard"]]
    for record, row in zip(records.read(out, "train", "clips"), wanted, strict=True):
        assert (record.caption, list(record.paraphrases)) == (row["caption"], row["paraphrases"])
        assert record.videos == ((source / row["video"]).read_bytes(),)
        assert not record.hazard and not record.dialogue and record.kind == "clip"
    assert all(record.hazard for record in records.read(out, "train", "hazards"))


def test_dialogues_name_videos_by_place(source, built):
    record = records.read(built[0], "train", "dialogues")[1]
    assert record.dialogue[0]["video"] == 0 and record.dialogue[3]["render"] == {"caption": "a wall", "video": 1}
    assert record.videos[1] == (source / "clips/1.mp4").read_bytes()
    assert (record.hazard, record.kind, record.caption) == (False, "talk", "")


def test_records_of_one_kind(built, tmp_path):
    assert records.kinds(built[0], "train", "dialogues") == {"short": 2, "talk": 4}
    assert records.kinds(built[0], "test", "dialogues") == {}
    found = {kind: [one.id for one in records.read(built[0], "train", "dialogues", kind)] for kind in ("short", "talk")}
    assert found == {
        "short": ["dialogues.jsonl:3", "dialogues.jsonl:6"],
        "talk": [f"dialogues.jsonl:{line}" for line in (1, 2, 4, 5)],
    }
    with pytest.raises(UserError, match="train_dialogues has no records of kind 'tlak'; did you mean 'talk'"):
        records.read(built[0], "train", "dialogues", "tlak")
    shutil.copytree(built[0], tmp_path / "damaged")
    (tmp_path / "damaged" / records.KINDS.format("train_dialogues")).write_bytes(b"spoiled")
    with pytest.raises(UserError, match="train_dialogues is damaged"):
        records.read(tmp_path / "damaged", "train", "dialogues", "talk")


def test_footage_checks_the_bytes(built):
    record = records.read(built[0], "train", "clips")[0]
    pictures, seconds = records.footage(record, 0, 3, 16, 16)
    assert pictures.shape == (3, 16, 16, 3) and seconds.shape == (3,)
    spoiled = records.Record(**vars(record) | {"videos": (record.videos[0] + b"x",)})
    with pytest.raises(UserError, match="captions.jsonl:1: video 0 does not match its checksum"):
        records.footage(spoiled, 0, 3, 16, 16)


def test_the_same_source_is_not_built_again(source, built, caplog):
    with caplog.at_level(logging.INFO):
        again = records.build(source, built[0])
    assert again == built[1] | {"reused": True} and "up to date" in caplog.text


def test_a_changed_source_replaces_the_records(tmp_path):
    source = make(tmp_path / "source", clips=4, hazards=0, dialogues=0)
    first = records.build(source, tmp_path / "records")
    lines = (source / "captions.jsonl").read_text().splitlines(keepends=True)
    (source / "captions.jsonl").write_text("".join(lines[1:]))
    second = records.build(source, tmp_path / "records")
    assert first["records"]["train_clips"] == 2 and second["records"]["train_clips"] == 1
    assert records.splits(tmp_path / "records") == second["records"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records", "source"]


def test_captions_alone_are_enough(tmp_path):
    source = make(tmp_path / "source", clips=20, hazards=0, dialogues=0)
    (source / "dialogues.jsonl").unlink()
    write_lines(source / "captions.jsonl", [{"video": f"clips/{n}.mp4", "caption": f"text {n}"} for n in range(20)])
    built = records.build(source, tmp_path / "records")["records"]
    assert sum(built.values()) == 20 and built["train_clips"] > 14


def test_lines_without_a_split_go_where_their_video_is(tmp_path):
    """Many captions of one clip, as MSR-VTT has them, and a talk about it: all in one split, labelled or not."""
    source = make(tmp_path / "source", clips=2, hazards=0, dialogues=1)
    lines = [{"video": "clips/0.mp4", "caption": f"text {n}"} for n in range(40)]
    write_lines(source / "captions.jsonl", [*lines, {"video": "clips/1.mp4", "caption": "x", "split": "test"}])
    turns = [{"role": "user", "text": "what is it?", "video": "clips/1.mp4"}, {"role": "assistant", "text": "a wall"}]
    write_lines(source / "dialogues.jsonl", [{"turns": turns}])
    built = records.build(source, tmp_path / "records")["records"]
    assert built.pop("test_dialogues") == 1 and sorted(built.values()) in ([1, 40], [41])


def test_splits_that_share_a_video_are_refused(tmp_path):
    """Also under another name: the bytes decide."""
    source = make(tmp_path / "source", clips=2, hazards=0, dialogues=1)
    (source / "clips/copy.mp4").write_bytes((source / "clips/0.mp4").read_bytes())
    rows = [{"video": f"clips/{name}.mp4", "caption": "a", "split": split}
            for name, split in (("1", "test"), ("0", "train"), ("copy", "test"))]  # fmt: skip
    write_lines(source / "captions.jsonl", rows)
    with pytest.raises(UserError, match=r"captions.jsonl:2 .train. and captions.jsonl:3 .test. hold the same video"):
        records.build(source, tmp_path / "records")
    assert not (tmp_path / "records").exists()


BAD_CAPTIONS = {
    "not a line of JSON": "{'video': 1}",
    "expected an object": "[1]",
    "'caption' is missing or empty": '{"video": "a.mp4", "caption": ""}',
    "'video' is missing": '{"caption": "a"}',
    "'caption' must be a str, not int": '{"video": "a.mp4", "caption": 3}',
    "unknown field 'captoin'; did you mean 'caption'": '{"video": "a.mp4", "captoin": "a"}',
    "must be a path inside the folder": '{"video": "../a.mp4", "caption": "a"}',
    "path inside": '{"video": "/etc/passwd", "caption": "a"}',
    "split 'dev'; use one of train": '{"video": "a.mp4", "caption": "a", "split": "dev"}',
    "'paraphrases' must be texts": '{"video": "a.mp4", "caption": "a", "paraphrases": [1]}',
    "JSON .*utf-8": b'{"video": "a.mp4", "caption": "\xff"}',
}


@pytest.mark.parametrize("message", BAD_CAPTIONS)
def test_a_bad_caption_line_is_named(tmp_path, message):
    bad = BAD_CAPTIONS[message]
    good = b'{"video": "a.mp4", "caption": "a"}\n'
    (tmp_path / "captions.jsonl").write_bytes(good + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(UserError, match=f"captions.jsonl:2: .*{message}"):
        records.build(tmp_path, tmp_path / "records")
    assert not (tmp_path / "records").exists()


USER, ANSWER = {"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}
BAD_DIALOGUES = {
    "the last turn is the user's": [USER],
    "turn 1: role 'user'; turns alternate": [USER, USER],
    "turn 0: unknown field 'render'": [USER | {"render": {}}, ANSWER],
    "turn 1: 'video' is missing": [USER, ANSWER | {"render": {"caption": "a"}}],
    "turn 0: expected an object": ["hello", ANSWER],
    "'turns' is missing or empty": [],
}


@pytest.mark.parametrize("message", BAD_DIALOGUES)
def test_a_bad_dialogue_line_is_named(tmp_path, message):
    write_lines(tmp_path / "captions.jsonl", [])
    write_lines(tmp_path / "dialogues.jsonl", [{"turns": BAD_DIALOGUES[message]}])
    with pytest.raises(UserError, match=f"dialogues.jsonl:1: .*{message}"):
        records.build(tmp_path, tmp_path / "records")


def test_bad_videos_are_skipped_counted_and_listed(tmp_path, caplog):
    source = make(tmp_path / "source", clips=6, hazards=0, dialogues=4)
    (source / "clips/1.mp4").write_bytes(b"noise" * 100)
    (source / "clips/4.mp4").unlink()
    summary = records.build(source, tmp_path / "records")
    skipped = [json.loads(line) for line in (tmp_path / "records" / records.SKIPPED).read_text().splitlines()]
    assert summary["skipped"] == len(skipped) == 4  # two clips, and two dialogues that show one of them
    assert {Path(row["video"]).name for row in skipped} == {"1.mp4", "4.mp4"}
    assert "4 records skipped" in caplog.text
    for video in (source / "clips").iterdir():
        video.write_bytes(b"noise")
    with pytest.raises(UserError, match=f"not one usable record of 10; the first fault: {source}/clips/"):
        records.build(source, tmp_path / "records")
    assert records.splits(tmp_path / "records") == summary["records"]  # the old ones are still there


def test_missing_and_foreign_folders_are_named(tmp_path, built):
    with pytest.raises(UserError, match="no captions.jsonl"):
        records.build(tmp_path, tmp_path / "records")
    write_lines(tmp_path / "captions.jsonl", [])
    with pytest.raises(UserError, match="captions.jsonl has no lines"):
        records.build(tmp_path, tmp_path / "records")
    write_lines(tmp_path / "captions.jsonl", [{"video": "clip.mp4", "caption": "a clip"}])
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(UserError, match="not a data set of this program"):
        records.build(tmp_path, tmp_path)
    with pytest.raises(UserError, match="no records here"):
        records.summary(tmp_path)
    with pytest.raises(UserError, match="no records 'test_hazards'"):
        records.read(built[0], "test", "hazards")


def test_a_damaged_record_is_named_when_it_is_read(tmp_path):
    source = make(tmp_path / "source", clips=4, hazards=0, dialogues=0)
    out = tmp_path / "records"
    records.build(source, out)
    (shard,) = out.glob("*train_clips*")
    data = bytearray(shard.read_bytes())
    data[300] ^= 255  # inside the first record
    shard.write_bytes(data)
    split = records.read(out, "train", "clips")
    with pytest.raises(UserError, match="train_clips: record 0 is damaged"):
        split[0]
    assert split[1].videos
    for damage in (lambda: shard.write_bytes(data[:1000]), shard.unlink):
        damage()
        with pytest.raises(UserError, match="train_clips.* is damaged"):
            records.read(out, "train", "clips")[0]
