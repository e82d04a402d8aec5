"""The parameters of a finished run, for use rather than training: any part, on any mesh, each file verified once.

May hold reading; `checkpoint.py` writes.
"""

import itertools
import json
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from g4v_jax import trees
from g4v_jax.errors import UserError
from g4v_jax.train.manifest import damage, steps, verify_frozen

CHUNK = 8 << 20  # bytes that are read together


class SavedRun:
    """The newest undamaged step of a run, and its frozen weights. Raises UserError where it has no good step."""

    def __init__(self, workdir: str | Path):
        self.workdir = Path(workdir).absolute()
        root = self.workdir / "checkpoints"
        for step in reversed(steps(root)):
            harm = damage(root, step)
            if harm is None:
                break
            print(f"checkpoint {step} is damaged ({harm}): using the one before", flush=True)
        else:
            raise UserError(f"{self.workdir}: no undamaged checkpoint; give the --workdir of a run that has saved one")
        self.step, self._arrays = step, root / str(step) / "state"

    @cached_property
    def _kinds(self) -> dict[str, dict]:
        """What the step holds of parameters: {"trainable" or "ema": {path: shape}}."""
        shapes = saved_shapes(self._arrays)
        return {name: trees.flatten(shapes[name]) for name in ("trainable", "ema")}

    @cached_property
    def _frozen(self) -> Path:
        verify_frozen(self.workdir / "frozen")
        return self.workdir / "frozen" / "arrays"

    @property
    def _has_frozen(self) -> bool:
        return (self.workdir / "frozen" / "arrays").exists()

    @property
    def frozen_content(self) -> str | None:
        """What tells the frozen weights from others (see `Checkpoints.save_frozen`), None where the run has none.

        Raises UserError where they are damaged.
        """
        if not self._has_frozen:
            return None
        return json.loads((self._frozen.parent / "manifest.json").read_text())["content"]

    @cached_property
    def shapes(self) -> dict:
        """Every parameter of the run by path, with shape and dtype as saved."""
        frozen = {}
        if self._has_frozen:
            frozen = trees.flatten(saved_shapes(self._frozen))
        return frozen | self._kinds["trainable"]

    def load(self, shapes: dict, prefer_ema: bool = True) -> dict:
        """Parameters as nested arrays; nothing of the optimizer is read, nothing is written.

        `shapes` (nested ShapeDtypeStructs with shardings) says which leaves, on which mesh and in which dtype; it may
        be any part of the model. Leaves with a moving average are replaced by it where `prefer_ema`. Raises UserError
        where the run lacks a leaf, or has it in another shape, or its frozen weights are damaged.
        """
        wanted = trees.flatten(shapes)
        averaged = self._kinds["ema"].keys() & wanted.keys() if prefer_ema else set()
        trained = self._kinds["trainable"].keys() & wanted.keys() - averaged
        rest = trees.split(shapes, averaged | trained)[1]
        if rest and not self._has_frozen:
            name = min(trees.flatten(rest))
            raise UserError(f"{self.workdir}: has no {name}; use the config that the run was started with, or another run")
        parts = {"trainable": trees.split(shapes, trained)[0], "ema": trees.split(shapes, averaged)[0]}
        parts = {name: part for name, part in parts.items() if part}
        restored = load_arrays(self._arrays, parts) if parts else {}  # Orbax takes no empty tree
        if rest:
            restored["frozen"] = load_arrays(self._frozen, rest)
        return trees.merge(*restored.values())

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter, or item `layer` of its first axis, as saved: its moving average where it has one.

        Little else is read, see `save_args`. Raises UserError where the run has no such leaf.
        """
        if path not in self.shapes:
            raise UserError(f"{self.workdir}: has no {path}")
        kind = next((name for name in ("ema", "trainable") if path in self._kinds[name]), None)
        folder, name = (self._frozen, path) if kind is None else (self._arrays, f"{kind}/{path}")
        store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": name.replace("/", ".") + "/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        chunk = array.chunk_layout.read_chunk.shape
        if layer is not None:
            array, chunk = array[layer], chunk[1:]
        value = np.empty(array.shape, array.dtype.numpy_dtype)
        corners = itertools.product(*(range(0, size, step) for size, step in zip(array.shape, chunk)))
        for corner in corners:  # one after the other: what is on its way adds up
            place = tuple(slice(at, min(at + step, size)) for at, step, size in zip(corner, chunk, array.shape))
            value[place] = array[place].read().result()
        return value


def save_args(tree):
    """How leaves lie on disk: cut along their first axis, so that a layer of a stack can be read alone."""
    return jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if np.ndim(x) else ()), tree)


def saved_shapes(arrays: Path) -> dict:
    """The shapes of what a directory of arrays holds."""
    return ocp.PyTreeCheckpointHandler().metadata(arrays).tree


def load_arrays(arrays: Path, shapes: dict, whole: bool = False) -> dict:
    """Restore the leaves of `shapes` alone, in their dtypes."""
    check_same_model(saved_shapes(arrays), shapes, arrays, whole)
    restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
    args = ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(arrays, args=args)


def check_same_model(saved, shapes, where: Path, whole: bool) -> None:
    """Raise UserError, naming a leaf, unless `saved` has every leaf of `shapes` alike (and, if `whole`, no others).

    Orbax would cast to another dtype without a word: right for a user of a run, wrong for one that goes on.
    """
    saved, wanted = (ocp.tree.to_flat_dict(tree, sep="/") for tree in (saved, shapes))
    saved, wanted = ({k: v for k, v in flat.items() if hasattr(v, "shape")} for flat in (saved, wanted))
    advice = "use the config that the run was started with, or a new --workdir"
    for name, leaf in wanted.items():
        if name not in saved:
            raise UserError(f"{where}: has no {name}; {advice}")
        found = saved[name]
        if tuple(found.shape) != tuple(leaf.shape) or (whole and found.dtype != leaf.dtype):
            kinds = [f"{x.dtype}{list(x.shape)}" for x in (found, leaf)]
            raise UserError(f"{where}: {name} is {kinds[0]} instead of {kinds[1]}; {advice}")
    extra = sorted(saved.keys() - wanted.keys())
    if whole and extra:
        raise UserError(f"{where}: holds {extra[0]}, which this model has not; {advice}")
