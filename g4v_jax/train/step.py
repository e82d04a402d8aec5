"""The train step: one jitted program, whatever a batch holds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from g4v_jax import rng, torus, trees
from g4v_jax.nn.stack import stacked
from g4v_jax.train.state import TrainState
from g4v_jax.types import Array, Batch, Term


class Objective(Protocol):
    """What is minimised: named (sum, count) terms and their weights. Pure."""

    weights: dict[str, float]

    def draw(self, row_keys: Array) -> object:
        """All randomness of a batch, from one key a row; leaves lead with rows."""

    def counts(self, batch: Batch) -> dict[str, Array]:
        """Each term's count, from the masks alone."""

    def terms(self, params: dict, batch: Batch, draws: object, dropout: Array) -> dict[str, Term]:
        """Each term's sum and count."""


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """How a step is taken."""

    micro_batches: int = 1
    ema_decay: float = 0.999


def make_step(objective: Objective, optimizer: optax.GradientTransformation, spec: StepSpec, seed: int) -> Callable:
    """Return `step(state, frozen, batch) -> (state, metrics)`, to be jitted once with `state` donated.

    Gradients are of Σ weight·sum/count with the counts of the whole global batch, so that cutting it into
    micro-batches or devices changes nothing. Metrics are float32 scalars that stay on the device.
    """

    def step(state: TrainState, frozen: dict, batch: Batch):
        rows = batch.tokens.shape[0]
        draws = objective.draw(rng.row_keys(rng.stream(seed, "draws", state.step), rows))
        dropout = rng.stream(seed, "dropout", state.step)
        counts = {name: jnp.maximum(count, 1.0) for name, count in objective.counts(batch).items()}

        def loss(trainable, piece):
            batch, draws, index = piece
            params = trees.merge(trainable, stacked(frozen))
            terms = objective.terms(params, batch, draws, jax.random.fold_in(dropout, index))
            sums = {name: term.sum / counts[name] for name, term in terms.items()}
            return sum(objective.weights[name] * value for name, value in sums.items()), sums

        gradient = jax.grad(loss, has_aux=True)
        if spec.micro_batches == 1:  # a loop of one is no loop to a CPU's compiler: it runs 8 x slower
            gradients, losses = gradient(state.trainable, (batch, draws, 0))
        else:
            pieces = jax.tree.map(lambda x: _deal(x, spec.micro_batches), (batch, draws))
            gradients, losses = _sum_over(
                lambda piece: gradient(state.trainable, piece), (*pieces, jnp.arange(spec.micro_batches))
            )

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        ema = optax.incremental_update(_like(trainable, state.ema), state.ema, 1.0 - spec.ema_decay)
        metrics = {f"loss/{name}": value for name, value in losses.items()}
        metrics |= {f"gradient/{tower}": optax.tree.norm(tree) for tower, tree in gradients.items()}
        metrics |= _work(batch)
        return TrainState(state.step + 1, trainable, opt_state, ema), metrics

    return step


def jit_step(step: Callable, state: TrainState) -> Callable:
    """A step as one program, of states with the shapes and shardings of `state`, which it takes over."""
    sides = torus.sides(jax.tree.leaves(state)[0].sharding.mesh)

    @functools.wraps(step)
    def on_torus(*inputs):
        with torus.using(sides):
            return step(*inputs)

    # shardings out as in: a state that came back laid out otherwise would compile the step again
    return jax.jit(on_torus, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))


def _sum_over(function: Callable, pieces):
    """Sum of function(piece) over the leading axis of `pieces`, one piece in memory at a time."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, function(piece)), None), zero, pieces)
    return total


def _deal(x: Array, pieces: int) -> Array:
    """[B ...] -> [pieces B/pieces ...]. Every piece takes rows of every device, so nothing moves between devices."""
    rest = x.shape[1:]
    return jnp.moveaxis(x.reshape(x.shape[0] // pieces, pieces, *rest), 1, 0)


def _like(tree: dict, part: dict) -> dict:
    """The sub-tree of `tree` with the paths of `part`."""
    return trees.split(tree, set(trees.flatten(part)))[0]


def _work(batch: Batch) -> dict[str, Array]:
    """What the batch holds: counts that the log turns into rates, and padding."""
    used = jnp.sum(batch.segments > 0)
    return {
        "work/tokens": used.astype(jnp.float32),
        "work/padding": 1.0 - used / batch.segments.size,
        "work/clips": jnp.sum(batch.clip_mask).astype(jnp.float32),
        "work/targets": jnp.sum(batch.gen_mask).astype(jnp.float32),
    }


def make_gradient_cosines(objective: Objective, seed: int) -> Callable:
    """Return `cosines(state, frozen, batch) -> {"cosine/a·b": f32}`: how far two terms' gradients agree.

    A backward pass a term: run it at an interval, not every step.
    """

    def cosines(state: TrainState, frozen: dict, batch: Batch):
        draws = objective.draw(rng.row_keys(rng.stream(seed, "draws", state.step), batch.tokens.shape[0]))
        dropout = rng.stream(seed, "dropout", state.step)

        def loss(trainable, name):
            return objective.terms(trees.merge(trainable, stacked(frozen)), batch, draws, dropout)[name].sum

        names = sorted(objective.weights)
        gradients = {name: jax.grad(loss)(state.trainable, name) for name in names}
        norms = {name: optax.tree.norm(gradients[name]) for name in names}
        result = {}
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                dot = optax.tree.vdot(gradients[a], gradients[b])
                result[f"cosine/{a}·{b}"] = dot / jnp.maximum(norms[a] * norms[b], 1e-20)
        return result

    return cosines
