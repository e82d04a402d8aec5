"""Floating-point operations of a traced function, counted from its jaxpr, by tower.

May hold counting alone. A compiler's own count sees a loop's body once and a kernel's not at all, so nothing of it is used.
Counted are matrix products and convolutions, two operations a multiply-add, of the whole global arrays; element-wise work
is memory's business.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from jax.extend import core

REST = "rest"  # what no tower's scope encloses


def count(traced: core.ClosedJaxpr, towers: Sequence[str]) -> Counter:
    """Operations of `jax.make_jaxpr(...)(...)` by tower: the outermost named scope that is one of `towers`, or REST.

    Loops count as often as they run, of a conditional the branch that costs most. Raises ValueError for a loop whose
    number of turns is not known before it runs and that has operations in it.
    """
    found: Counter = Counter()
    _walk(traced.jaxpr, 1, REST, tuple(towers), found)
    return found


def _walk(jaxpr: core.Jaxpr, times: int, outer: str, towers: tuple[str, ...], found: Counter) -> None:
    for eqn in jaxpr.eqns:
        tower = _tower(eqn, outer, towers)
        name = eqn.primitive.name
        if name in _COUNTED:
            found[tower] += times * _COUNTED[name](eqn)
        elif name == "cond":
            branches = [_of(branch, times, tower, towers) for branch in eqn.params["branches"]]
            found.update(max(branches, key=lambda one: sum(one.values())))
        elif name == "while":
            inside = _of(eqn.params["body_jaxpr"], 1, tower, towers)
            if inside:
                raise ValueError(f"a loop without a known number of turns does {sum(inside.values())} operations a turn")
        else:
            often = times * _turns(eqn)
            for inner in _inner(eqn):
                _walk(inner, often, tower, towers, found)


def _of(jaxpr, times: int, outer: str, towers: tuple[str, ...]) -> Counter:
    found: Counter = Counter()
    _walk(getattr(jaxpr, "jaxpr", jaxpr), times, outer, towers, found)
    return found


def _tower(eqn, outer: str, towers: tuple[str, ...]) -> str:
    """Tower of an operation: what encloses it from further out wins."""
    if outer != REST:
        return outer
    words = re.split(r"[/().]", str(eqn.source_info.name_stack))  # "transpose(jvp(GPT4Video.read))/llm.hidden/..."
    return next((word for word in words if word in towers), REST)


def _turns(eqn) -> int:
    """How often the jaxprs inside an operation run."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "shard_map":  # its body sees one device's part
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params["manual_axes"])
    return 1


def _inner(eqn) -> list[core.Jaxpr]:
    found = []
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                found.append(one)
            elif hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                found.append(one.jaxpr)
    return found


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)


def _convolution(eqn) -> int:
    """Per output: the kernel's taps times input channels of a group."""
    kernel, layout = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
    outputs = kernel[layout.rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // outputs


_COUNTED = {"dot_general": _dot, "conv_general_dilated": _convolution}
