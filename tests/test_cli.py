"""The command line: every mistake of a user's is one line on stderr that names the thing, and exit status 2."""

import json
import os
import subprocess
import sys

import pytest

from g4v_jax import cli
from g4v_jax.heap import HUGE, TUNABLES

QUICKSTART = "--config=configs/quickstart.py:model,short"


def fails(capsys, *arguments: str) -> str:
    """Run a command that must fail -> what it says."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(arguments))
    said = capsys.readouterr().err.strip()
    assert exit_.value.code == 2, said
    assert said.startswith("g4v: error: ") and "\n" not in said and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), ("trian", "train")),
        (("data", "mak"), ("data mak", "data make")),
        (("train", QUICKSTART, "--config.optimizer.learning_rat=1"), ("learning_rat", "learning_rate")),
        (("train", QUICKSTART, "--workdri=x"), ("workdri", "workdir")),
        (("train", "--config=configs/nothing.py"), ("nothing.py",)),
        (("train", "--config=configs/quickstart.py:modle"), ("modle", "model")),
        (("caption", "--workdir=WORK"), ("name at least one video",)),
        (("caption", "a.mp4", "--workdir=WORK"), ("WORK", "no run here")),
        (("generate", "  ", "--workdir=WORK"), ("prompt is empty",)),
        (("generate", "--workdir=WORK"), ("prompt is empty",)),
        (("eval", "--workdir=WORK"), ("WORK", "no run here")),
        (("data", "fetch", "emojis", "--out=WORK"), ("emojis", "emoji")),
        (("data", "fetch", "emoji"), ("--out",)),
        (("data", "build", QUICKSTART, "--config.source=WORK/none", "--config.data.records=WORK/r"), ("WORK/none",)),
        (("data", "inspect", QUICKSTART, "--config.data.records=WORK/none"), ("WORK/none",)),
        (("check", QUICKSTART, "--devices=8", "--config.mesh.fsdp=3"), ("mesh", "8 device")),
        (("check", QUICKSTART, "--devices=8", "--config.nothing.at_all=3"), ("nothing",)),
        (("check", QUICKSTART, "--devices=8", "--config.model.llm.remat=full"), ("sets no field 'remat'", "add it to the file")),
        (("check", QUICKSTART, "--devices=8", "--config.rows.rows=6"), ("rows.rows", "multiple of 8")),
        (("check", QUICKSTART, "--devices=8", "--config.rows.target_frames=8"), ("target_frames", "8 frames")),
        (("check", QUICKSTART, "--devices=8", "--config.mesh.fsdp=1", "--config.mesh.context=8", "--config.rows.tokens=100"), ("context is 8", "rows.tokens is 100", "5 or 10")),
        (("check", QUICKSTART, "--devices=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=8"), ("tensor is 8", "num_heads")),
        (("data", "make", "--config=configs/emoji.py"), ("no world section",)),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path):
    said = fails(capsys, *(argument.replace("WORK", str(tmp_path)) for argument in arguments))
    for word in words:
        assert word.replace("WORK", str(tmp_path)) in said


def test_an_empty_folder_and_a_bad_line_are_named(capsys, tmp_path):
    records = f"--config.data.records={tmp_path}/records"
    source = tmp_path / "source"
    source.mkdir()
    (source / "captions.jsonl").write_text("")
    assert str(source) in fails(capsys, "data", "build", QUICKSTART, f"--config.source={source}", records)
    (source / "captions.jsonl").write_text('{"video": "a.mp4", "caption": "a"}\n{"video": "b.mp4" "caption": "b"}\n')
    assert "captions.jsonl:2" in fails(capsys, "data", "build", QUICKSTART, f"--config.source={source}", records)


def test_a_workdir_of_another_config_says_what_differs(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7}))
    said = fails(capsys, "train", QUICKSTART, "--config.rows.rows=8", f"--workdir={tmp_path}")
    assert "another config" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


def test_help_lists_every_command(capsys):
    assert cli.run([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("before", "after"), [(None, f"{HUGE}=1"), ("glibc.pthread.rseq=0", f"glibc.pthread.rseq=0:{HUGE}=1"), (f"{HUGE}=0", f"{HUGE}=0")])
def test_a_process_begins_again_on_huge_pages_once_and_others_do_not_inherit_them(before, after):
    code = (
        "import os, sys; from g4v_jax import heap; heap.on_huge_pages(); heap.give_back();"
        "print(sys.argv, os.environ[heap.TUNABLES], heap.without_huge_pages()[heap.TUNABLES], sep='|')"
    )
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES} | ({TUNABLES: before} if before else {})
    done = subprocess.run([sys.executable, "-c", code, "one", "--two=3"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"['-c', 'one', '--two=3']|{after}|{before or ''}", done.stderr
