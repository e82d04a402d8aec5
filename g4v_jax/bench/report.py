"""What was measured as data, and as lines for people."""

import statistics

import jax

from g4v_jax.bench.decode import Decoding
from g4v_jax.bench.step import Step
from g4v_jax.bench.turns import spread
from g4v_jax.plan.account import model_arithmetic
from g4v_jax.plan.chips import CHIPS, GIB

KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x", "A100": "a100",
         "H100": "h100", "H200": "h200", "B200": "b200"}  # begins of, or words in, what a device calls itself  # fmt: skip


def of_step(step: Step, pairs: int, steps: int) -> dict:
    """Time a step: alone and by the loop in turn, then by tower.

    -> {"device", "devices", "mesh", "seconds": of each step alone, "loop": seconds a step of each turn of the loop,
    "loop_over_step": the ratio's spread, "outside_step": share of wall time outside of steps, "tokens_per_second",
    "clips_per_second" (watched and rendered), "model_flops" of a step over all devices, "flops_per_second", "mfu" (None where
    the peak is not known), "towers": share of busy time}.
    """
    build = step.build
    step.run(2)  # the first compiles, and both touch all memory
    alone, looped, outside = [], [], []
    for _ in range(pairs):
        alone.append(step.run(steps))
        told = step.run_by_loop(steps)
        looped.append(told["seconds_per_step"])
        outside.append(told["outside_step"])
    seconds = statistics.median(value for turn in alone for value in turn)
    model = sum(model_arithmetic(build).values())
    peak = peak_flops(build.mesh.devices.flat[0])
    shape = build.shape
    return {
        "device": build.mesh.devices.flat[0].device_kind,
        "devices": build.mesh.size,
        "mesh": dict(build.mesh.shape),
        "seconds": [value for turn in alone for value in turn],
        "loop": looped,
        "loop_over_step": spread([one / statistics.median(turn) for one, turn in zip(looped, alone)]),
        "outside_step": statistics.median(outside),
        "tokens_per_second": shape.rows * shape.tokens / seconds,
        "clips_per_second": shape.rows * (shape.clips + shape.targets) / seconds,
        "model_flops": model,
        "flops_per_second": model / seconds,
        "mfu": model / seconds / (peak * build.mesh.size) if peak else None,
        "towers": step.by_tower(),
    }


def of_decoding(decoding: Decoding, times: int, sizes: dict) -> dict:
    """Time answers -> {**sizes, "seconds": of each answer, "tokens_per_second" written}."""
    decoding.run(2)
    seconds = decoding.run(times)
    made = sizes["batch"] * sizes["new"]
    return {**sizes, "seconds": seconds, "tokens_per_second": made / statistics.median(seconds)}


def peak_flops(device: jax.Device) -> float | None:
    """Published peak of a device in bfloat16, None where it is not known."""
    for name, chip in KINDS.items():
        if device.device_kind.startswith(name) or name in device.device_kind.split():
            return CHIPS[chip].flops
    return None


def step_table(figures: dict) -> str:
    """`of_step` for people."""
    seconds, mfu = figures["seconds"], figures["mfu"]
    loop = figures["loop_over_step"]
    lines = [
        f"{figures['devices']} x {figures['device']}, {len(seconds)} steps at chance weights and a batch of chance",
        f"  step                {statistics.median(seconds):10.4f} s   ({min(seconds):.4f} to {max(seconds):.4f})",
        f"  the loop around it  {loop['median']:10.4f} x   ({loop['least']:.4f} to {loop['most']:.4f}); outside of steps {figures['outside_step']:.2%}",
        f"  tokens              {figures['tokens_per_second']:10.1f} /s",
        f"  clips               {figures['clips_per_second']:10.1f} /s",
        f"  needed operations   {figures['flops_per_second'] / 1e9:10.1f} G/s"
        + (f"   MFU {mfu:.1%}" if mfu is not None else "   MFU unknown: so is this device's peak"),
    ]
    lines += [f"  {share:7.1%} of busy time in {tower}" for tower, share in figures["towers"].items()]
    return "\n".join(lines)


def decode_table(figures: dict) -> str:
    """`of_decoding` for people."""
    return (
        f"{figures['batch']} prompt(s) of {figures['prompt']} tokens, {figures['new']} written: {figures['tokens_per_second']:.1f} tokens/s, "
        f"{statistics.median(figures['seconds']):.4f} s an answer"
    )


def comparison(figures: dict, library: str) -> str:
    """`turns.compare` for people."""
    ratio = figures["ratio"]
    return (
        f"ours is {ratio['median']:.2f} times as fast as {library} ({ratio['least']:.2f} to {ratio['most']:.2f} over "
        f"{len(figures['ours']['seconds'])} pairs), with {figures['memory']:.2f} times its memory "
        f"({figures['ours']['peak'] / GIB:.2f} and {figures['theirs']['peak'] / GIB:.2f} GiB)"
    )
