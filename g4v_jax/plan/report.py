"""A plan as data and as a table: what one device holds, does and sends in a step, and how fast that can be.

May hold the form of the report, the same as JSON and for people.

    {"topology", "slices", "devices", "mesh",
     "memory": {"arguments", "outputs", "aliased", "temporaries", "peak", "idle"} bytes a device, "hbm" that it has,
     "flops": {"model", "compiled"} a device, "collectives": [{"kind", "axis", "slow", "count", "bytes"}, ...] a device,
     "bound": {"compute_s", "hbm_s", "ici_s", "dcn_s", "step_s", "mfu", "limit"}, null where a chip's rates are not known,
     "towers": {NAME: {"parameters": {"trainable", "frozen"}, "memory": {"arguments", "temporaries"}, "flops", "collectives",
                       "bound"}},
     "largest": [[bytes, type, tower, scope], ...], "compile_s"}

"idle" is what a run holds beside the step's arguments: frozen weights that training does not use, such as a decoder's.
"""

import math
from collections import Counter

import jax

from g4v_jax.build import Build
from g4v_jax.plan.account import describe, model_arithmetic
from g4v_jax.plan.compiled import Compiled
from g4v_jax.plan.flops import REST
from g4v_jax.plan.roofline import Bound, step_bound
from g4v_jax.plan.topology import Target

GIB = 2**30


def report(target: Target, build: Build, compiled: Compiled) -> dict:
    """The plan of a compiled step as plain data, as in the head of this file."""
    mesh, model = build.mesh, model_arithmetic(build)
    whole, bounds = step_bound(target.chip, compiled, mesh, model) if target.chip.flops else (None, {})
    parameters, held = describe(build)["parameters"], _arguments(build)
    temporary = Counter()
    for one in compiled.fullest:
        temporary[one.tower] += one.bytes
    sending = {one.tower for one in compiled.collectives}
    names = sorted({*parameters, *compiled.flops, *compiled.traffic, *sending, *model} - {REST}) + [REST]
    towers = {
        name: {
            "parameters": parameters.get(name, {"trainable": 0, "frozen": 0}),
            "memory": {"arguments": held.get(name, 0), "temporaries": temporary[name]},
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
        "memory": compiled.memory | {"idle": max(0, sum(held.values()) - compiled.memory["arguments"])},
        "hbm": target.chip.hbm,
        "flops": {"model": sum(model.values()) / mesh.size, "compiled": sum(compiled.flops.values())},
        "collectives": _lines(compiled.collectives),
        "bound": _bound(whole),
        "towers": towers,
        "largest": [[one.bytes, one.type, one.tower, one.scope] for one in compiled.fullest[:8]],
        "compile_s": compiled.seconds,
    }


def table(plan: dict) -> str:
    """A plan for people."""
    memory, flops, bound = plan["memory"], plan["flops"], plan["bound"]
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "one device"
    lines = [f"{plan['topology']}" + (f" x {plan['slices']} slices" if plan["slices"] > 1 else "") + f": {plan['devices']} devices, {mesh}", ""]
    lines += [f"{'tower':12}{'trainable':>16}{'frozen':>16}{'held GiB':>10}{'temp GiB':>10}{'model TF':>10}{'compiled':>10}{'sent GiB':>10}{'bound ms':>10}"]
    for name, one in plan["towers"].items():
        sent = sum(c["bytes"] for c in one["collectives"])
        step = f"{1e3 * one['bound']['step_s']:10.2f}" if one["bound"] else f"{'':>10}"
        lines.append(
            f"{name:12}{one['parameters']['trainable']:16,}{one['parameters']['frozen']:16,}{one['memory']['arguments'] / GIB:10.3f}"
            f"{one['memory']['temporaries'] / GIB:10.3f}{one['flops']['model'] / 1e12:10.3f}{one['flops']['compiled'] / 1e12:10.3f}{sent / GIB:10.3f}{step}"
        )
    held = memory["arguments"] + memory["idle"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    of = f" of {plan['hbm'] / GIB:.2f}" if plan["hbm"] else ""
    lines += ["", f"memory       arguments {memory['arguments'] / GIB:.3f}, idle {memory['idle'] / GIB:.3f}, temporaries {memory['temporaries'] / GIB:.3f}, "
              f"outputs not in their place {max(0, memory['outputs'] - memory['aliased']) / GIB:.3f}: {held / GIB:.2f}{of} GiB a device "
              f"(the compiler's peak {memory['peak'] / GIB:.2f})"]  # fmt: skip
    lines += [f"             {size / GIB:6.3f} GiB {kind:28} {tower:12} {scope[-60:]}" for size, kind, tower, scope in plan["largest"][:5]]
    ratio = flops["compiled"] / flops["model"] if flops["model"] else 0.0
    lines += [f"arithmetic   {flops['model'] / 1e12:.3f} TFLOP a device by the model, {flops['compiled'] / 1e12:.3f} compiled ({ratio:.3f} x)"]
    for one in plan["collectives"][:12]:
        slow = "  slow network" if one["slow"] else ""
        lines.append(f"{one['kind']:20} {one['axis']:14} {one['count']:6} times {one['bytes'] / GIB:9.3f} GiB sent{slow}")
    if bound:
        lines += [f"bound        arithmetic {1e3 * bound['compute_s']:.1f}, memory {1e3 * bound['hbm_s']:.1f}, links {1e3 * bound['ici_s']:.1f}, "
                  f"slow network {1e3 * bound['dcn_s']:.1f} ms; no step is faster than {1e3 * bound['step_s']:.1f} ms, "
                  f"MFU at most {100 * bound['mfu']:.1f} % ({bound['limit']})"]  # fmt: skip
    lines += [f"compiled in {plan['compile_s']:.1f} s"]
    return "\n".join(lines)


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
    held: Counter = Counter()
    state = build.blueprint.state_shapes(build.optimizer)
    names = set(build.blueprint.shapes)
    for tree in (state.trainable, state.ema, build.blueprint.frozen_shapes, state.opt_state, build.batch_shapes()):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            tower = next((key for key in keys if key in names), REST)
            held[tower] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return held
