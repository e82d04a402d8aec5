"""What a run says of clips, written as dialogues that further training learns from."""

import json

import folder
import numpy as np
import pytest
import tiny

from g4v_jax import cli
from g4v_jax.data import records, tasks
from g4v_jax.data.world.phrases import QUESTIONS
from g4v_jax.errors import UserError
from g4v_jax.infer import rehearsal
from g4v_jax.infer.assistant import Reply


class Speaker:
    """An assistant that names how bright a clip is; replies by the clip's turn may be others."""

    def __init__(self, others: dict[int, Reply]):
        self.shape, self.others, self.asked = tiny.build().shape, others, []

    def answer(self, dialogues):
        replies = []
        for turns in dialogues:
            frames, seconds = turns[0].clips[0]
            assert frames.shape == (*self.shape.clip_shape, 3) and seconds.shape == self.shape.clip_shape[:1]
            self.asked.append(turns[0].text)
            said = Reply(f"a wall of {frames[0].mean():.0f}", None, 0.0)
            replies.append(self.others.get(len(self.asked) - 1, said))
        return replies


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Records of a small folder."""
    path = tmp_path_factory.mktemp("rehearsal")
    records.build(folder.make(path / "source"), path / "records")
    return path / "records"


def test_what_is_said_of_training_clips_is_learned_as_dialogues(built, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "TOGETHER", 4)  # and a rest
    clips = records.read(built, "train", "clips")
    speaker = Speaker({})
    assert rehearsal.write(speaker, str(built), tmp_path / "said") == {"said": len(clips), "left_out": 0}
    assert set(speaker.asked) <= set(QUESTIONS["train"]) and len(set(speaker.asked)) > 1
    assert records.build(tmp_path / "said", tmp_path / "out")["records"] == {"train_dialogues": len(clips)}
    said = records.read(tmp_path / "out", "train", "dialogues", rehearsal.KIND)
    setting = tasks.Setting(tiny.tokenizer(), speaker.shape, "train", records.footage)
    for clip, dialogue, question in zip(clips, said, speaker.asked):
        assert dialogue.videos == clip.videos and not dialogue.hazard
        frames, _ = records.footage(clip, 0, *speaker.shape.clip_shape)
        asked, answer = dialogue.dialogue
        assert (asked["text"], answer["text"]) == (question, f"a wall of {frames[0].mean():.0f}")
    example = tasks.TASKS["dialogue"].build(said[0], np.random.default_rng(0), setting)
    learned = tiny.tokenizer().decode(example["targets"][example["caption_weight"] > 0])
    assert learned.startswith(said[0].dialogue[1]["text"]) and not example["keep_weight"].any()


def test_what_is_no_description_is_left_out(built, tmp_path):
    count = len(records.read(built, "train", "clips"))
    others = {0: Reply("I can't help with that.", None, 0.0), 2: Reply("", None, 0.0), 3: Reply("see", "a wall", 0.0)}
    assert rehearsal.write(Speaker(others), str(built), tmp_path) == {"said": count - 3, "left_out": 3}
    rows = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert len(rows) == count - 3 == len(list((tmp_path / "clips").iterdir()))
    assert all(row["turns"][1]["text"].startswith("a wall of") for row in rows)


def test_a_folder_that_is_taken_or_not_named_is_refused(built, tmp_path):
    (tmp_path / "dialogues.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is there already; choose another --out"):
        rehearsal.write(Speaker({}), str(built), tmp_path)
    with pytest.raises(UserError, match="say where"):
        cli.run(["data", "said", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="no records"):
        rehearsal.write(Speaker({}), str(tmp_path), tmp_path / "out")
