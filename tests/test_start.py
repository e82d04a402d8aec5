"""Where a run's first weights come from: another run's towers, and what that run had not."""

import jax
import numpy as np
import pytest
import tiny

from g4v_jax import trees
from g4v_jax.bench.step import chance_batch
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.start import first_state, laid_out
from g4v_jax.train.state import TrainState
from g4v_jax.train.step import make_step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the tiny model, LoRA on q and v, all of it trained."""
    path = tmp_path_factory.mktemp("start") / "run"
    with Checkpoints(path, every_steps=1, keep=1) as checkpoints:
        state = TrainState(np.ones((), np.int32), tiny.params(), (), {"queries": tiny.params()["queries"] + 1})
        checkpoints.save(1, state, {}, {}, force=True)
    return path


def build(**changes) -> Build:
    return Build(tiny.config(trainable=(".*",), **changes), tuple(jax.devices()[:1]))


def first(made: Build, **sources) -> dict:
    return trees.flatten(jax.device_get(first_state(made.blueprint, made.optimizer, jax.random.key(0), sources).trainable))


def test_lora_of_more_maps_begins_from_nothing_and_all_else_from_the_run(run):
    found = first(build(model__llm__lora=("q", "k", "v", "o", "mlp")), llm=run, queries=run)
    kept = trees.flatten(tiny.params())
    for path, leaf in found.items():
        if path == "queries":
            np.testing.assert_array_equal(leaf, kept[path] + 1)  # the moving average is what a run is known by
        elif path.startswith("llm/") and path in kept:
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
        elif path.startswith("llm/"):
            assert path.endswith(("lora_a", "lora_b")), path
            assert np.any(leaf) == path.endswith("lora_a"), path  # silent until it learns
    assert len([path for path in found if path.startswith("llm/")]) > len([path for path in kept if path.startswith("llm/")])


def test_other_leaves_that_a_run_lacks_are_named(run):
    with pytest.raises(UserError, match="has no llm/layers/attention/k_norm/scale"):
        first(build(model__llm__qk_norm="head"), llm=run)


def test_on_one_cpu_unrolled_layers_lie_apart_and_the_step_is_the_same():
    made = Build(tiny.config(ema=(), trainable=("llm/.*lora_[ab]", "denoiser/.*"), model__llm__unroll=2), tuple(jax.devices()[:1]))
    trainable, frozen = trees.split(tiny.params(), made.blueprint.trainable)
    terms = {}
    for name in ("whole", "apart"):
        given = jax.tree.map(jax.numpy.copy, frozen)
        if name == "apart":
            given = laid_out(given, made.towers, made.mesh)
            assert isinstance(trees.flatten(given)["llm/layers/mlp/gate/kernel"], tuple)
        step = make_step(made.objective, made.optimizer, made.step, seed=0)
        state = TrainState(np.zeros((), np.int32), trainable, made.optimizer.init(trainable), {})
        with jax.set_mesh(made.mesh):
            terms[name] = {key: float(value) for key, value in jax.jit(step)(state, given, chance_batch(made))[1].items()}
    assert terms["apart"] == pytest.approx(terms["whole"], rel=1e-5, abs=1e-6)
    many = Build(tiny.config(), tuple(jax.devices()[:2]))
    assert laid_out(frozen, many.towers, many.mesh) is frozen
