"""What devices send to each other in a compiled program: kinds, counts, bytes, along which axes of the mesh.

May hold the reading of collectives from an `hlo.Program`. Bytes are what one device has to send over its links with the
best known algorithm of each kind (Thakur et al. 2005; on a ring of n: gather, scatter and exchange (n-1)/n of the whole,
reduction twice that), not the size of an operand.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from g4v_jax.plan.hlo import Instruction, Program
from g4v_jax.sharding import slice_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
BY_HAND = "1"  # the channel of all collectives that a program asks for itself, in JAX
FUSED_SCATTER = "all-reduce-scatter"  # a TPU's reduction and the slice of it, in one kernel that sends each device its part


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along the same axes, for one tower, in one run of the program."""

    kind: str  # of KINDS, or "dcn" for a TPU's transfers between slices
    axis: str  # names of mesh axes joined by "+", as the groups span them
    slow: bool  # whether a group spans slices or nodes
    tower: str
    along: tuple[tuple[int, int], ...]  # which sides of a torus the groups span, and over how many chips; () without one
    count: int  # executions
    bytes: int  # that one device sends


def collectives(program: Program, mesh: Mesh, tower_of) -> list[Collective]:
    """The collectives of a program that was compiled for `mesh`, largest first.

    `tower_of(scope)` names the tower of an instruction by its scope. An instruction that the compiler repeats under one
    channel, as it does to overlap a gather with several products, counts once.
    """
    seen: dict = {}
    for inside, one, often in program.instructions():
        kind = _kind(one, inside)
        if kind is None:
            continue
        key = (kind, _asked_for(one, kind, often, mesh.devices.size))
        if key not in seen or often < seen[key][1]:
            seen[key] = (one, often)
    totals: dict[tuple, list[int]] = {}
    for (kind, _), (one, often) in seen.items():
        axis, size, slow, sides = ("replica", 2, True, ()) if kind == "dcn" else _span(one, kind, mesh)
        if size > 1:
            total = totals.setdefault((kind, axis, slow, tower_of(one.scope), sides), [0, 0])
            total[0] += often
            total[1] += often * _sent(one, kind, size)
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda one: -one.bytes)


def _kind(one: Instruction, inside: str) -> str | None:
    """Of KINDS, or "dcn", of an instruction in the computation `inside`; None of all others."""
    if one.opcode == "send" and "is_host_transfer=true" in one.rest:
        return "dcn"
    kind = next((kind for kind in KINDS if one.opcode in (kind, f"{kind}-start")), None)
    return "reduce-scatter" if kind == "all-reduce" and inside.startswith(FUSED_SCATTER) else kind


def _asked_for(one: Instruction, kind: str, often: int, devices: int) -> object:
    """What the repeats of one collective have in common: its channel, where it has one of its own."""
    channel = re.search(r"channel_id=(\d+)", one.rest)
    if channel and channel[1] != BY_HAND:
        return channel[1]
    if channel and kind == "all-gather":  # the others are not repeated
        return one.scope, *_group(one, devices)[:2], often
    return one.name


def _sent(one: Instruction, kind: str, size: int) -> int:
    """Bytes that each of `size` devices sends in one execution."""
    sizes = [array.bytes for array in one.arrays]
    if kind in ("collective-permute", "dcn", "collective-broadcast"):
        return sizes[0]
    if kind == "reduce-scatter" and one.opcode.startswith("all-reduce"):
        return sum(sizes) * (size - 1) // size
    if kind in ("all-gather", "reduce-scatter"):
        both = one.opcode.endswith("-start") and len(sizes) > 1  # a start's type is (operands, results)
        results = sum(sizes[len(sizes) // 2 :]) if both else sum(sizes)
        return results * (size - 1) // size if kind == "all-gather" else results * (size - 1)  # the latter a share already
    if kind == "all-reduce":
        return 2 * sum(sizes) * (size - 1) // size
    return sum(sizes) * (size - 1) // size


def along(devices: Sequence) -> tuple[tuple[int, int], ...]:
    """Which sides of a torus devices differ along, and in how many places; () for what lies on none."""
    places = zip(*(getattr(device, "coords", None) or () for device in devices))
    return tuple((side, len(set(at))) for side, at in enumerate(places) if len(set(at)) > 1)


def _span(one: Instruction, kind: str, mesh: Mesh) -> tuple[str, int, bool, tuple[tuple[int, int], ...]]:
    """(axes, group size, slow, sides) of a collective."""
    group = np.array(_pair(one) if kind == "collective-permute" else _group(one, mesh.devices.size))
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    axes = [name for name, at in zip(mesh.axis_names, places) if len(set(at.tolist())) > 1]
    here = [mesh.devices.flat[i] for i in group]
    apart = {device.process_index if device.platform == "gpu" else slice_of(device) for device in here}  # nodes or slices
    return "+".join(axes), len(group), len(apart) > 1, along(here)


def _pair(one: Instruction) -> Sequence[int]:
    """A source and its target that differ; of a permutation that moves nothing, one device."""
    pairs = re.findall(r"\{(\d+),(\d+)\}", one.attribute("source_target_pairs") or "")
    return next(([int(a), int(b)] for a, b in pairs if a != b), [0])


def _group(one: Instruction, devices: int) -> Sequence[int]:
    """The devices of the first group, in any of the four spellings."""
    text = re.search(r"replica_groups=(.*)", one.rest)
    text = text[1] if text else ""
    listed = re.match(r"\{\{([\d,]+)\}", text)
    if listed:
        return [int(i) for i in listed[1].split(",")]
    named = re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return places[first].reshape(-1).tolist()
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        groups, shape = ([int(i) for i in part.split(",")] for part in iota.groups()[:2])
        places = np.arange(math.prod(shape)).reshape(shape)
        if iota[3]:
            places = places.transpose([int(i) for i in iota[3].split(",")])
        return places.reshape(groups)[0].tolist()
    return list(range(devices))  # no groups: all of them
