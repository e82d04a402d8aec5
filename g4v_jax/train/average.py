"""A run between two others: the weights of one moved part of the way towards those of another that went on from it.

Fine-tuning on a new matter forgets some of the old; weights between start and end often keep nearly all of both
(WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903). May hold the averaging of saved runs; what a run averages while it
trains is `TrainState.ema`.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from g4v_jax import trees
from g4v_jax.errors import UserError, nearest
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.saved import SavedRun
from g4v_jax.train.state import Blueprint, TrainState


def average_runs(
    first: Path, second: Path, weight: float, out: Path, blueprint: Blueprint, whole: Sequence[str] = ()
) -> int:
    """Save in `out` the run (1 - weight) * first + weight * second -> its step, the second's.

    `blueprint`: the second's; what it trains is averaged, and a moving average counts where a run has one. Towers
    named in `whole` are the second's as they are, such as a head that the first never trained. The new run has no
    optimizer: it is for use, and to start others from. Raises UserError where the two do not stand on the same frozen
    weights, or have leaves of other names or shapes, or `out` is taken.
    """
    shapes = blueprint.trainable_shapes
    towers = sorted(shapes)
    for name in whole:
        if name not in towers:
            raise UserError(f"average: {second} trains no tower {name!r}{nearest(name, towers)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"average: {out} is there already; choose another --out")
    starts, ends = SavedRun(first), SavedRun(second)
    if starts.frozen_content != ends.frozen_content:
        raise UserError(
            f"average: {first} and {second} stand on different frozen weights; one must have begun from the other and "
            "trained the same leaves"
        )
    trained = trees.flatten(ends.load(shapes))
    mixed = {path for path in trained if path.split("/")[0] not in whole}
    before = trees.flatten(starts.load(trees.split(shapes, mixed)[0]))
    trained |= {path: (1 - weight) * before[path] + weight * trained[path] for path in mixed}
    state = TrainState(jnp.asarray(ends.step, jnp.int32), trees.unflatten(trained), (), {})
    with Checkpoints(out, every_steps=1, keep=1) as checkpoints:
        if frozen := blueprint.frozen_shapes:
            checkpoints.save_frozen(ends.load(frozen), dict.fromkeys(frozen, str(second)))
        about = {"first": str(first), "second": str(second), "weight": weight, "whole": list(whole)}
        checkpoints.save(ends.step, state, {}, {"average": about}, force=True)
    return ends.step
