"""The loop: exact resume, every way a run ends, and what it leaves behind. A toy objective on the real step."""

import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from g4v_jax.errors import UserError
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.loop import LoopSpec, run
from g4v_jax.train.metrics import Logger
from g4v_jax.train.optim import Optimizer
from g4v_jax.train.state import Blueprint
from g4v_jax.train.step import StepSpec, make_gradient_cosines, make_step
from g4v_jax.types import Batch, Term

ROWS, LENGTH, VOCAB, DIM = 8, 4, 16, 8
optimizer = Optimizer(warmup_steps=2).build(6)


class Toy:
    """Two terms on an embedding table and a frozen projection; draws are used, so randomness must resume too."""

    weights = {"captioning": 1.0, "safety": 0.1}

    def draw(self, row_keys):
        return jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(row_keys)

    def counts(self, batch):
        return {name: jnp.float32(batch.tokens.size) for name in self.weights}

    def terms(self, params, batch, draws, dropout):
        hidden = params["llm"]["embed"][batch.tokens] + 0.1 * draws[:, None]
        values = hidden @ params["vision"]["kernel"] - batch.targets[..., None]
        count = jnp.float32(batch.tokens.size)
        return {"captioning": Term(jnp.sum(values**2), count), "safety": Term(jnp.sum(hidden**2), count)}


class Numbers:
    """Batches that are a function of a counter; `seen` is what was handed out."""

    def __init__(self, limit=None, poison=None):
        self.next, self.seen, self.closed = 0, [], False
        self._limit, self._poison = limit, poison

    def __next__(self):
        if self.next == self._limit:
            raise StopIteration
        rng = np.random.default_rng(self.next)
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32)
        zero = np.zeros((ROWS, LENGTH), np.int32)
        clips = np.zeros((ROWS, 1, 1, 1, 1, 3), np.uint8)
        weight = np.ones((ROWS, LENGTH), np.float32)
        targets = weight * (np.nan if self.next == self._poison else 0.5)
        slot, mask = np.full((ROWS, 1), -1, np.int32), np.ones((ROWS, 1), bool)
        segments = zero + 1
        segments[:, -1] = 0
        self.seen.append(self.next)
        self.next += 1
        times = np.zeros((ROWS, 1, 1), np.float32)
        return Batch(
            tokens,
            targets,
            zero,
            segments,
            weight,
            weight,
            clips,
            mask,
            times,
            zero,
            zero,
            clips,
            mask,
            mask,
            slot,
            slot,
            weight,
            mask[:, :0],
            zero,
        )

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        self.closed = True


def init(key):
    table = nn.LogicallyPartitioned(jax.random.normal(key, (VOCAB, DIM)), ("vocab", "embed"))
    return {"llm": {"embed": table}, "vision": {"kernel": nn.LogicallyPartitioned(jnp.eye(DIM), ("embed", None))}}


@pytest.fixture(scope="module")
def toy(mesh):
    """(jitted step, blueprint, frozen), compiled once for all tests."""
    blueprint = Blueprint(init, mesh, lambda paths: ({"llm/embed"}, {"llm/embed"}), jnp.float32)
    shardings = jax.tree.map(lambda x: x.sharding, blueprint.state_shapes(optimizer))
    step = jax.jit(make_step(Toy(), optimizer, StepSpec(), seed=0), donate_argnums=0, out_shardings=(shardings, None))
    frozen = jax.device_put(
        {"vision": {"kernel": jnp.eye(DIM)}},
        {"vision": {"kernel": blueprint.frozen_shapes["vision"]["kernel"].sharding}},
    )
    return step, blueprint, frozen


def train(toy, mesh, workdir, batches=None, steps=6, stop_after=None, checkpoint_every=2, **extra):
    step, blueprint, frozen = toy
    batches = batches or Numbers()
    spec = LoopSpec(steps=steps, log_every=2, checkpoint_every=checkpoint_every, keep=2, **extra.pop("spec", {}))
    state = run(
        step,
        blueprint.state_shapes(optimizer),
        extra.pop("create", lambda: blueprint.create(jax.random.key(0), optimizer)),
        frozen,
        batches,
        mesh,
        Checkpoints(workdir, spec.checkpoint_every, spec.keep),
        Logger(workdir, spec.steps, spec.log_every),
        spec,
        meta={"config": "toy"},
        stop_after=stop_after,
        **extra,
    )
    assert batches.closed
    return jax.device_get(state)


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def never():
    raise AssertionError("a resumed run does not initialise")


@pytest.fixture(scope="module")
def whole(toy, mesh, tmp_path_factory):
    """An uninterrupted run: (state, batches, workdir)."""
    workdir, batches = tmp_path_factory.mktemp("whole"), Numbers()
    return train(toy, mesh, workdir, batches), batches, workdir


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resume_is_exact(toy, mesh, whole, tmp_path, stop_after):
    expected, straight, _ = whole
    first, second = Numbers(), Numbers()
    train(toy, mesh, tmp_path, first, stop_after=stop_after)
    assert steps_of(tmp_path)[-1] == stop_after
    state = train(toy, mesh, tmp_path, second, create=never)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert int(state.step) == 6
    assert first.seen[:stop_after] + second.seen == straight.seen  # a batch fetched ahead is not lost
    losses = [
        [(e["step"], e["loss/captioning"]) for e in map(json.loads, (w / "metrics.jsonl").read_text().splitlines())][-1]
        for w in (tmp_path, whole[2])
    ]
    assert losses[0] == losses[1]


def test_what_a_run_leaves_behind(whole):
    _, batches, workdir = whole
    assert batches.seen == list(range(6))  # none is fetched for a step that never comes
    assert steps_of(workdir) == [4, 6]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["resumed_from"] == 0 and summary["compiles"] == 1
    assert summary["padding"] == 0.25
    assert set(summary["losses"]) == {"captioning", "safety"}
    assert 0 <= summary["outside_step"] <= 1 and summary["seconds_per_step"] > 0
    assert set(summary["outside"]) >= {"data", "log", "checkpoint"}
    assert [e["step"] for e in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())] == [2, 4, 6]
    assert (workdir / "losses.png").exists()


def test_a_finished_run_is_left_alone(toy, mesh, whole, capsys):
    _, _, workdir = whole
    before = (workdir / "summary.json").read_text()
    batches = Numbers()
    train(toy, mesh, workdir, batches, create=never)
    assert batches.seen == [] and (workdir / "summary.json").read_text() == before
    assert "already at step 6" in capsys.readouterr().out


def test_the_last_step_is_saved_off_the_interval(toy, mesh, tmp_path):
    train(toy, mesh, tmp_path, steps=5)
    assert steps_of(tmp_path) == [4, 5]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(toy, mesh, whole, tmp_path, number, code):
    class Interrupted(Numbers):
        def __next__(self):
            if self.next == 3:
                os.kill(os.getpid(), number)
            return super().__next__()

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        train(toy, mesh, tmp_path, Interrupted(), checkpoint_every=100)
    assert exit.value.code == code and signal.getsignal(number) == before
    assert steps_of(tmp_path) == [4]  # the signal came while the fourth batch was fetched
    assert not (tmp_path / "summary.json").exists()
    jax.tree.map(np.testing.assert_array_equal, train(toy, mesh, tmp_path), whole[0])


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(toy, mesh, whole, tmp_path):
    with pytest.raises(UserError, match="step 4: (loss/captioning|gradient/llm) is nan"):
        train(toy, mesh, tmp_path, Numbers(poison=3))
    assert steps_of(tmp_path) == [2]
    assert [e["step"] for e in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [2]
    # step 2 was saved while the batch of step 3 was fetched already: that batch has to come again
    resumed = Numbers()
    jax.tree.map(np.testing.assert_array_equal, train(toy, mesh, tmp_path, resumed, create=never), whole[0])
    assert resumed.seen == [2, 3, 4, 5]


def test_data_that_ends(toy, mesh, tmp_path):
    batches = Numbers(limit=3)
    with pytest.raises(UserError, match="the data ended at step 3 of 6"):
        train(toy, mesh, tmp_path, batches)
    assert batches.closed


def test_evaluation_and_cosines_at_their_intervals(toy, mesh, tmp_path):
    cosines = jax.jit(make_gradient_cosines(Toy(), seed=0))
    seen = []

    def evaluate(state, frozen):
        seen.append(int(state.step))
        return {"eval/score": 0.5}

    train(toy, mesh, tmp_path, evaluate=evaluate, cosines=cosines, spec={"eval_every": 3, "cosine_every": 4})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == [3, 6] and [e["step"] for e in entries if "eval/score" in e] == [3, 6]
    with_cosines = [e for e in entries if "cosine/captioning·safety" in e]
    assert [e["step"] for e in with_cosines] == [4] and abs(with_cosines[0]["cosine/captioning·safety"]) <= 1


def test_a_bad_interval_is_refused():
    with pytest.raises(UserError, match="loop.log_every: 0 is below 1"):
        LoopSpec(steps=3, log_every=0)
