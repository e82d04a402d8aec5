"""Where a run's first parameters come from: initialisers, and other runs for the towers that start trained."""

from importlib import metadata
from pathlib import Path

import jax
import optax

from g4v_jax import trees
from g4v_jax.train.checkpoint import Checkpoints, restore_params
from g4v_jax.train.state import Blueprint, TrainState

RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "av", "tokenizers")


def versions() -> dict[str, str]:
    """Exact versions of the packages that a checkpoint depends on."""
    return {name: metadata.version(name) for name in RECORDED}


def frozen_tree(blueprint: Blueprint, checkpoints: Checkpoints, sources: dict[str, Path]) -> dict:
    """The frozen parameters: this run's own copy, or else the source runs', which are then kept as its copy."""
    shapes = blueprint.frozen_shapes
    if not shapes:
        return {}
    frozen = checkpoints.restore_frozen(shapes)
    if frozen is None:
        frozen = trees.merge(*(restore_params(sources[tower], {tower: shapes[tower]}) for tower in shapes))
        checkpoints.save_frozen(frozen, {tower: str(sources[tower]) for tower in shapes})
    return frozen


def first_state(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, key: jax.Array, sources: dict[str, Path]
) -> TrainState:
    """Initialise the state, then lay the source runs' weights over the towers that have one."""
    state = blueprint.create(key, optimizer)
    shapes, _ = trees.split(blueprint.shapes, blueprint.trainable)
    for tower in sources.keys() & shapes.keys():
        start = trees.flatten(restore_params(sources[tower], {tower: shapes[tower]}))
        trainable = trees.unflatten(trees.flatten(state.trainable) | start)
        averaged = {path: start.get(path, leaf) for path, leaf in trees.flatten(state.ema).items()}
        # a copy: the step donates its state, and the two trees must not share buffers
        state = state.replace(trainable=trainable, ema=jax.tree.map(jax.numpy.copy, trees.unflatten(averaged)))
    return state
