"""The training loop of any objective: it builds nothing, it only runs what it is given.

May hold the order of events between steps: data, step, log, evaluation, checkpoint, and every way a run ends.
"""

import contextlib
import copy
import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Protocol

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from g4v_jax import heap
from g4v_jax.errors import UserError
from g4v_jax.sharding import put_batch
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.manifest import write_json
from g4v_jax.train.metrics import Logger
from g4v_jax.train.state import TrainState
from g4v_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """How long a run is and what happens at which interval, in steps. 0 means never."""

    steps: int
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    eval_every: int = 0
    cosine_every: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name in ("eval_every", "cosine_every") else 1
            if getattr(self, field.name) < least:
                raise UserError(f"loop.{field.name}: {getattr(self, field.name)} is below {least}")


class Batches(Protocol):
    """The data of this process: an endless iterator whose position is JSON. May also have `close()`."""

    def __next__(self) -> Batch:
        """The next batch: this process's rows, in numpy."""

    def get_state(self) -> dict:
        """The position after the batches handed out so far."""

    def set_state(self, state: dict) -> None:
        """Go on from a position."""


def run(
    step: Callable,
    shapes: TrainState,
    create: Callable[[], TrainState],
    frozen: dict,
    batches: Batches,
    mesh: Mesh,
    checkpoints: Checkpoints,
    logger: Logger,
    spec: LoopSpec,
    meta: dict,
    evaluate: Callable[[TrainState, dict], dict[str, float]] | None = None,
    cosines: Callable | None = None,
    stop_after: int | None = None,
) -> TrainState:
    """Train to `spec.steps`, from the newest checkpoint if there is one, and return the last state.

    `step(state, frozen, batch) -> (state, metrics)` and `cosines(state, frozen, batch) -> metrics` are jitted, `step`
    with `state` donated. `create` makes the first state, only where nothing can be restored onto `shapes`. `evaluate`
    is called as `evaluate(state, frozen)`. `meta` goes into every checkpoint. `stop_after` ends this call after that
    many steps, as a signal would, but returns.

    Takes over `batches`, `checkpoints` and `logger` and closes them on every way out:
      - the end: a last checkpoint, `summary.json` (see `_summary`) and `losses.png` in the run's directory;
      - SIGTERM or SIGINT: the step is finished and saved, then SystemExit(143 or 130); a second one ends at once;
      - a loss or gradient that is not finite: UserError naming step and term; nothing of it is saved;
      - data that ends early or a full disk: UserError.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_Stop())  # left last: a signal does not cut the closing short
        for resource in (checkpoints, logger, batches):
            if hasattr(resource, "close"):
                stack.callback(resource.close)
        stack.enter_context(jax.set_mesh(mesh))

        started = time.perf_counter()
        done, state = _begin(shapes, create, batches, checkpoints, logger)
        resumed, compiled = done, step._cache_size()  # JAX has no public count of a function's programs
        if done >= spec.steps:
            logger.say(f"already at step {done} of {spec.steps}: nothing to do")
            return state
        end = spec.steps if stop_after is None else min(spec.steps, done + stop_after)
        watch = logger.stopwatch

        def fetch():
            with watch.phase("data"):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise UserError(
                        f"the data ended at step {done} of {spec.steps}: repeat it, or take fewer steps"
                    ) from None
                # a copy, as an iterator may go on changing the state it handed out
                return put_batch(batch, mesh), copy.deepcopy(batches.get_state())

        batch, position = fetch()
        while True:
            extra = cosines(state, frozen, batch) if cosines and _at(done + 1, spec.cosine_every) else {}
            with watch.step() as outputs:
                state, metrics = step(state, frozen, batch)
                outputs.append(metrics)
            if done == resumed:  # it compiled
                heap.give_back()
            done += 1
            stopping = stop.requested(done) or done == end
            saved_position = position
            if not stopping:
                batch, position = fetch()  # while the devices work; not counted until its step is done
            with watch.phase("log"):
                logger.push(done, metrics | extra)
            if stopping or checkpoints.due(done):
                with watch.phase("checkpoint"):
                    logger.check()  # a state that is not finite must not push out a good one
                    checkpoints.save(done, state, saved_position, meta, force=stopping)
            if evaluate and _at(done, spec.eval_every):
                with watch.phase("evaluate"):
                    logger.note(done, evaluate(state, frozen))
            if stopping:
                break

        logger.flush()
        checkpoints.wait()
        if done == spec.steps:
            compiles = step._cache_size() - compiled
            if jax.process_index() == 0:
                write_json(logger.workdir / "summary.json", _summary(logger, done, resumed, started, compiles))
            logger.plot()
        elif stop.signal is not None:
            logger.say(f"{signal.Signals(stop.signal).name}: saved step {done}; the same command goes on from there")
            raise SystemExit(128 + stop.signal)
        return state


def _begin(shapes, create, batches, checkpoints, logger) -> tuple[int, TrainState]:
    """The step and state to go on from; sets the data to the same place."""
    restored = checkpoints.restore(shapes)
    if restored is None:
        logger.resume(0)
        return 0, create()
    done, state, position = restored
    batches.set_state(position)
    logger.resume(done)
    logger.say(f"resumed from step {done}")
    return done, state


def _summary(logger: Logger, done: int, resumed: int, started: float, compiles: int) -> dict:
    """steps, resumed_from, wall_seconds (this process, with its start), compiles of the train step (this process),
    seconds_per_step (median), outside_step and outside (shares, see Stopwatch), padding (mean of the run), losses."""
    return {
        "steps": done,
        "resumed_from": resumed,
        "wall_seconds": time.perf_counter() - started,
        "compiles": compiles,
        "padding": logger.padding(),
        "losses": logger.losses(),
        **logger.stopwatch.report(),
    }


def _at(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Stop:
    """Whether a signal asked the run to end; while entered, SIGTERM and SIGINT no longer end it at once."""

    def __init__(self):
        self.signal: int | None = None
        self._before: dict = {}

    def __enter__(self) -> "_Stop":
        # with several processes JAX's own notifier catches SIGTERM: all have to stop at the same step
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to end after this step. The same answer on every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _note(self, number: int, _frame) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
