"""Where a run's first parameters come from: initialisers, and other runs for the towers that start trained."""

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from g4v_jax import trees
from g4v_jax.nn.stack import apart
from g4v_jax.sharding import on_one_cpu
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.saved import SavedRun
from g4v_jax.train.state import Blueprint, TrainState
from g4v_jax.weights.folder import TowerFolder, is_tower
from g4v_jax.weights.leaves import EXTRA

RECORDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "av", "tokenizers")


def versions() -> dict[str, str]:
    """Exact versions of the packages that a checkpoint depends on."""
    return {name: metadata.version(name) for name in RECORDED}


def _opened(sources: Iterable[Path]) -> dict[Path, TowerFolder | SavedRun]:
    """Each source opened once, however many towers start from it: a run is proven byte by byte when it is opened."""
    return {source: TowerFolder(source) if is_tower(source) else SavedRun(source) for source in set(sources)}


def _load(tower: str, source: TowerFolder | SavedRun, shapes: dict) -> dict:
    """Leaves {tower: `shapes`} from a run, or from an imported tower. Raises UserError as they do."""
    return {tower: source.load(shapes)} if isinstance(source, TowerFolder) else source.load({tower: shapes})


def _there(tower: str, source: TowerFolder | SavedRun, shapes: dict) -> dict:
    """Of a trainable tower's leaves those that its source can hold: LoRA and added words may begin from nothing."""
    if not isinstance(shapes, dict):  # "queries": one leaf
        return shapes
    held = source.shapes if isinstance(source, SavedRun) else {f"{tower}/{path}" for path in source.about["leaves"]}
    fresh = {path for path in trees.flatten(shapes) if f"{tower}/{path}" not in held and re.fullmatch(EXTRA, path)}
    return trees.split(shapes, fresh)[1]


def frozen_tree(blueprint: Blueprint, checkpoints: Checkpoints, sources: dict[str, Path]) -> dict:
    """The frozen parameters: this run's own copy, or else the source runs', which are then kept as its copy."""
    shapes = blueprint.frozen_shapes
    if not shapes:
        return {}
    frozen = checkpoints.restore_frozen(shapes)
    if frozen is None:
        opened = _opened(sources[tower] for tower in shapes)
        frozen = trees.merge(*(_load(tower, opened[sources[tower]], shapes[tower]) for tower in shapes))
        checkpoints.save_frozen(frozen, {tower: str(sources[tower]) for tower in shapes})
    return frozen


def laid_out(frozen: dict, towers: dict[str, nn.Module], mesh: Mesh) -> dict:
    """The frozen parameters as a step on this mesh reads them best; `frozen` is emptied where that is not as they are."""
    with jax.set_mesh(mesh):
        return apart(frozen, towers) if on_one_cpu() else frozen


def first_state(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, key: jax.Array, sources: dict[str, Path]
) -> TrainState:
    """Initialise the state, then lay the source runs' weights over the towers that have one."""
    state = blueprint.create(key, optimizer)
    shapes = blueprint.trainable_shapes
    towers = sources.keys() & shapes.keys()
    opened = _opened(sources[tower] for tower in towers)
    for tower in towers:
        source = opened[sources[tower]]
        start = trees.flatten(_load(tower, source, _there(tower, source, shapes[tower])))
        trainable = trees.unflatten(trees.flatten(state.trainable) | start)
        averaged = {path: start.get(path, leaf) for path, leaf in trees.flatten(state.ema).items()}
        # a copy: the step donates its state, and the two trees must not share buffers
        state = state.replace(trainable=trainable, ema=jax.tree.map(jax.numpy.copy, trees.unflatten(averaged)))
    return state
