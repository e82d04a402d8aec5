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


def kernels(traced: core.ClosedJaxpr, towers: Sequence[str]) -> Counter:
    """Of `count` what is done inside of kernels (Pallas), whose text a compiler does not show."""
    found: Counter = Counter()
    _walk(traced.jaxpr, 1, REST, tuple(towers), found, inside=False)
    return found


def model(traced: core.ClosedJaxpr, learned: Sequence[bool], towers: Sequence[str]) -> Counter:
    """Operations that a traced loss and its gradient cannot do without, by tower: what "model FLOPs" stands for.

    `learned`: of each input of the trace, whether its gradient is wanted. A product counts once for the loss, and once
    more for each of its two operands that hangs on something learned: three times between learned weights and activations
    under way to others, twice where weights are frozen but LoRA lies before them, once in a tower that nothing reaches back to.
    """
    found: Counter = Counter()
    _needed(traced.jaxpr, list(learned), 1, REST, tuple(towers), found)
    return found


def _needed(jaxpr: core.Jaxpr, learned: list[bool], times: int, outer: str, towers, found: Counter) -> list[bool]:
    """Adds to `found`; returns which outputs hang on what is learned."""
    active = dict(zip(jaxpr.invars, learned, strict=True))

    def of(atoms) -> list[bool]:
        return [not isinstance(atom, core.Literal) and active.get(atom, False) for atom in atoms]

    for eqn in jaxpr.eqns:
        tower = outer if outer != REST else tower_of(str(eqn.source_info.name_stack), towers)
        name, inputs = eqn.primitive.name, of(eqn.invars)
        if name == "stop_gradient":
            outputs = [False]
        elif name in _COUNTED:
            found[tower] += times * _COUNTED[name](eqn) * (1 + sum(inputs[:2]))
            outputs = [any(inputs)]
        elif name == "scan":
            consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
            body, before = eqn.params["jaxpr"].jaxpr, None
            while before != inputs:  # what one turn makes active is so in the next
                before = inputs
                outputs = _needed(body, inputs, 1, tower, towers, Counter())
                carry = [a or b for a, b in zip(inputs[consts : consts + carried], outputs[:carried])]
                inputs = [*inputs[:consts], *carry, *inputs[consts + carried :]]
            outputs = _needed(body, inputs, times * eqn.params["length"], tower, towers, found)
        elif name == "cond":
            branches = []
            for branch in eqn.params["branches"]:
                inside: Counter = Counter()
                branches.append((inside, _needed(branch.jaxpr, inputs[1:], times, tower, towers, inside)))
            found.update(max((inside for inside, _ in branches), key=lambda one: sum(one.values())))
            outputs = [any(of_all) for of_all in zip(*(out for _, out in branches))]
        else:
            outputs = [any(inputs)] * len(eqn.outvars)
            for inner in _inner(eqn):
                if len(inner.invars) == len(inputs) and len(inner.outvars) == len(eqn.outvars):
                    outputs = _needed(inner, inputs, times * _turns(eqn), tower, towers, found)
                else:
                    _walk(inner, times * _turns(eqn), tower, towers, found)
        active |= zip(eqn.outvars, outputs)
    return of(jaxpr.outvars)


def _walk(
    jaxpr: core.Jaxpr, times: int, outer: str, towers: tuple[str, ...], found: Counter, inside: bool = True
) -> None:
    """`inside`: whether what this jaxpr holds counts, or only what kernels in it hold."""
    for eqn in jaxpr.eqns:
        tower = outer if outer != REST else tower_of(str(eqn.source_info.name_stack), towers)
        name = eqn.primitive.name
        if name in _COUNTED:
            if inside:
                found[tower] += times * _COUNTED[name](eqn)
        elif name == "cond":
            branches = [_of(branch, times, tower, towers, inside) for branch in eqn.params["branches"]]
            found.update(max(branches, key=lambda one: sum(one.values())))
        elif name == "while":
            turn = _of(eqn.params["body_jaxpr"], 1, tower, towers, inside)
            if turn:
                raise ValueError(f"a loop without a known number of turns does {sum(turn.values())} operations a turn")
        else:
            often = times * _turns(eqn)
            for inner in _inner(eqn):
                _walk(inner, often, tower, towers, found, inside or name == "pallas_call")


def _of(jaxpr, times: int, outer: str, towers: tuple[str, ...], inside: bool) -> Counter:
    found: Counter = Counter()
    _walk(getattr(jaxpr, "jaxpr", jaxpr), times, outer, towers, found, inside)
    return found


def tower_of(scope: str, towers: Sequence[str]) -> str:
    """Tower of an operation by the scope that it was traced in, "transpose(jvp(GPT4Video.read))/llm.hidden/...": what
    encloses it from further out wins.
    """
    return next((word for word in re.split(r"[/().]", scope) if word in towers), REST)


def _turns(eqn) -> int:
    """How often the jaxprs inside an operation run."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "shard_map":  # its body sees one device's part
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
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
