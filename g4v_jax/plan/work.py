"""What one device does in a compiled program: arithmetic of matrix products, and bytes to and from its memory, by tower.

May hold both counts over an `hlo.Program`. A compiler's own estimate sees a loop's body once, so it is not used. Kernels
written by hand (Pallas, cuDNN) are opaque in the text and count nothing here; `flops.kernels` sees what Pallas does.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

from g4v_jax.plan.hlo import Instruction, Program

# what moves nothing by itself: names of values, and halves of what is counted where it starts or ends
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id iota "
    "copy-done all-gather-done all-reduce-done collective-permute-done send-done recv-done async-done async-update "
    "opt-barrier domain".split()
)
SLICES = ("dynamic-slice", "slice", "gather")  # read a part of their first operand


def flops(program: Program, tower_of: Callable[[str], str]) -> Counter:
    """Operations of one device by tower: two a multiply-add, as often as loops turn; padding with zeros counts nothing."""
    found: Counter = Counter()
    for name, one, often in program.instructions():
        if one.opcode in ("dot", "convolution"):
            count = _dot if one.opcode == "dot" else _convolution
            found[tower_of(one.scope)] += often * count(one, program.named[name])
    return found


def traffic(program: Program, tower_of: Callable[[str], str]) -> Counter:
    """Bytes that one device reads from and writes to its memory, by tower.

    Every kernel reads its operands and writes its results; of what it only slices, or updates in place, the slice counts.
    """
    found: Counter = Counter()
    for name, one, often in program.instructions():
        if name not in program.fused and one.opcode not in FREE:
            found[tower_of(one.scope)] += often * _moved(program, one, program.named[name])
    return found


def _moved(program: Program, one: Instruction, types: dict[str, Instruction]) -> int:
    sizes = [_in_memory(types[name]) if name in types else 0 for name in one.operands]
    results = _in_memory(one)
    if one.opcode in SLICES:
        return 2 * results
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(sizes[1:])
    if one.opcode == "copy-start":  # its type holds source, copy and a context
        return sum(sizes) + sum(array.bytes for array in one.arrays[:1] if array.in_hbm)
    if one.opcode != "fusion":
        return sum(sizes) + results
    inside, types = program.computations[one.called[0]], program.named[one.called[0]]
    parameters = {int(line.rest.split(")")[0]): line for line in inside if line.opcode == "parameter"}
    for place, parameter in parameters.items():
        if place < len(sizes) and sizes[place]:
            sizes[place] = min(sizes[place], _read(parameter, inside))
    updates = [line for line in inside if line.opcode == "dynamic-update-slice"]
    if updates:  # in place: of each buffer only the update is written
        whole = sum(_in_memory(line) for line in updates)
        parts = sum(_size(types[line.operands[1]]) for line in updates if line.operands[1] in types)
        results = max(0, results - whole) + min(parts, results)
    return sum(sizes) + results


def _read(parameter: Instruction, inside: list[Instruction]) -> int:
    """Bytes that a fused computation reads of one parameter."""
    total = 0
    for line in inside:
        if parameter.name in line.operands:
            if line.opcode in SLICES and line.operands[0] == parameter.name:
                total += _size(line)
            elif line.opcode == "dynamic-update-slice" and line.operands[0] == parameter.name:
                continue
            else:
                return _size(parameter)
    return total


def _in_memory(one: Instruction) -> int:
    return sum(array.bytes for array in one.arrays if array.in_hbm)


def _size(one: Instruction) -> int:
    return sum(array.bytes for array in one.arrays)


def _dot(one: Instruction, types: dict[str, Instruction]) -> int:
    left = types[one.operands[0]].arrays[0].shape
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    sizes = [left[int(i)] for i in contracted[1].split(",") if i] if contracted else []
    return 2 * math.prod(one.arrays[0].shape) * math.prod(sizes)


def _convolution(one: Instruction, types: dict[str, Instruction]) -> int:
    """A batched product is a convolution too on a TPU, over a window that mostly meets zeros: these are left out."""
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    x, k = (types[name].arrays[0].shape for name in one.operands[:2])
    y = one.arrays[0].shape
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or [None, ""])[1]))
    axes = sorted(label for label in inputs if label.isdigit())  # as the window's fields are, whatever the layout's order

    def along(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(axes)

    taps = 1
    fields = [along(name, default) for name, default in
              (("pad", "0_0"), ("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))]  # fmt: skip
    for label, pad, *rest in zip(axes, *fields):
        sizes = (x[inputs.index(label)], k[kernel.index(label)], y[outputs.index(label)])
        taps *= met(*sizes, int(pad.split("_")[0]), *map(int, rest))
    return 2 * taps * y[outputs.index("b")] * y[outputs.index("f")] * k[kernel.index("i")]


def met(length: int, kernel: int, out: int, pad: int, stride: int, dilation: int, kernel_dilation: int) -> int:
    """Pairs of (output, tap) along one axis that meet an input and not a padded or dilated zero."""
    last = (length - 1) * dilation
    count = 0
    for tap in range(kernel):
        offset = tap * kernel_dilation - pad
        count += sum(1 for o in range(out) if 0 <= (at := o * stride + offset) <= last and at % dilation == 0)
    return count
