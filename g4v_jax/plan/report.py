"""A plan as data: what one device holds, does and sends in a step, and how fast that can be. `table` draws it for people.

    {"topology", "slices", "devices", "mesh",
     "memory": {"arguments", "outputs", "aliased", "temporaries", "peak", "needed", "idle"} bytes a device, "hbm" that it has,
     "flops": {"model", "compiled"} a device, "collectives": [{"kind", "axis", "slow", "count", "bytes"}, ...] a device,
     "bound": {"compute_s", "hbm_s", "ici_s", "dcn_s", "step_s", "mfu", "limit"}, null where a chip's rates are not known,
     "towers": {NAME: {"parameters": {"trainable", "frozen"}, "memory": {"arguments", "temporaries"}, "flops", "collectives",
                       "bound"}},
     "largest": [[bytes, type, tower, scope], ...], "compile_s"}

"needed" is what a device must have for the step: arguments, temporaries and outputs that are written elsewhere; on a TPU the compiler's
peak, by which it refuses, where that is less. "idle" is what a run holds beside it: frozen weights that training does not use, such as a
decoder's.
"""

from collections import Counter

from g4v_jax.build import Build
from g4v_jax.plan.account import describe, held, model_arithmetic
from g4v_jax.plan.compiled import Compiled
from g4v_jax.plan.flops import REST
from g4v_jax.plan.roofline import Bound, step_bound
from g4v_jax.plan.topology import Target


def report(target: Target, build: Build, compiled: Compiled) -> dict:
    """The plan of a compiled step as plain data, as in the head of this file."""
    mesh, model = build.mesh, model_arithmetic(build)
    whole, bounds = step_bound(target.chip, compiled, mesh.size, model) if target.chip.flops else (None, {})
    parameters, arguments = describe(build)["parameters"], _arguments(build)
    temporary = Counter()
    for one in compiled.fullest:
        temporary[one.tower] += one.bytes
    sending = {one.tower for one in compiled.collectives}
    names = sorted({*parameters, *compiled.flops, *compiled.traffic, *sending, *model} - {REST}) + [REST]
    towers = {
        name: {
            "parameters": parameters.get(name, {"trainable": 0, "frozen": 0}),
            "memory": {"arguments": arguments[name], "temporaries": temporary[name]},
            "flops": {"model": model.get(name, 0) / mesh.size, "compiled": compiled.flops.get(name, 0)},
            "collectives": _lines(one for one in compiled.collectives if one.tower == name),
            "bound": _bound(bounds.get(name)),
        }
        for name in names
    }
    return {
        "topology": target.name,
        "slices": target.slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "memory": compiled.memory | {"idle": max(0, sum(arguments.values()) - compiled.memory["arguments"])},
        "hbm": target.chip.hbm,
        "flops": {"model": sum(model.values()) / mesh.size, "compiled": sum(compiled.flops.values())},
        "collectives": _lines(compiled.collectives),
        "bound": _bound(whole),
        "towers": towers,
        "largest": [[one.bytes, one.type, one.tower, one.scope] for one in compiled.fullest[:8]],
        "compile_s": compiled.seconds,
    }


def _bound(bound: Bound | None) -> dict | None:
    return None if bound is None else bound.as_dict() | {"limit": bound.limit}


def _lines(collectives) -> list[dict]:
    """Collectives without their towers, summed."""
    totals: dict[tuple, list[int]] = {}
    for one in collectives:
        total = totals.setdefault((one.kind, one.axis, one.slow), [0, 0])
        total[0] += one.count
        total[1] += one.bytes
    rows = [dict(zip(("kind", "axis", "slow", "count", "bytes"), (*key, *total))) for key, total in totals.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def _arguments(build: Build) -> Counter:
    """Bytes a device that a step is given, by tower; the batch and what belongs to none under REST."""
    found: Counter = Counter()
    names = set(build.blueprint.shapes)
    for _, path, count in held(build):
        found[next((key for key in path if key in names), REST)] += count
    return found
