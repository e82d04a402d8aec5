"""What lies in a device's memory when it is fullest: the buffers of a scheduled program, largest first, and whose they are.

May hold the walk over the schedule. A TPU's compiler tells the sum of its temporaries alone; here each value lives from the
instruction that makes it to the last that reads it, loops work in place, and what a step returns or is given does not count.
The compiler packs more cleverly and pads to tiles, so sums differ by some per cent: they say where memory goes, not how much.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from g4v_jax.plan.hlo import Instruction, Program

ALIASES = ("bitcast", "opt-barrier", "copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
           "async-done", "async-update", "while", "domain")  # fmt: skip
STARTS = ("all-gather-start", "all-reduce-start", "collective-permute-start", "copy-start", "async-start", "send", "recv")
NOTHING = ("parameter", "constant", "after-all", "partition-id", "replica-id", "iota")


@dataclass(frozen=True)
class Buffer:
    """One value in memory."""

    bytes: int
    type: str  # of its array, such as "bf16[8,2048,4096]"
    scope: str
    tower: str


def fullest(program: Program, tower_of: Callable[[str], str]) -> list[Buffer]:
    """The temporary buffers that live at the fullest moment of the program, largest first.

    `tower_of(scope)` names the tower of an instruction by its scope.
    """
    return sorted(_Walk(program, tower_of).peak(program.entry), key=lambda one: -one.bytes)


class _Walk:
    def __init__(self, program: Program, tower_of: Callable[[str], str]):
        self._program, self._tower_of = program, tower_of
        self._done: dict[str, list[Buffer]] = {}

    def peak(self, name: str) -> list[Buffer]:
        """The buffers of a computation at its fullest, with those of what it calls; its own parameters left out."""
        if name in self._done:
            return self._done[name]
        lines = self._program.computations[name]
        values: dict[str, object] = {}  # name -> a list of buffers, nested as tuples are
        last: dict[int, int] = {}
        born: list[tuple[int, Buffer]] = []  # (when, buffer)
        returned: set[int] = set()
        for when, one in enumerate(lines):
            values[one.name] = self._value(one, values, when, born)
            for operand in one.operands:
                for buffer in _leaves(values.get(operand)):
                    last[id(buffer)] = when
            if one.root:
                returned = {id(buffer) for buffer in _leaves(values[one.name])}
        inside = [self._inside(one) for one in lines]
        kept = [(when, last.get(id(buffer), when), buffer) for when, buffer in born if id(buffer) not in returned]
        change = [0] * (len(lines) + 1)
        for first, end, buffer in kept:
            change[first] += buffer.bytes
            change[end + 1] -= buffer.bytes
        totals = [own + sum(one.bytes for one in called) for own, called in zip(itertools.accumulate(change), inside)]
        full = max(range(len(lines)), key=totals.__getitem__, default=0)
        self._done[name] = [buffer for first, end, buffer in kept if first <= full <= end] + (inside[full] if inside else [])
        return self._done[name]

    def _inside(self, one: Instruction) -> list[Buffer]:
        """What the computations that an instruction runs hold at their fullest."""
        if one.opcode not in ("while", "conditional", "call"):
            return []
        held = [self.peak(name) for name in one.called]
        return max(held, key=lambda buffers: sum(buffer.bytes for buffer in buffers), default=[])

    def _value(self, one: Instruction, values: dict, when: int, born: list):
        of = [values.get(name) for name in one.operands]
        if one.opcode in NOTHING:
            return []
        if one.opcode == "tuple":
            return of
        if one.opcode == "get-tuple-element":
            whole, place = of[0] if of else [], int(one.attribute("index") or 0)
            return whole[place] if isinstance(whole, list) and place < len(whole) else []
        if one.opcode in ALIASES:
            return of[0] if of else []
        if one.opcode == "dynamic-update-slice" or self._updates(one):
            return of[0] if of and len(one.arrays) == 1 else of
        tower = self._tower_of(one.scope)
        made = [
            Buffer(array.bytes, f"{array.dtype}{list(array.shape)}", one.scope, tower)
            if array.in_hbm and array.bytes
            else None
            for array in one.arrays
        ]
        if one.opcode in STARTS:  # operands come back with the results
            made = made[len(of) :]
        found = [buffer for buffer in made if buffer is not None]
        born += [(when, buffer) for buffer in found]
        if one.opcode in STARTS:
            return found
        return [[buffer] if buffer else [] for buffer in made] if one.type.startswith("(") else found

    def _updates(self, one: Instruction) -> bool:
        """Whether a fusion only updates its operand in place."""
        if one.opcode != "fusion":
            return False
        root = next((line for line in self._program.computations[one.called[0]] if line.root), None)
        return root is not None and root.opcode == "dynamic-update-slice"


def _leaves(value) -> list[Buffer]:
    if isinstance(value, Buffer):
        return [value]
    return [leaf for part in value or () for leaf in _leaves(part)]
