"""Name tables: which foreign tensor is (a layer of) which of our leaves, and how its axes lie. Read in both directions.

May hold the table's parts and the checked plan of a conversion; reads and writes no files, knows no family.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import sharding, trees
from g4v_jax.errors import UserError, nearest
from g4v_jax.weights.forward import FORWARD, example


@dataclasses.dataclass(frozen=True)
class Layout:
    """A reversible change of axes: `ours(x, shape)` gives our leaf (or layer of it) of `shape`, `theirs(x)` goes back.

    Both only reshape and transpose, so values pass through bit for bit.
    """

    ours: Callable
    theirs: Callable


FLAT = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))  # biases that we keep as [H d]
SAME = Layout(lambda x, shape: x, lambda x: x)


def kernel(inputs: int = 1) -> Layout:
    """A torch Linear's weight [out in] as our kernel [*in *out] with that many input axes."""
    return Layout(
        lambda x, shape: x.transpose().reshape(shape),
        lambda x: x.reshape(math.prod(x.shape[:inputs]), -1).transpose(),
    )


def conv() -> Layout:
    """A torch convolution's weight [O I *taps] as Flax's [*taps I O]."""
    return Layout(
        lambda x, shape: x.transpose(*range(2, x.ndim), 1, 0),
        lambda x: x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)),
    )


def patches(taps: tuple[int, ...], channels: int) -> Layout:
    """A convolution whose stride is its kernel, [O I *taps], as a linear map of flattened patches [taps·I O]."""
    return Layout(
        lambda x, shape: x.transpose(*range(2, x.ndim), 1, 0).reshape(shape),
        lambda x: conv().theirs(x.reshape(*taps, channels, -1)),
    )


def reshaped(shape: tuple[int, ...]) -> Layout:
    """The same numbers under their `shape`: tables that a reference keeps with axes of length one."""
    return Layout(lambda x, ours: x.reshape(ours), lambda x: x.reshape(shape))


def interleaved(base: Layout, head_dim: int) -> Layout:
    """`base`, where the reference rotates pairs (2i, 2i + 1) of a head and we rotate (i, i + d/2)."""

    def swap(x, pairs):
        return x.reshape(*x.shape[:-1], -1, *pairs).swapaxes(-1, -2).reshape(x.shape)

    return Layout(
        lambda x, shape: swap(base.ours(x, shape), (head_dim // 2, 2)),
        lambda x: base.theirs(swap(x, (2, head_dim // 2))),
    )


def part(base: Layout, view: tuple[int, ...], axis: int, index: int) -> Layout:
    """`base` of entry `index` on `axis` of a tensor whose first axis is seen as `view`: q, k and v that are kept fused.

    `theirs` gives the whole tensor with negative zeros for the other parts, and the sum of all parts is the fused
    tensor: x + -0.0 is x bit for bit, also where x is a zero of either sign.
    """

    def ours(x, shape):
        rest = x.shape[1:]
        return base.ours(x.reshape(*view, *rest)[(slice(None),) * axis + (index,)].reshape(-1, *rest), shape)

    def theirs(x):
        x = base.theirs(x)
        rest, numbers = x.shape[1:], x.__array_namespace__()
        x = x.reshape(*view[:axis], *view[axis + 1 :], *rest)
        others = numbers.full_like(x, -0.0)
        return numbers.stack([x if i == index else others for i in range(view[axis])], axis).reshape(-1, *rest)

    return Layout(ours, theirs)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table. `{}` in the foreign name is the layer, where our leaf stacks layers on its first axis."""

    path: str  # of our leaf, within its tower
    name: str
    layout: Layout = SAME


def affine(path: str, name: str, weight: Layout | None = None, bias: Layout | None = FLAT) -> list[Entry]:
    """The leaves of a norm (no `weight`) or of a linear map whose kernel lies as `weight`; `bias` None: it has none."""
    first = Entry(f"{path}/kernel", f"{name}.weight", weight) if weight else Entry(f"{path}/scale", f"{name}.weight")
    return [first, *([Entry(f"{path}/bias", f"{name}.bias", bias)] if bias else [])]


@dataclasses.dataclass(frozen=True)
class Family:
    """A published kind of tower: how its config.json and its tensors correspond to one of our modules."""

    name: str
    tower: str  # llm, vision, summarizer, denoiser or autoencoder
    architectures: tuple[str, ...]  # as config.json names them; the first is written by export
    module: type[nn.Module]
    fields: Callable[[dict], dict]  # config.json -> fields of the module; raises UserError for what is not supported
    config: Callable[[nn.Module], dict]  # module -> config.json
    fits: Callable[[nn.Module], str | None]  # None, or why this family cannot express a module of its type
    entries: Callable[[nn.Module], list[Entry]]
    left: Callable[[nn.Module], dict[str, str]] = lambda module: {}  # pattern of foreign names -> why they are left
    prefix: str = ""  # that the reference may or may not put before every name, as a pattern: "(vision_model\\.)?"
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # pattern in older files -> what it is now
    neutral: Callable[[nn.Module], dict[str, tuple[tuple[int, ...], float]]] = lambda module: {}
    # names that are left but that the reference wants -> shape and value for a module that never had them

    def bare(self, name: str) -> str:
        """A foreign name as newer files have it, without the prefix, which only one of source and table may have."""
        name = re.sub(f"^{self.prefix}", "", name)
        for pattern, now in self.renamed.items():
            name = re.sub(pattern, now, name)
        return name


class Source(Protocol):
    """Foreign tensors by name, read one at a time."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Memory:
    """A Source over arrays that are there already."""

    arrays: Mapping[str, np.ndarray]

    def names(self):
        return self.arrays.keys()

    def shape(self, name):
        return tuple(self.arrays[name].shape)

    def dtype(self, name):
        return np.dtype(self.arrays[name].dtype)

    def read(self, name):
        return np.asarray(self.arrays[name])


@dataclasses.dataclass(frozen=True)
class Move:
    """One foreign tensor and its place: a whole leaf, or layer `layer` of it."""

    path: str
    layer: int | None
    name: str
    layout: Layout
    ours: tuple[int, ...]  # shape of the leaf, or of one layer of it
    theirs: tuple[int, ...]


def moves(entries: list[Entry], shapes: dict) -> list[Move]:
    """Every tensor that makes up a tower whose leaves are `shapes` (nested ShapeDtypeStructs), leaf by leaf.

    Raises ValueError where the table and the tower do not have the same leaves: a defect of the table.
    """
    flat, table = trees.flatten(shapes), {entry.path: entry for entry in entries}
    if flat.keys() != table.keys() or len(table) != len(entries):
        raise ValueError(f"name table and tower differ: {sorted(flat.keys() ^ table.keys())}")
    found = []
    for path, entry in table.items():
        stacked = "{}" in entry.name
        shape = tuple(flat[path].shape)
        one = shape[1:] if stacked else shape
        theirs = jax.eval_shape(entry.layout.theirs, jax.ShapeDtypeStruct(one, np.float32)).shape
        for layer in range(shape[0]) if stacked else (None,):
            name = entry.name.format(layer) if stacked else entry.name
            found.append(Move(path, layer, name, entry.layout, one, tuple(theirs)))
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion: every tensor of the source has a place or a reason to be left."""

    moves: list[Move]
    names: dict[str, str]  # name in the table -> name in the source
    left: dict[str, str]  # name in the source -> why it is left


def plan(family: Family, module: nn.Module, source: Source, ignore: Iterable[str] = ()) -> Plan:
    """Match a source against a family's table.

    `ignore`: patterns of further names to leave. Raises UserError for a tensor that is missing, that has no place, or
    that has another shape than the config says.
    """
    wanted = moves(family.entries(module), tower_shapes(family.tower, module))
    held = {family.bare(name): name for name in source.names()}
    reasons = family.left(module) | {pattern: "named by --ignore" for pattern in ignore}
    names = {family.bare(move.name) for move in wanted}
    missing = sorted(names - held.keys())
    if missing:
        hint = nearest(missing[0], held.keys() - names) if held.keys() - names else ""
        raise UserError(f"{family.name}: {len(missing)} tensors are missing, the first {missing[0]!r}{hint}")
    left, unused = {}, []
    for name in held.keys() - names:
        why = next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)
        unused.append(name) if why is None else left.update({held[name]: why})
    if unused:
        raise UserError(
            f"{family.name}: {len(unused)} tensors have no place, the first {min(unused)!r}; "
            "name them by --ignore=PATTERN to leave them"
        )
    found = {move.name: held[family.bare(move.name)] for move in wanted}
    for move in wanted:
        shape = tuple(source.shape(found[move.name]))
        if shape != move.theirs:
            raise UserError(
                f"{family.name}: {found[move.name]} is {list(shape)}, but config.json makes it {list(move.theirs)}"
            )
    return Plan(wanted, found, left)


def load(family: Family, module: nn.Module, source: Source, ignore: Iterable[str] = ()) -> dict:
    """A tower's whole parameter tree in memory, for small ones. Errors as `plan`."""
    checked, leaves = plan(family, module, source, ignore), {}
    for move in checked.moves:
        value = move.layout.ours(source.read(checked.names[move.name]), move.ours)
        leaves.setdefault(move.path, []).append(value)
    stacked = {move.path for move in checked.moves if move.layer is not None}
    return trees.unflatten({path: np.stack(x) if path in stacked else x[0] for path, x in leaves.items()})


def unload(family: Family, module: nn.Module, params: dict) -> dict[str, np.ndarray]:
    """`load` backwards: the foreign state dict of a tower's parameters."""
    flat, out = trees.flatten(params), {}
    for move in moves(family.entries(module), params):
        leaf = np.asarray(flat[move.path])
        value = move.layout.theirs(leaf if move.layer is None else leaf[move.layer])
        out[move.name] = out[move.name] + value if move.name in out else value  # parts of a fused tensor: see `part`
    return out


def boxed_shapes(tower: str, module: nn.Module) -> dict:
    """The tower's parameters as nested ShapeDtypeStructs with logical names, under the mesh that is set."""

    def init(arrays):
        return module.init(jax.random.key(0), arrays, jnp.float32, method=FORWARD[tower])["params"]

    return jax.eval_shape(init, example(tower, module))


def tower_shapes(tower: str, module: nn.Module) -> dict:
    """The tower's parameters as nested ShapeDtypeStructs: nothing is computed."""
    with jax.set_mesh(sharding.one_device()):
        return nn.meta.unbox(boxed_shapes(tower, module))
