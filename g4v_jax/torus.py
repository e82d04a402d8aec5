"""Gathers of weights and sums of their gradients over fsdp, in steps along the sides of a TPU's torus.

May hold what knows how a mesh lies on a torus. A TPU's compiler scatters a sum along one side, and gathers along two. Of a scatter
over several sides, and a gather over three, it makes a reduction that brings the whole to every device and sends twice as much.
In steps that it knows each device is sent its part alone: in any number of them (n-1)/n of the whole.
"""

import contextlib
import math
from collections.abc import Callable
from contextvars import ContextVar

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from g4v_jax.sharding import ACTIVATIONS, PARAMETERS, shards

_SIDES: ContextVar[tuple[int, ...]] = ContextVar("sides", default=())


def sides(mesh: Mesh) -> tuple[int, ...]:
    """The sides of the torus of TPUs that a mesh's fsdp axis lies over, from the slowest to the fastest.

    () where it is one line, where it does not lie straight, and on other machines.
    """
    line = mesh.devices[0, :, 0, 0]
    if line[0].platform != "tpu":
        return ()
    places = np.array([(*device.coords, getattr(device, "core_on_chip", 0)) for device in line])
    moving = [column for column in places.T if len(set(column.tolist())) > 1]
    moving.sort(key=lambda column: -int(np.argmax(column != column[0])))  # the one that changes last first
    sizes = tuple(len(set(column.tolist())) for column in moving)
    if len(sizes) < 2 or math.prod(sizes) != len(line):
        return ()
    grid = [column.reshape(sizes) for column in moving]
    straight = all((one == one.take([0], axis=i)).all() for k, one in enumerate(grid) for i in range(len(sizes)) if i != k)
    return sizes if straight else ()


@contextlib.contextmanager
def using(sides: tuple[int, ...]):
    """Products of weights that are traced inside go by these sides; by none where there are none."""
    token = _SIDES.set(sides)
    try:
        yield
    finally:
        _SIDES.reset(token)


def cut(names: tuple[tuple[str | None, ...], ...], matrix: tuple[int, int], rows: tuple[int, ...]) -> PartitionSpec | None:
    """How a map's matrix [I O] is cut over fsdp and tensor, where the map is to go by sides; None where it is not.

    `names`: logical names of the parameter's axes that make up I, and of those that make up O; `rows`: the leading axes of what
    the map is applied to. It goes by sides where the first of them lies over replica and fsdp and none over context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _SIDES.get() or mesh.shape["context"] > 1 or mesh.manual_axes or not rows or rows[0] % shards("rows"):
        return None
    over = [[PARAMETERS[name] if name else None for name in side] for side in names]
    spec = PartitionSpec(*(side[0] if side else None for side in over))
    known = all(axis is None for side in over for axis in side[1:])  # only the outermost of merged axes may be cut
    divides = all(size % mesh.shape[axis] == 0 for size, axis in zip(matrix, spec) if axis)
    alone = all(len(side) == 1 for side, axis in zip(over, spec) if axis == "fsdp")
    return spec if "fsdp" in spec and known and divides and alone else None


def whole(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A matrix that is cut by `spec`, gathered over fsdp."""

    def own(x):
        for groups in reversed(_groups(2)):
            x = jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), axis_index_groups=groups, tiled=True)
        return x

    return jax.shard_map(own, in_specs=spec, out_specs=PartitionSpec(*map(_but_fsdp, spec)), check_vma=False)(x)


def scatter(function: Callable, x: jax.Array, y: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over all rows of function(x, y), of which each device does its own, a matrix that is left cut by `spec`.

    x [rows ... I] and y [rows ... O]. Between replicas, whose network is slow, each device sends its part alone.
    """

    def own(x, y):
        part = function(x, y)
        for groups in _groups(1):
            part = jax.lax.psum_scatter(
                part, "fsdp", scatter_dimension=spec.index("fsdp"), axis_index_groups=groups, tiled=True
            )
        return jax.lax.psum(part, "replica")

    def of(array, axis):
        return PartitionSpec(ACTIVATIONS["rows"], *[None] * (array.ndim - 2), _but_fsdp(axis))

    return jax.shard_map(own, in_specs=tuple(map(of, (x, y), spec)), out_specs=spec, check_vma=False)(x, y)


def _but_fsdp(axis: str | None) -> str | None:
    return None if axis == "fsdp" else axis


def _groups(together: int) -> list[list[list[int]]]:
    """Of each step, over so many sides at once, the slowest first: which places of the fsdp axis are one group in it."""
    sizes = _SIDES.get()
    steps = [math.prod(sizes[i : i + together]) for i in range(0, len(sizes), together)]
    places = np.arange(math.prod(steps)).reshape(steps)
    return [np.moveaxis(places, i, -1).reshape(-1, size).tolist() for i, size in enumerate(steps)]
