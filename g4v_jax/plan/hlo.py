"""A compiled program's text as data: computations, instructions, and how often each of them runs.

May hold the reading of HLO text as XLA prints it after compiling; what is made of it is the business of `collectives`,
`traffic` and `work`. Trip counts come from `known_trip_count` where the compiler wrote it (GPU, CPU), else from the constant
that a loop's condition compares with (TPU).
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,<=]*)\](\{[^}]*\})?")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
LISTED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
OPERAND = re.compile(r"%([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # not in a faster memory of the core

    @property
    def bytes(self) -> int:
        bits = BITS.get(self.dtype) or int(re.search(r"\d+", self.dtype)[0]) if re.search(r"\d|pred", self.dtype) else 0
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    rest: str  # what stands behind the opening bracket
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its type; of a tuple all of them."""
        found = []
        for dtype, sizes, layout in ARRAY.findall(self.type):
            shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
            found.append(Array(dtype, shape, not re.search(r"S\([1-9]\)", layout)))
        return tuple(found)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of its operands, in order."""
        depth, end = 1, len(self.rest)
        for place, sign in enumerate(self.rest):
            depth += (sign == "(") - (sign == ")")
            if depth == 0:
                end = place
                break
        return tuple(OPERAND.findall(self.rest[:end]))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        listed = [name.strip().lstrip("%") for group in LISTED.findall(self.rest) for name in group.split(",")]
        return tuple([*CALLED.findall(self.rest), *filter(None, listed)])

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next attribute."""
        found = re.search(rf"\b{name}=(.*?)(?:, [a-z_]+=|$)", self.rest)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """The names under which the program was traced, such as "jit(step)/jvp(GPT4Video)/llm.hidden/..."."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Program:
    """All computations by name, in the order of the text: what is called comes before its caller."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def named(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation by their names."""
        return {name: {one.name: one for one in lines} for name, lines in self.computations.items()}

    @functools.cached_property
    def fused(self) -> set[str]:
        """Computations inside one kernel: their values never reach memory."""
        return {
            name
            for lines in self.computations.values()
            for one in lines
            if one.opcode not in ("while", "conditional", "call", "async-start")
            for name in one.called
        }

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program, 0 where never. A branch counts as always taken."""
        times: dict[str, int] = defaultdict(int, {self.entry: 1})
        for name in reversed(self.computations):
            for one in self.computations[name] if times[name] else ():
                turns = self.trips(one) if one.opcode == "while" else 1
                for called in one.called:
                    times[called] += times[name] * turns
        return dict(times)

    def trips(self, loop: Instruction) -> int:
        """Turns of a `while`. Raises ValueError where neither the compiler nor the condition tells."""
        known = TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]
        limits = [limit for name in self._below(condition) for limit in self._limits(name)]
        if not limits:
            raise ValueError(f"the number of turns of {loop.name} is not known")
        return max(limits)

    def _below(self, name: str) -> Iterator[str]:
        yield name
        for one in self.computations[name]:
            for called in one.called:
                yield from self._below(called)

    def _limits(self, name: str) -> Iterator[int]:
        """Whole numbers in a computation that compares something by "less than", itself or in a fusion that it calls."""
        lines = self.computations[name]
        if any(one.opcode == "fusion" or (one.opcode == "compare" and "direction=LT" in one.rest) for one in lines):
            for one in lines:
                value = re.match(r"(-?\d+)\)", one.rest) if one.opcode == "constant" else None
                if value and one.type.startswith(("s32[]", "u32[]", "s64[]")):
                    yield int(value[1])

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of everything that runs."""
        for name, lines in self.computations.items():
            often = self.times.get(name, 0)
            if often:
                yield from ((name, one, often) for one in lines)


def parse(text: str) -> Program:
    """Read `compiled.as_text()`. Raises ValueError where it holds no program."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in text.split("\n"):
        if lines is None:
            found = HEADER.match(line)
            if found:
                lines = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
        elif line == "}":  # exactly: a kernel's metadata may hold lines that begin with brackets
            lines = None
        else:
            found = LINE.match(line)
            if found:
                lines.append(Instruction(found[2], found[3], found[4], found[5], bool(found[1])))
    if not entry:
        raise ValueError("no compiled program in this text")
    return Program(computations, entry)
