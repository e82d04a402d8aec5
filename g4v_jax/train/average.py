"""A run between two others: the weights of one moved part of the way towards those of another that went on from it.

Fine-tuning on a new matter forgets some of the old; weights between start and end often keep nearly all of both
(WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903). May hold the averaging of saved runs; what a run averages while it
trains is `TrainState.ema`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from g4v_jax import trees
from g4v_jax.errors import UserError, nearest
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.manifest import verify_frozen
from g4v_jax.train.saved import SavedRun
from g4v_jax.train.state import TrainState


def average(first: Path, second: Path, weight: float, out: Path, shapes: dict, whole: Sequence[str] = ()) -> int:
    """Save in `out` the run (1 - weight) * first + weight * second -> its step, the second's.

    `shapes`: nested ShapeDtypeStructs with shardings of what the second run trains; a moving average counts where a
    run has one. Towers named in `whole` are the second's as they are, such as a head that the first never trained. The
    new run has no optimizer: it is for use, and to start others from. Raises UserError where the two do not stand on the
    same frozen weights, or have leaves of other names or shapes, or `out` is taken.
    """
    towers = sorted(shapes)
    for name in whole:
        if name not in towers:
            raise UserError(f"average: {second} trains no tower {name!r}{nearest(name, towers)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"average: {out} is there already; choose another --out")
    _check_same_frozen(first, second)
    ends = SavedRun(second)
    trained = trees.flatten(ends.load(shapes))
    mixed = {path for path in trained if path.split("/")[0] not in whole}
    starts = trees.flatten(SavedRun(first).load(trees.split(shapes, mixed)[0])) if mixed else {}
    trained |= {path: (1 - weight) * starts[path] + weight * trained[path] for path in mixed}

    out.mkdir(parents=True, exist_ok=True)
    if (second / "frozen").exists():
        shutil.copytree(second / "frozen", out / "frozen")
    state = TrainState(jnp.asarray(ends.step, jnp.int32), trees.unflatten(trained), (), {})
    with Checkpoints(out, every_steps=1, keep=1) as checkpoints:
        about = {"first": str(first), "second": str(second), "weight": weight, "whole": list(whole)}
        checkpoints.save(ends.step, jax.block_until_ready(state), {}, {"average": about}, force=True)
    return ends.step


def _check_same_frozen(first: Path, second: Path) -> None:
    """Raise UserError unless both runs stand on the same, undamaged frozen weights."""
    contents = []
    for frozen in (first / "frozen", second / "frozen"):
        if frozen.exists():
            verify_frozen(frozen)
            contents.append(json.loads((frozen / "manifest.json").read_text())["content"])
        else:
            contents.append(None)
    if contents[0] != contents[1]:
        raise UserError(
            f"average: {first} and {second} stand on different frozen weights; one must have begun from the other and "
            "trained the same leaves"
        )
