"""Checkpoints: exact on any mesh, damage found and stepped over, frozen weights once, a full disk."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from g4v_jax.errors import UserError
from g4v_jax.sharding import make_mesh
from g4v_jax.train import checkpoint
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.saved import SavedRun
from g4v_jax.train.state import TrainState

META = {"versions": {"jax": jax.__version__}, "config": "abc"}
optimizer = optax.adam(1e-3)


def make_state(mesh, value: float) -> TrainState:
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    trainable = {
        "llm": {
            "q": {"kernel": put(value + jnp.arange(128.0).reshape(16, 8), "fsdp")},
            "bias": put(value * jnp.ones(8)),
        }
    }
    make = jax.jit(
        lambda p: TrainState(jnp.int32(value), p, optimizer.init(p), {"llm": {"bias": p["llm"]["bias"] * 10}})
    )
    state = make(trainable)
    return jax.device_put(state, jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), state))


def spec_of(x) -> PartitionSpec:
    return PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec()


def shapes_of(tree, mesh=None):
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(x)) if mesh else x.sharding)

    return jax.tree.map(shape, tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def array_file(workdir, step):
    """The largest file of a step: array data."""
    files = (p for p in (workdir / f"checkpoints/{step}/state").rglob("*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """A run with steps 2 and 4, to be copied before it is harmed."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, every_steps=2, keep=2) as checkpoints:
        assert [checkpoints.save(step, make_state(mesh, step), {"next": step}, META) for step in (1, 2, 3, 4)] == [
            False,
            True,
            False,
            True,
        ]
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_restores_the_newest_step_bit_for_bit(mesh, workdir):
    with Checkpoints(workdir, 2) as checkpoints:
        step, state, position = checkpoints.restore(shapes_of(make_state(mesh, 0)))
        assert (step, position, checkpoints.meta(4)) == (4, {"next": 4}, META)
    assert_equal(state, make_state(mesh, 4))
    assert state.trainable["llm"]["q"]["kernel"].sharding.spec == PartitionSpec("fsdp")


def test_nothing_saved_yet(mesh, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(shapes_of(make_state(mesh, 0))) is None


@pytest.mark.parametrize("devices", [1, 4])
def test_restores_on_another_mesh(mesh, workdir, devices):
    other = make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
    expected = make_state(mesh, 4)
    with Checkpoints(workdir, 2) as checkpoints:
        _, state, _ = checkpoints.restore(shapes_of(expected, other))
    assert_equal(jax.device_get(state), jax.device_get(expected))
    assert all(leaf.sharding.mesh == other for leaf in jax.tree.leaves(state))


def test_manifest_names_every_file(workdir):
    manifest = json.loads((workdir / "checkpoints/manifests/4.json").read_text())
    step = workdir / "checkpoints/4"
    assert set(manifest["files"]) == {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()}
    assert checkpoint.damage(workdir / "checkpoints", 4) is None


def missing(path):
    path.unlink()
    return "is missing"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes instead of"


def flipped(path):
    flip_a_byte(path)
    return "does not match its SHA-256"


@pytest.mark.parametrize("harm", [flipped, missing, truncated])
def test_a_damaged_step_is_set_aside(mesh, workdir, capsys, harm):
    path = array_file(workdir, 4)
    reason = harm(path)
    with Checkpoints(workdir, 2) as checkpoints:
        step, state, position = checkpoints.restore(shapes_of(make_state(mesh, 0)))
        said = capsys.readouterr().out
        assert step == 2 and position == {"next": 2}
        assert checkpoints.steps() == [2]
        assert checkpoints.save(4, make_state(mesh, 40), {}, META)  # its number is free again
    assert_equal(state, make_state(mesh, 2))
    assert said.count("\n") == 1 and path.name in said and reason in said
    assert (workdir / "checkpoints/damaged/4/state").is_dir()


def test_a_step_without_manifest_is_set_aside(mesh, workdir, capsys):
    (workdir / "checkpoints/manifests/4.json").unlink()
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.restore(shapes_of(make_state(mesh, 0)))[0] == 2
    assert "no manifest manifests/4.json" in capsys.readouterr().out


def test_all_steps_damaged(mesh, workdir):
    for step in (2, 4):
        flip_a_byte(array_file(workdir, step))
    with Checkpoints(workdir, 2) as checkpoints, pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoints.restore(shapes_of(make_state(mesh, 0)))


def test_another_model_is_refused(mesh, workdir):
    shapes = shapes_of(make_state(mesh, 0))
    wider = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=shapes.step.sharding)
    cases = {
        "trainable/llm/q/kernel is float32": shapes.replace(
            trainable={"llm": {"q": {"kernel": wider}, "bias": shapes.trainable["llm"]["bias"]}}
        ),
        "has no trainable/new": shapes.replace(trainable=shapes.trainable | {"new": wider}),
        "holds ema/llm/bias": shapes.replace(ema={}),
    }
    with Checkpoints(workdir, 2) as checkpoints:
        for message, other in cases.items():
            with pytest.raises(UserError, match=message):
                checkpoints.restore(other)


def test_leftovers_of_a_killed_save_are_cleaned(workdir):
    leftover = workdir / "checkpoints/6.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)
    with Checkpoints(workdir, 2) as checkpoints:
        assert not leftover.exists()
        assert checkpoints.steps() == [2, 4]


def test_old_steps_go_with_their_manifests(mesh, workdir):
    with Checkpoints(workdir, 2, keep=2) as checkpoints:
        checkpoints.save(5, make_state(mesh, 5), {}, META, force=True)
    assert sorted(p.name for p in (workdir / "checkpoints/manifests").iterdir()) == ["4.json", "5.json"]
    assert not (workdir / "checkpoints/2").exists()


def test_save_is_safe_from_donation(mesh, tmp_path):
    state = make_state(mesh, 3)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, state, {}, META)
        overwrite(state)
        _, restored, _ = checkpoints.restore(shapes_of(make_state(mesh, 0)))
    assert_equal(restored, make_state(mesh, 3))


@pytest.mark.parametrize("when", ["in the background", "while sealing", "at save"])
def test_full_disk(mesh, workdir, monkeypatch, when):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match="no space left on .* while saving step 6"),
        Checkpoints(workdir, 2) as checkpoints,
    ):
        with monkeypatch.context() as patch:
            if when == "in the background":
                patch.setattr(ocp.JsonCheckpointHandler, "finalize", full)
                patch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
            elif when == "while sealing":
                patch.setattr(checkpoint, "write_json", full)
            else:
                patch.setattr(checkpoints._manager, "save", full)
            checkpoints.save(6, make_state(mesh, 6), {}, META)
            checkpoints.wait()
    assert not list((workdir / "checkpoints").glob("6*"))
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.restore(shapes_of(make_state(mesh, 0)))[0] == 4


def make_frozen(mesh, value=1.0):
    return {
        "vision": {
            "kernel": jax.device_put(jnp.full((16, 4), value, jnp.bfloat16), NamedSharding(mesh, PartitionSpec("fsdp")))
        }
    }


def test_frozen_weights_are_saved_once(mesh, workdir):
    frozen, source = make_frozen(mesh), {"model": "clip"}
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.restore_frozen(shapes_of(frozen)) is None
        assert checkpoints.save_frozen(frozen, source)
        before = (workdir / "frozen/manifest.json").stat().st_mtime_ns
        assert not checkpoints.save_frozen(jax.device_get(frozen), source)
        assert (workdir / "frozen/manifest.json").stat().st_mtime_ns == before
        assert_equal(checkpoints.restore_frozen(shapes_of(frozen)), frozen)
        assert json.loads((workdir / "frozen/manifest.json").read_text())["source"] == source
        with pytest.raises(UserError, match="other frozen weights"):
            checkpoints.save_frozen(make_frozen(mesh, 2.0), source)
        flip_a_byte(
            max((p for p in (workdir / "frozen/arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        )
        with pytest.raises(UserError, match="SHA-256"):
            checkpoints.restore_frozen(shapes_of(frozen))


def test_nothing_frozen(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        assert checkpoints.save_frozen({}, {})
        assert checkpoints.restore_frozen({}) == {}


def test_a_saved_run_gives_what_is_asked_for(mesh, workdir, capsys):
    frozen = make_frozen(mesh)
    with Checkpoints(workdir, 2) as checkpoints:
        checkpoints.save_frozen(frozen, {})
    state = make_state(mesh, 4)
    shapes = shapes_of(state.trainable | frozen)
    params = SavedRun(workdir).load(shapes)
    assert_equal(params["llm"]["bias"], state.ema["llm"]["bias"])
    assert_equal(params["llm"]["q"], state.trainable["llm"]["q"])
    assert_equal(params["vision"], frozen["vision"])
    assert_equal(SavedRun(workdir).load(shapes, prefer_ema=False), state.trainable | frozen)

    half = {"llm": {"bias": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=shapes["llm"]["bias"].sharding)}}
    assert SavedRun(workdir).load(half)["llm"]["bias"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="has no llm/new"):
        SavedRun(workdir).load({"llm": {"new": shapes["llm"]["bias"]}})

    flip_a_byte(array_file(workdir, 4))
    assert_equal(SavedRun(workdir).load(half, prefer_ema=False)["llm"]["bias"].astype(jnp.float32), 2 * np.ones(8))
    assert "checkpoint 4 is damaged" in capsys.readouterr().out
    assert (workdir / "checkpoints/4").exists()  # a reader moves nothing


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        SavedRun(tmp_path)
