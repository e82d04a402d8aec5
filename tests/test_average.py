"""A run between two others: its weights, what it takes over, and which runs cannot be averaged."""

import shutil

import jax
import numpy as np
import pytest
import tiny

from g4v_jax import cli, trees
from g4v_jax import config as configs
from g4v_jax.build import Build
from g4v_jax.commands.common import open_run
from g4v_jax.data.chat import ChatFormat
from g4v_jax.data.text import Tokenizer
from g4v_jax.errors import UserError
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.saved import SavedRun
from g4v_jax.train.state import TrainState

CONFIG = tiny.config(ema=("denoiser/.*",), trainable=("(?!vision/).*",))


def save(path, trainable: dict, frozen: dict, ema: dict, step: int):
    """A finished run."""
    configs.save(CONFIG, path)
    Tokenizer(tiny.tokenizer()._model, ChatFormat(user_end="<|stop|>")).save(path / "tokenizer.json")
    with Checkpoints(path, every_steps=1, keep=1) as checkpoints:
        checkpoints.save_frozen(frozen, {"vision": "chance"})
        checkpoints.save(step, TrainState(np.int32(step) * np.ones((), np.int32), trainable, (), ema), {}, {}, force=True)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(before, after): all that is trained is 1 larger after, and its moving average 3 larger."""
    folder = tmp_path_factory.mktemp("average")
    trainable, frozen = trees.split(tiny.params(), Build(CONFIG, tuple(jax.devices()[:1])).blueprint.trainable)
    moved = jax.tree.map(lambda x: x + 1, trainable)
    ema = {"denoiser": jax.tree.map(lambda x: x + 3, trainable["denoiser"])}
    before = save(folder / "before", trainable, frozen, {"denoiser": trainable["denoiser"]}, 2)
    return before, save(folder / "after", moved, frozen, ema, 5)


def average(runs, out, *more: str) -> dict:
    cli.run(["average", *map(str, runs), f"--out={out}", *more])
    return trees.flatten(jax.device_get(open_run(str(out))[1].params))


def test_every_trained_leaf_lies_between_the_two_and_the_frozen_are_theirs(runs, tmp_path, capsys):
    found, start = average(runs, tmp_path / "out", "--weight=0.75", "--whole=hazard,queries"), trees.flatten(tiny.params())
    assert found.keys() == start.keys()
    for path, leaf in found.items():
        tower = path.split("/")[0]
        far = {"vision": 0.0, "hazard": 1.0, "queries": 1.0, "denoiser": 2.25}.get(tower, 0.75)
        np.testing.assert_allclose(leaf, start[path] + far, rtol=1e-6, atol=1e-6, err_msg=path)
    assert SavedRun(tmp_path / "out").step == 5
    assert "0.75 of the way" in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "chat.json"):
        assert (tmp_path / "out" / name).read_bytes() == (runs[1] / name).read_bytes()


def test_runs_that_cannot_be_averaged_are_told_apart_and_nothing_is_written(runs, tmp_path):
    before, after = runs
    out = tmp_path / "out"

    def refused(match, first=before, second=after, *more):
        with pytest.raises(UserError, match=match):
            average((first, second), out, *more)
        assert not out.exists()

    refused("no tower 'hazrad'; did you mean 'hazard'", before, after, "--whole=hazrad")
    other = shutil.copytree(before, tmp_path / "other")
    (other / "chat.json").unlink()
    refused("different tokenizers or chat formats", other)
    (other / "tokenizer.json").unlink()
    refused("no tokenizer here", other)
    refused("no run here", before, tmp_path / "nowhere")
    trainable, frozen = trees.split(tiny.params(), Build(CONFIG, tuple(jax.devices()[:1])).blueprint.trainable)
    elsewhere = save(tmp_path / "elsewhere", trainable, jax.tree.map(lambda x: x + 1, frozen), {}, 1)
    refused("different frozen weights", elsewhere)
    with pytest.raises(UserError, match="is there already"):
        average(runs, after)
    with pytest.raises(UserError, match="give two runs"):
        average((before,), out)
