"""One side of a comparison: `python -m g4v_jax.bench.worker JSON`, which `turns.Side` starts and talks to.

May hold the conversation, a line of JSON each way, and which side is whose. It says what it is once it is warm; then each
line in is a number of steps, and each line out their seconds and the most memory that it has held since. End of input ends it.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def main(about: dict) -> int:
    """`about`: {"side": one of `SIDES`, "config": JSON of a config, "work": "step" or "decode", and what decoding takes}."""
    from g4v_jax.errors import UserError
    from g4v_jax.heap import give_back

    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    try:
        counts, run = _side(about)
        run(2)  # compiles, and touches all memory
        give_back()
    except UserError as error:
        print(f"g4v: error: {error}", file=sys.stderr)
        return 2
    _forget_peak()
    print(json.dumps(counts), file=talk, flush=True)
    for line in sys.stdin:
        seconds = run(int(line))
        print(json.dumps({"seconds": seconds, "peak": _peak()}), file=talk, flush=True)
    return 0


def _side(about: dict) -> tuple[dict[str, int], Callable[[int], list[float]]]:
    """({"parameters", of a step also "learned" ones}, what runs so many steps and gives the seconds of each)."""
    from ml_collections import ConfigDict

    from g4v_jax.build import Build

    build = Build(ConfigDict(about["config"]))
    if about["side"] != "ours":
        from g4v_jax.bench import peers

        return peers.side(about, build)
    if about["work"] == "decode":
        from g4v_jax.bench.decode import Decoding

        decoding = Decoding(build, about["batch"], about["prompt"], about["new"])
        return {"parameters": decoding.parameters}, decoding.run
    from g4v_jax import trees
    from g4v_jax.bench.step import Step

    step = Step(build)
    return {"parameters": trees.count(build.blueprint.shapes), "learned": trees.count(step.shapes.trainable)}, step.run


def _forget_peak() -> None:
    """Linux forgets the most memory held so far: weights' making and compiling are not a step's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # `_peak` then counts them, for both sides


def _peak() -> int:
    """Bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
