"""Our own train step under the clock: made from a config without any of its files, run alone, by the loop, and by tower.

May hold what is run and how it is timed; what others run beside it is in `peers`, taking turns in `turns`.
"""

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from g4v_jax import rng, trees
from g4v_jax.bench.clock import timed
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.plan import hlo
from g4v_jax.plan.compiled import tower_of
from g4v_jax.plan.flops import REST
from g4v_jax.sharding import put_whole_batch
from g4v_jax.train import loop
from g4v_jax.train.metrics import Logger
from g4v_jax.train.start import laid_out
from g4v_jax.train.step import jit_step, make_step
from g4v_jax.types import Batch


class Step:
    """A config's train step, its state at chance and one batch of chance, every slot of it used.

    Weights that `init` names are not read: what a step costs does not hang on their values. Raises UserError as `Build` does.
    """

    def __init__(self, build: Build):
        build.step  # rows, heads and tokens divide, or the user is told
        self.build = build
        self.shapes = build.blueprint.state_shapes(build.optimizer)
        self.step = jit_step(make_step(build.objective, build.optimizer, build.step, seed=0), self.shapes)
        self.frozen = laid_out(_frozen(build), build.towers, build.mesh)
        self.batch = chance_batch(build)
        self.state = build.blueprint.create(rng.stream(0, "init"), build.optimizer)

    def run(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps in a loop written by hand, every one of them waited for."""
        with jax.set_mesh(self.build.mesh):
            batch = put_whole_batch(self.batch, self.build.mesh)

            def once():
                self.state, metrics = self.step(self.state, self.frozen, batch)
                jax.block_until_ready(metrics)

            return timed(once, steps)

    def run_by_loop(self, steps: int) -> dict:
        """`Stopwatch.report` of the loop that `g4v train` runs, over `steps` steps and one before them; nothing is saved."""
        state, self.state = self.state, None
        spec = loop.LoopSpec(steps=steps + 1, log_every=10)
        with tempfile.TemporaryDirectory() as folder:
            logger = Logger(folder, spec.steps, spec.log_every, console=_silent())
            self.state = loop.run(
                self.step, self.shapes, lambda: state, self.frozen, _Again(self.batch), self.build.mesh, _Nowhere(), logger, spec, {}
            )
            return logger.stopwatch.report()

    def by_tower(self, steps: int = 2) -> dict[str, float]:
        """Share of the devices' busy time by tower, "optimizer" and "rest", from JAX's profiler. Empty where it names no step."""
        with jax.set_mesh(self.build.mesh):
            text = self.step.lower(self.state, self.frozen, put_whole_batch(self.batch, self.build.mesh)).compile().as_text()
        scopes = {one.name: one.scope for lines in hlo.parse(text).computations.values() for one in lines}
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.run(steps)
            busy = _busy(Path(folder), scopes)
        total = sum(busy.values())
        return {tower: seconds / total for tower, seconds in busy.most_common()} if total else {}


def chance_batch(build: Build) -> Batch:
    """Rows of one example each that fill every token and slot: tokens and frames of chance, all of them learned.

    Raises UserError where a row's tokens do not hold its clips and targets.
    """
    shape, draw = build.shape, np.random.default_rng(0)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), build.batch_shapes())
    rows, tokens = zeros.tokens.shape
    words = build.llm.vocab_size if build.alone != "denoiser" else 1
    watched, asked = shape.clips * shape.summary_tokens, shape.targets * shape.query_tokens
    if watched + asked > tokens:
        raise UserError(f"config: rows.tokens is {tokens}; its {shape.clips} clips and {shape.targets} targets take {watched + asked}")
    text = draw.integers(0, words, (rows, tokens + 1), dtype=np.int32)
    places = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    return zeros.replace(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        positions=places,
        segments=np.ones_like(zeros.segments),
        caption_weight=np.ones_like(zeros.caption_weight),
        clips=draw.integers(0, 256, zeros.clips.shape, dtype=np.uint8),
        clip_mask=np.ones_like(zeros.clip_mask),
        clip_times=np.broadcast_to(np.arange(zeros.clip_times.shape[-1], dtype=np.float32), zeros.clip_times.shape),
        clip_index=np.where(places < watched, places, -1),
        query_index=np.where(places >= tokens - asked, places - (tokens - asked), -1),
        gen_targets=draw.integers(0, 256, zeros.gen_targets.shape, dtype=np.uint8),
        gen_mask=np.ones_like(zeros.gen_mask),
    )


def _frozen(build: Build) -> dict:
    """Frozen leaves from their initialisers, in the dtype they are kept in."""
    blueprint = build.blueprint
    shapes = blueprint.frozen_shapes
    if not shapes:
        return {}

    def make(key):
        _, frozen = trees.split(nn.meta.unbox(blueprint.init(key)), blueprint.trainable)
        return jax.tree.map(lambda x, shape: x.astype(shape.dtype), frozen, shapes)

    with jax.set_mesh(build.mesh):
        return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(rng.stream(0, "init"))


def _busy(folder: Path, scopes: dict[str, str]) -> Counter:
    """Nanoseconds by tower of every event that is an instruction of the program, loops left out: what is in them counts."""
    busy: Counter = Counter()
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in scopes and not event.name.startswith(("while", "call", "conditional")):
                        busy[tower_of(scopes[event.name]) or REST] += event.duration_ns
    return busy


def _silent():
    from io import StringIO

    from rich.console import Console

    return Console(file=StringIO())


@dataclasses.dataclass
class _Again:
    """`Batches` that hands the same batch out for ever."""

    batch: Batch

    def __next__(self) -> Batch:
        return self.batch

    def get_state(self) -> dict:
        return {}

    def set_state(self, state: dict) -> None:
        pass


class _Nowhere:
    """`Checkpoints` that keeps nothing: what is measured is the loop, not a disk."""

    def restore(self, shapes):
        return None

    def due(self, step: int) -> bool:
        return False

    def save(self, *_, **__) -> None:
        pass

    def wait(self) -> None:
        pass
