"""What a config costs before anything is compiled: parameters and bytes by tower, arithmetic, and how all is sharded.

May hold figures that follow from shapes and from the traced step; what a compiler makes of it is told by `compiled`.
"""

import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh

from g4v_jax import rng, trees
from g4v_jax.build import TOWERS, Build
from g4v_jax.nn import kernels
from g4v_jax.plan import flops
from g4v_jax.train.step import make_step

SCOPES = (*sorted(TOWERS), "optimizer")  # names under which a step is traced


def describe(build: Build) -> dict:
    """{"mesh", "parameters" by tower, "bytes_per_device" of what a step is given}. Raises UserError as `Build` does."""
    build.objective, build.step, build.pipeline, build.sample, build.evaluation
    blueprint = build.blueprint
    trainable, frozen = trees.split(blueprint.shapes, blueprint.trainable)
    size = dict.fromkeys(("trainable", "optimizer", "ema", "frozen", "batch"), 0)
    for part, _, count in held(build):
        size[part] += count
    return {
        "mesh": dict(build.mesh.shape),
        "parameters": {
            tower: {"trainable": trees.count(trainable.get(tower, {})), "frozen": trees.count(frozen.get(tower, {}))}
            for tower in sorted(blueprint.shapes)
        },
        "bytes_per_device": size,
    }


def held(build: Build) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Every array that a step is given: (part, path, bytes a device).

    Parts are "trainable", "optimizer", "ema", "frozen" and "batch"; a path is the keys of dictionaries on the way, so that of
    an optimizer's leaf ends with its parameter's, and that of a batch's is empty.
    """
    state = build.blueprint.state_shapes(build.optimizer)
    parts = {"trainable": state.trainable, "optimizer": state.opt_state, "ema": state.ema}
    parts |= {"frozen": build.blueprint.frozen_shapes, "batch": build.batch_shapes()}
    for part, tree in parts.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            keys = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
            yield part, keys, math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def scores_of_attention(build: Build, tower, length: int) -> int:
    """Scores of all heads that a device holds for each of a tower's tokens, of which `length` look at each other; 0 where a
    kernel spares it them.
    """
    q = jax.ShapeDtypeStruct((1, length, tower.num_heads, tower.dim // tower.num_heads), build.compute)
    chosen = kernels.choose(getattr(tower, "attention", "auto"), build.platform, q, q, None)
    return length * tower.num_heads // build.mesh.shape["tensor"] if chosen == "plain" else 0


def arithmetic(build: Build) -> dict[str, int]:
    """Floating-point operations of one train step over the whole mesh, by tower and of the optimizer."""
    step = make_step(build.objective, build.optimizer, build.step, seed=0)
    state = build.blueprint.state_shapes(build.optimizer)
    with jax.set_mesh(build.mesh):
        traced = jax.make_jaxpr(step)(state, build.blueprint.frozen_shapes, build.batch_shapes())
    return dict(sorted(flops.count(traced, SCOPES).items()))


def model_arithmetic(build: Build) -> dict[str, int]:
    """Of one train step over the whole mesh, the operations that its losses and gradients cannot do without, by tower."""
    blueprint, objective = build.blueprint, build.objective
    trainable = blueprint.trainable_shapes

    def loss(trainable, frozen, batch):
        draws = objective.draw(rng.row_keys(jax.random.key(0), batch.tokens.shape[0]))
        terms = objective.terms(trees.merge(trainable, frozen), batch, draws, jax.random.key(0))
        return sum(term.sum for term in terms.values())

    inputs = (trainable, blueprint.frozen_shapes, build.batch_shapes())
    mesh = build.mesh.abstract_mesh  # without devices attention is plain: what is needed is the same whatever computes it
    with jax.sharding.use_abstract_mesh(AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types)):
        traced = jax.make_jaxpr(loss)(*inputs)
    learned = [True] * len(jax.tree.leaves(trainable)) + [False] * len(jax.tree.leaves(inputs[1:]))
    return dict(sorted(flops.model(traced, learned, tuple(TOWERS)).items()))


def sharding_table(build: Build) -> str:
    """One line a parameter: path, shape, mesh axes of each dim, trainable or frozen. The golden files hold this."""
    lines = []
    for path, leaf in sorted(trees.flatten(build.blueprint.shapes).items()):
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        kind = "trainable" if path in build.blueprint.trainable else "frozen"
        lines.append(f"{path} {list(leaf.shape)} {[axis or '-' for axis in spec]} {kind}".replace("'", ""))
    return "\n".join(lines) + "\n"
