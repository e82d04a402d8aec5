"""A plan for people: the table that `g4v plan` prints, made of what `report` says. Needs nothing of JAX."""

SHOWN = 12  # collectives, and 5 buffers


def mesh_text(mesh: dict[str, int]) -> str:
    """{"replica": 1, "fsdp": 4, "tensor": 2} -> "fsdp 4 x tensor 2"."""
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "one device"


def table(plan: dict) -> str:
    """A plan for people."""
    memory, flops, bound = plan["memory"], plan["flops"], plan["bound"]
    needed = memory["needed"] + memory["idle"]
    size, of_size = (2**30, "GiB") if needed >= 2**29 else (2**20, "MiB")
    work, of_work = (1e12, "TFLOP") if flops["compiled"] >= 1e11 else (1e9, "GFLOP")

    def bytes_(count: float) -> str:
        return f"{count / size:.3f}"

    slices = f" x {plan['slices']} slices" if plan["slices"] > 1 else ""
    rows = [("a device", "trainable", "frozen", f"held {of_size}", f"temp {of_size}", f"model {of_work}", "compiled", f"sent {of_size}", "bound ms")]
    for name, one in plan["towers"].items():
        sent = sum(c["bytes"] for c in one["collectives"])
        rows.append((
            name, f"{one['parameters']['trainable']:,}", f"{one['parameters']['frozen']:,}", bytes_(one["memory"]["arguments"]),
            bytes_(one["memory"]["temporaries"]), f"{one['flops']['model'] / work:.3f}", f"{one['flops']['compiled'] / work:.3f}",
            bytes_(sent), f"{1e3 * one['bound']['step_s']:.2f}" if one["bound"] else "",
        ))  # fmt: skip
    lines = [f"{plan['topology']}{slices}: {plan['devices']} devices, {mesh_text(plan['mesh'])}", "", *_columns(rows), ""]
    has = f" of {plan['hbm'] / size:.2f}" if plan["hbm"] else ""
    lines += [
        f"memory       {bytes_(needed)}{has} {of_size} needed: arguments {bytes_(memory['arguments'])}, idle {bytes_(memory['idle'])}, "
        f"temporaries {bytes_(memory['temporaries'])}, outputs elsewhere {bytes_(max(0, memory['outputs'] - memory['aliased']))}; "
        f"the compiler's peak {bytes_(memory['peak'])}"
    ]
    lines += [f"             {bytes_(count):>8} {kind:28} {tower:12} {scope[-60:]}" for count, kind, tower, scope in plan["largest"][:5]]
    ratio = flops["compiled"] / flops["model"] if flops["model"] else 0.0
    lines += [f"arithmetic   {flops['model'] / work:.3f} {of_work} by the model, {flops['compiled'] / work:.3f} compiled ({ratio:.3f} x)"]
    for one in plan["collectives"][:SHOWN]:
        slow = "  slow network" if one["slow"] else ""
        lines.append(f"sent         {bytes_(one['bytes']):>8} {of_size} {one['kind']:20} {one['axis']:14} {one['count']:6} times{slow}")
    if bound:
        lines += [
            f"bound        arithmetic {1e3 * bound['compute_s']:.1f}, memory {1e3 * bound['hbm_s']:.1f}, links {1e3 * bound['ici_s']:.1f}, "
            f"slow network {1e3 * bound['dcn_s']:.1f} ms; no step is faster than {1e3 * bound['step_s']:.1f} ms ({bound['limit']}), "
            f"MFU at most {100 * bound['mfu']:.1f} %"
        ]
    return "\n".join([*lines, f"compiled in {plan['compile_s']:.1f} s"])


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of texts as lines: the first column to the left, all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{text:{'<' if i == 0 else '>'}{width}}" for i, (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
