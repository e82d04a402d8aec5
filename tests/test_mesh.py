"""Meshes: the same losses and gradients on all of them, no needless copies, and mistakes that are named."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from g4v_jax import rng, torus, trees
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.sharding import AXES, batch_spec, constrain, make_mesh, parameter_specs
from g4v_jax.train.optim import Optimizer
from g4v_jax.train.state import Blueprint

MESHES = {
    "replica 2, fsdp 2, tensor 2": dict(replica=2, fsdp=2, tensor=2),
    "fsdp 8": dict(fsdp=8),
    "tensor 8": dict(tensor=8),
    "context 4, fsdp 2": dict(context=4, fsdp=2),
}
AVERAGED = "llm/layers/mlp/up/kernel"
COMPLAINT = "Involuntary full rematerialization"


def one_step(build, sides=()):
    """(gradients, metrics) of the first step from the same weights and batch on any mesh and torus, in numpy."""
    optimizer = tiny.keep_gradients()
    step = tiny.step(build, optimizer)
    with jax.set_mesh(build.mesh), torus.using(sides):
        state, metrics = step(*tiny.state(build, optimizer), tiny.put(tiny.batch(9, build.shape), build))
    return jax.device_get((state.opt_state, metrics))


@functools.cache
def on_one_device():
    return one_step(tiny.build())


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_nothing_and_copies_nothing_needlessly(name, capfd):
    gradients, metrics = one_step(tiny.build(8, **MESHES[name]))
    assert COMPLAINT not in capfd.readouterr().err
    expected, alone = on_one_device()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    tiny.assert_close(gradients, expected, tolerance=1e-5)
    assert metrics.keys() == alone.keys()
    for key, value in metrics.items():
        assert value == pytest.approx(alone[key], rel=1e-5), key


@pytest.mark.parametrize("mesh, sides", [
    (dict(fsdp=8), (2, 2, 2)), (dict(replica=2, fsdp=4), (2, 2)), (dict(fsdp=4, tensor=2), (2, 2)),
])  # fmt: skip
def test_gathers_and_sums_by_the_sides_of_a_torus_change_nothing(mesh, sides, capfd):
    gradients, metrics = one_step(tiny.build(8, **mesh), sides)
    assert COMPLAINT not in capfd.readouterr().err
    expected, alone = on_one_device()
    tiny.assert_close(gradients, expected, tolerance=1e-5)
    for key, value in metrics.items():
        assert value == pytest.approx(alone[key], rel=1e-5), key


def lying(*sides: int, order=None, platform="tpu", cores=1):
    """What `sides` reads of a mesh whose fsdp axis lies over a torus."""
    places = [(*place, *[0] * (3 - len(sides))) for place in np.ndindex(sides)]
    places = [places[i] for i in order] if order is not None else places
    line = [SimpleNamespace(platform=platform, coords=place, core_on_chip=core) for place in places for core in range(cores)]
    devices = np.empty((1, len(line), 1, 1), object)
    devices[0, :, 0, 0] = line
    return SimpleNamespace(devices=devices)


def test_the_sides_of_a_torus():
    assert torus.sides(lying(16, 16)) == (16, 16) and torus.sides(lying(4, 4, 8)) == (4, 4, 8)
    assert torus.sides(lying(4, 2, cores=2)) == (4, 2, 2)
    turned = np.arange(32).reshape(4, 8).T.reshape(-1)  # the second side first
    assert torus.sides(lying(4, 8, order=turned)) == (8, 4)
    snake = np.concatenate([np.arange(4), np.arange(4, 8)[::-1]])
    for other in (lying(8), lying(4, 4, platform="cpu"), lying(2, 4, order=snake)):
        assert torus.sides(other) == ()
    assert torus.sides(make_mesh(dict(fsdp=8))) == ()


def test_the_compiler_does_complain_where_it_has_to_copy(capfd):
    """What the test above looks for is really written there."""

    def turn(x):
        x = jnp.sin(jax.lax.with_sharding_constraint(x, PartitionSpec("fsdp")))
        return jnp.cos(jax.lax.with_sharding_constraint(x, PartitionSpec(None, "tensor")))

    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        tiny.jit(turn).lower(jnp.ones((8, 8, 8))).compile()
    assert COMPLAINT in capfd.readouterr().err


def test_the_first_weights_are_a_function_of_the_seed_alone():
    """The language model, initialised on two meshes, each shard made where it lies."""
    llm = tiny.build().model.llm
    inputs = jnp.ones((8, 8, llm.dim)), jnp.ones((8, 8), jnp.int32), jnp.ones((8, 8), jnp.int32)

    def create(seed, **shape):
        def init(key):
            return {"llm": llm.init(key, *inputs, method="hidden")["params"]}

        blueprint = Blueprint(init, make_mesh(shape), lambda paths: (set(paths), {AVERAGED}), jnp.float32)
        state = blueprint.create(rng.stream(seed, "init"), tiny.keep_gradients())
        for leaf, promised in zip(*map(jax.tree.leaves, (state, blueprint.state_shapes(tiny.keep_gradients())))):
            assert leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)
        return jax.device_get(state)

    first, second = create(3, fsdp=8), create(3, replica=2, tensor=4)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    flat = trees.flatten(first.trainable)
    np.testing.assert_array_equal(trees.flatten(first.ema)[AVERAGED], flat[AVERAGED])
    kernels = [leaf for path, leaf in flat.items() if path.endswith("/kernel")]
    assert all((leaf[0] != leaf[1]).all() for leaf in kernels)  # no two layers start alike


def test_optimizer_state_and_averages_lie_as_their_parameters_do():
    build = tiny.build(8, replica=2, fsdp=2, tensor=2)
    for name in ("adamw", "muon"):
        state = build.blueprint.state_shapes(Optimizer(name=name).build(10))
        trainable, moments = trees.flatten(state.trainable), optimizer_leaves(state.opt_state)
        assert {path.split()[1] for path in moments} == set(trainable)
        for path, leaf in moments.items():
            assert leaf.sharding == trainable[path.split()[1]].sharding, path
        for path, leaf in trees.flatten(state.ema).items():
            assert leaf.sharding == trainable[path].sharding, path
    spread = [leaf for leaf in trainable.values() if not leaf.sharding.is_fully_replicated]
    assert sum(leaf.size for leaf in spread) > 0.8 * trees.count(state.trainable)


def optimizer_leaves(state) -> dict:
    """{"moment path": leaf} of Adam's two moments of each parameter."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        for moment in ("mu", "nu"):
            if moment in names:
                found[f"{moment} " + "/".join(names[names.index(moment) + 1 :])] = leaf
    return found


def test_a_name_that_no_table_has_is_refused():
    with jax.set_mesh(tiny.build(8).mesh):
        with pytest.raises(ValueError, match="unknown activation axis 'row'; did you mean 'rows'"):
            constrain(jnp.ones((8, 2)), "row", None)
        with pytest.raises(ValueError, match=r"1 axis names for shape \(8, 2\)"):
            constrain(jnp.ones((8, 2)), "rows")
        assert constrain(jnp.ones((8, 2)), "rows", None).sharding.spec == PartitionSpec(("replica", "fsdp"), None)
    boxed = {"tower": {"kernel": nn.LogicallyPartitioned(jnp.ones((2, 2)), ("embed", "width"))}}
    with pytest.raises(ValueError, match="unknown parameter axis 'width'; known: channels, embed"):
        parameter_specs(boxed)


def test_parameters_follow_the_table():
    shapes = trees.flatten(tiny.build(8).blueprint.shapes)
    assert shapes["llm/layers/attention/q/kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert shapes["llm/layers/mlp/down/kernel"].sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert shapes["llm/embedding/table"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert parameter_specs({"plain": jnp.ones(3)}) == {"plain": PartitionSpec()}


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"fsdp": 3, "tensor": 2}, "replica=1 x fsdp=3 x context=1 x tensor=2 does not fit 8"),
        ({"fsdp": 2}, "does not fit 8"),
        ({"fsdp": 16}, "does not fit 8"),
        ({"fsdp": -1, "tensor": 3}, "does not fit 8"),
        ({"fsdp": -1, "tensor": -1}, "does not fit 8"),
        ({"fsdp": 0}, "does not fit 8"),
        ({"fsdp": -1, "tensors": 2}, "unknown axis 'tensors'; did you mean 'tensor'"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape, message):
    with pytest.raises(UserError, match=message):
        make_mesh(shape)


def test_a_mesh_that_does_not_divide_a_parameter_names_it():
    config = tiny.config(model__llm__mlp_dim=30)
    config.mesh = {"fsdp": 2, "tensor": 4}
    message = r"mesh: llm/layers/mlp/\w+/kernel \[2, \d+, \d+\] does not divide over whole, .*tensor 4"
    with pytest.raises(UserError, match=message):
        Build(config).blueprint.shapes


def test_one_axis_takes_the_devices_that_are_left():
    mesh = make_mesh({"fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 4, "context": 1, "tensor": 2} and mesh.axis_names == AXES
    assert dict(make_mesh({"tensor": -1}, jax.devices()[:3]).shape)["tensor"] == 3


def test_rows_that_do_not_divide_are_named():
    config = tiny.config(rows__rows=6, step__micro_batches=2)
    with pytest.raises(UserError, match=r"rows.rows is 6; it must be a multiple of 16 .step.micro_batches x"):
        Build(config).step


def test_a_batch_lies_over_rows():
    build = tiny.build(8, replica=2, fsdp=2, tensor=2)
    batch = tiny.batch(0, build.shape)
    placed = tiny.put(batch, build)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
    for leaf, promised in zip(jax.tree.leaves(placed), jax.tree.leaves(build.batch_shapes())):
        assert leaf.sharding == promised.sharding and leaf.shape == promised.shape and leaf.dtype == promised.dtype
        assert leaf.sharding.spec == batch_spec(leaf)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}


class Device(SimpleNamespace):
    """What laying out a mesh asks a device for."""

    __hash__ = object.__hash__


def test_an_axis_may_lie_over_a_part_of_a_side_of_the_torus():
    """2 x 128 on a torus of 4 x 4 x 16, where no sides multiply to 128."""
    places = [(x, y, z) for z in range(16) for y in range(4) for x in range(4)]
    devices = [
        Device(id=i, slice_index=0, process_index=0, platform="tpu", device_kind="TPU v5", client=None, coords=list(place), core_on_chip=0)
        for i, place in enumerate(places)
    ]
    mesh = make_mesh({"replica": 2, "fsdp": -1}, devices)
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 128, "context": 1, "tensor": 1}
    assert len({tuple(device.coords) for device in mesh.devices.flat}) == 256
    sides = [{device.coords[axis] for device in mesh.devices[0].flat} for axis in range(3)]
    assert sorted(map(len, sides)) == [2, 4, 16] or sorted(map(len, sides)) == [4, 4, 8]


def test_slices_are_joined_by_replica_alone():
    devices = [Device(id=i, slice_index=i % 2, process_index=0, platform="cpu", device_kind="cpu", client=None) for i in range(8)]
    mesh = make_mesh({"replica": 4, "fsdp": 1, "tensor": -1}, devices)
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 1, "context": 1, "tensor": 2}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="replica is 1; it must be a multiple of the 2 slices"):
        make_mesh({"fsdp": -1}, devices)
