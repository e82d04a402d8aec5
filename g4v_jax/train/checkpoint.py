"""Checkpoints of a run: written in the background, proven byte by byte, restored on any mesh.

May hold the saving and restoring of the training state with its data position, and of the frozen tree. Orbax
writes the arrays but keeps no checksum of them: a flipped byte would restore silently as a wrong weight. So every
step has a SHA-256 manifest, written after the step is complete, and a step without a matching one is not used.

    WORKDIR/checkpoints/STEP/{state,data,meta}    arrays, the data iterator's state, versions and config
    WORKDIR/checkpoints/manifests/STEP.json       size and SHA-256 of every file of STEP
    WORKDIR/checkpoints/damaged/STEP              set aside by `restore`
    WORKDIR/frozen/{arrays,manifest.json}         the frozen tree, once a run

WORKDIR is a local or shared directory; with several processes, process 0 writes all but the arrays.
"""

import contextlib
import hashlib
import json
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from g4v_jax import trees
from g4v_jax.errors import UserError
from g4v_jax.train import manifest
from g4v_jax.train.manifest import damage, digest, manifest_file, verify_frozen, write_json
from g4v_jax.train.processes import merged
from g4v_jax.train.saved import check_same_model, load_arrays, save_args
from g4v_jax.train.state import TrainState

_HANDLERS = {
    "state": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
    "meta": ocp.JsonCheckpointHandler,
}
_NONE, _ALL_DAMAGED = -1, -2  # instead of a step, when processes agree on one


class Checkpoints:
    """The checkpoints of one run directory. Every process of the run makes one and calls it in the same order.

    `save` returns once the state is copied from the devices; writing, finalising and hashing go on in threads, and
    what they raise comes out of the next `save`, `wait` or `close`. Use it as a context manager.
    """

    def __init__(self, workdir: str | Path, every_steps: int, keep: int = 2):
        """Open or create `workdir`. `every_steps` is the interval of `save`; the newest `keep` steps stay.

        Raises UserError for an interval or a count below 1.
        """
        if every_steps < 1 or keep < 1:
            raise UserError(f"checkpoints: every_steps={every_steps} and keep={keep} must both be at least 1")
        self.workdir = Path(workdir).absolute()
        self.every_steps = every_steps
        self.keep = keep
        self._root = self.workdir / "checkpoints"
        self._root.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _remove(*self._root.glob("*.orbax-checkpoint-tmp*"))  # of a run that was killed in the middle of a save
        # Orbax would delete an old step before the new one has its manifest: with keep=1 a kill in between would
        # leave nothing. So it keeps all, and `_seal` deletes.
        self._manager = ocp.CheckpointManager(
            self._root,
            item_handlers={name: handler() for name, handler in _HANDLERS.items()},
            options=ocp.CheckpointManagerOptions(max_to_keep=None, save_root_metadata=False),
        )
        self._sealing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._open = True

    def steps(self) -> list[int]:
        """Finished steps on disk, oldest first; not verified."""
        return manifest.steps(self._root)

    def due(self, step: int) -> bool:
        """Whether `save` without `force` would save this step."""
        return step % self.every_steps == 0

    def save(self, step: int, state: TrainState, data_state: dict, meta: dict, force: bool = False) -> bool:
        """Save at the interval, or any step with `force`; return whether a save was started.

        `data_state` and `meta` are JSON: the state of this process's data iterator after the batches of `step` steps
        (saved as one of all processes, see `processes.merged`), and what made the run (exact versions, config hash). `state` may be donated as soon as
        this returns. Waits for the save before, and raises what went wrong in it.
        """
        if not (force or self.due(step)):
            return False
        self.wait()
        if step in self.steps():
            return False
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=save_args(state)),
            data=ocp.args.JsonSave(merged(data_state)),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._sealing = threading.Thread(target=self._seal, args=(step,), name=f"seal-checkpoint-{step}")
        self._sealing.start()
        return True

    def wait(self) -> None:
        """Block until the save in flight is complete and sealed; raise what went wrong in it (UserError: disk full)."""
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """`wait`, then release the threads. May be called twice."""
        if not self._open:
            return
        self._open = False
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # a failed save, which `wait` has raised already
                self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def restore(self, shapes: TrainState) -> tuple[int, TrainState, dict] | None:
        """The newest undamaged step as (step, state, data_state), or None where nothing was saved yet.

        `shapes` holds ShapeDtypeStructs with shardings, of any mesh. A damaged step is moved to `damaged/` with one
        printed line. Raises UserError where every step is damaged, or the state is of another model.
        """
        self.wait()
        step = _NONE
        if jax.process_index() == 0:
            step = self._newest_undamaged()
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == _NONE:
            return None
        if step == _ALL_DAMAGED:
            raise UserError(f"{self._root}: every checkpoint is damaged (see damaged/): start with a new --workdir")
        self._manager.reload()  # steps may have been set aside
        check_same_model(self._manager.item_metadata(step)["state"], shapes, self._root / str(step), whole=True)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return step, restored["state"], restored["data"]

    def meta(self, step: int) -> dict:
        """What `save` was given as `meta` at this step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def save_frozen(self, tree: dict, source: dict) -> bool:
        """Save the frozen tree once a run; return False where the same content is there already.

        `source` (JSON) says where the weights came from. Raises UserError where the run has steps that were trained
        on other frozen weights.
        """
        target, content = self.workdir / "frozen", _content_hash(tree)
        if (target / "manifest.json").exists():
            saved = json.loads((target / "manifest.json").read_text())
            if saved["content"] == content:
                return False
            if self.steps():
                raise UserError(
                    f"{target} holds other frozen weights (from {saved['source']}) than these (from {source}), and "
                    f"the checkpoints beside it were trained on them; use a new --workdir"
                )
        partial = target.with_name("frozen.partial")
        if jax.process_index() == 0:
            _remove(partial)
        multihost_utils.sync_global_devices("frozen: start")
        try:
            if jax.tree.leaves(tree):
                with ocp.StandardCheckpointer() as writer:
                    writer.save(partial / "arrays", tree, save_args=save_args(tree))
            if jax.process_index() == 0:
                partial.mkdir(exist_ok=True)
                write_json(partial / "manifest.json", {"content": content, "source": source, "files": digest(partial)})
                _remove(target)
                partial.rename(target)
        except Exception as error:
            if jax.process_index() == 0:
                _remove(partial)
            raise _explained(error, target, "the frozen weights") from error
        multihost_utils.sync_global_devices("frozen: done")
        return True

    def restore_frozen(self, shapes: dict) -> dict | None:
        """The frozen tree on the given shapes and shardings, or None where none was saved.

        Raises UserError where a file is damaged or the tree is of another model.
        """
        folder = self.workdir / "frozen"
        if not folder.exists():
            return None
        verify_frozen(folder)
        return load_arrays(folder / "arrays", shapes, whole=True) if jax.tree.leaves(shapes) else {}

    def _seal(self, step: int) -> None:
        """In a thread: wait for the save, write its manifest, then drop the steps that are too old."""
        writes = jax.process_index() == 0
        try:
            self._manager.wait_until_finished()
            if writes:
                write_json(manifest_file(self._root, step), {"step": step, "files": digest(self._root / str(step))})
        except Exception as error:
            self._failure = self._failed(step, error)
            return
        try:
            for old in self.steps()[: -self.keep] if writes else []:
                _remove(self._root / str(old), manifest_file(self._root, old))
        except OSError as error:
            self._failure = error

    def _failed(self, step: int, error: Exception) -> Exception:
        """Remove what a failed save left behind (Orbax may be doing so too), and return the exception to raise."""
        for _ in range(3 if jax.process_index() == 0 else 0):
            with contextlib.suppress(OSError):
                _remove(*self._root.glob(f"{step}.orbax-*"), self._root / str(step), manifest_file(self._root, step))
                break
        return _explained(error, self._root, f"step {step}")

    def _newest_undamaged(self) -> int:
        """Set damaged steps aside until a good one is found."""
        steps = self.steps()
        for step in reversed(steps):
            harm = damage(self._root, step)
            if harm is None:
                return step
            aside = self._root / "damaged" / str(step)
            _remove(aside)
            aside.parent.mkdir(exist_ok=True)
            (self._root / str(step)).rename(aside)
            _remove(manifest_file(self._root, step))
            print(f"checkpoint {step} is damaged ({harm}): moved to {aside}, trying the one before", flush=True)
        return _ALL_DAMAGED if steps else _NONE


def _content_hash(tree: dict) -> str:
    """SHA-256 over paths, dtypes, shapes and values: the same on every mesh. Holds one leaf on the host at a time."""
    content = hashlib.sha256()
    for path, leaf in sorted(trees.flatten(tree).items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        value = np.ascontiguousarray(leaf)
        content.update(f"{path} {value.dtype} {value.shape}\n".encode())
        content.update(value.reshape(-1).view(np.uint8))
    return content.hexdigest()


def _explained(error: Exception, where: Path, what: str) -> Exception:
    """A full disk as UserError (Orbax reports it as ValueError or OSError); any other error as it is."""
    if "No space left on device" not in str(error):
        return error
    return UserError(
        f"no space left on {where} while saving {what}: free some, then start again; earlier steps are intact"
    )


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
