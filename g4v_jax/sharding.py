"""The mesh and the two tables from logical axis names to mesh axes; the only file that knows the mesh.

Model code names the axes of its parameters (`nn.with_logical_partitioning`) and activations (`constrain`)
by what they mean. A name that is not in the table raises; nothing is ever silently left unsharded.
"""

import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from g4v_jax.errors import UserError, nearest

AXES = ("replica", "fsdp", "context", "tensor")  # replica: the slow network between slices

PARAMETERS = {
    "layers": None,
    "embed": "fsdp",  # the model width D of every tower
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "lora": None,
    "channels": None,  # pixels, latents, taps of a convolution and learned tables: too small to split
    "norm": None,
}

ACTIVATIONS = {
    "rows": ("replica", "fsdp"),
    "sequence": "context",
    "frames": ("replica", "fsdp", "context"),  # of all clips, where each is looked at alone
    "latents": "context",  # patches of a clip to render
    "height": "context",  # of a clip that an autoencoder encodes
    "patches": None,  # other lengths of the towers beside the LLM
    "keys": None,  # keys and values are gathered over context
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": None,
    "head_dim": None,
    "slots": None,
}


def make_mesh(shape: dict[str, int], devices=None) -> Mesh:
    """Build the mesh. One axis may be -1: it takes the devices that are left.

    Where devices are of several slices, `replica` is what joins them. Raises UserError where the sizes do not multiply to
    the device count, and where `replica` is no multiple of the slices.
    """
    for name in shape:
        if name not in AXES:
            raise UserError(f"mesh: unknown axis {name!r}{nearest(name, AXES)}")
    devices = jax.devices() if devices is None else devices
    sizes = [shape.get(name, 1) for name in AXES]
    free = [i for i, size in enumerate(sizes) if size == -1]
    known = math.prod(size for size in sizes if size != -1)
    if len(free) > 1 or known < 1 or len(devices) % known or (not free and known != len(devices)):
        wanted = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes))
        raise UserError(f"mesh: {wanted} does not fit {len(devices)} device(s); set one axis to -1 or change the sizes")
    if free:
        sizes[free[0]] = len(devices) // known
    types = (AxisType.Auto,) * len(AXES)
    slices = len({slice_of(device) for device in devices})
    if sizes[0] % slices:
        raise UserError(f"mesh: replica is {sizes[0]}; it must be a multiple of the {slices} slices, which it joins")
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * (len(AXES) - 1))

    def laid(split: bool):
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=split)

    try:
        laid_out = laid(False)
    except NotImplementedError:  # on a torus: an axis that is no product of its sides lies over a part of one
        laid_out = laid(True)
    return Mesh(laid_out, AXES, axis_types=types)


def slice_of(device) -> int:
    """The slice of a TPU that a device is in; 0 for all others."""
    return getattr(device, "slice_index", None) or 0


def one_device() -> Mesh:
    """A mesh of this process's first device, for what is small or used alone."""
    return make_mesh({"fsdp": 1}, jax.local_devices()[:1])


def _spec(names, table: dict, kind: str) -> PartitionSpec:
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"unknown {kind} axis {name!r}{nearest(name, table)}")
    return PartitionSpec(*(None if name is None else table[name] for name in names))


def activation_spec(*names: str | None) -> PartitionSpec:
    """The PartitionSpec of an activation by logical names, one a dimension; an unknown name raises."""
    return _spec(names, ACTIVATIONS, "activation")


def shards(name: str | None) -> int:
    """Over how many devices of the current mesh (`jax.set_mesh`) an activation's axis is split."""
    axes = ACTIVATIONS[name] if name else None
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis)


def platform() -> str:
    """What the devices of the current mesh (`jax.set_mesh`) are: "cpu", "tpu", "gpu"; "none" where it names no devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "none" if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether the current mesh (`jax.set_mesh`) is one device, a CPU."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation by logical names, one a dimension. Needs `jax.set_mesh`; an unknown name raises."""
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names for shape {x.shape}")
    return jax.lax.with_sharding_constraint(x, activation_spec(*names))


def parameter_specs(boxed) -> dict:
    """Map a tree of boxed parameters (from `jax.eval_shape` of an init) to PartitionSpecs of the same tree, unboxed."""

    def spec(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return _spec(leaf.names, PARAMETERS, "parameter")
        return PartitionSpec()

    return jax.tree.map(spec, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def named(mesh: Mesh, specs):
    """PartitionSpecs to NamedShardings of one mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def batch_spec(leaf) -> PartitionSpec:
    """Rows over replica and fsdp; everything else of a batch leaf is whole on its device."""
    return PartitionSpec(ACTIVATIONS["rows"], *([None] * (leaf.ndim - 1)))


def row_share(mesh: Mesh, rows: int) -> tuple[int, int]:
    """(index, count): which of how many equal shares of a batch's rows this process's devices hold.

    Processes whose devices hold the same rows, along context or tensor, have the same share. `rows` divides over the mesh.
    Raises UserError where a process's rows are not one block.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ACTIVATIONS["rows"]))
    held = sorted({part.indices(rows)[:2] for (part,) in sharding.addressable_devices_indices_map((rows,)).values()})
    first, size = held[0][0], sum(stop - start for start, stop in held)
    if held[-1][1] - first != size or first % size or rows % size:
        raise UserError("mesh: the rows of one process are not one block; put context and tensor within a process")
    return first // size, rows // size


def put_batch(batch, mesh: Mesh):
    """Place this process's rows of a batch on the mesh as one global array a leaf."""

    def put(leaf):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, batch_spec(leaf)), np.asarray(leaf))

    return jax.tree.map(put, batch)


def put_whole_batch(batch, mesh: Mesh):
    """The same of a batch that every process holds whole."""

    def put(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, batch_spec(leaf)), lambda index: leaf[index])

    return jax.tree.map(put, batch)


def gathered(x):
    """Arrays as they leave a jitted function for numpy: whole on every device, so that every process can read them."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), x)
