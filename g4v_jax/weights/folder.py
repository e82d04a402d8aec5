"""An imported tower on disk: our leaves in one safetensors file, and what is known of them; loading it onto a mesh.

    DIR/tower.json            family, fields of the module, the source's config.json, SHA-256 of every leaf, fingerprint
    DIR/weights.safetensors   the leaves by path, in the source's dtypes
    DIR/left.safetensors      where there is one: tensors of the source that no leaf holds but export needs again
    DIR/report.{json,txt}     where each tensor of the source went
    DIR/tokenizer.json ...    the source's other small files, as they were

May hold this folder's reading; `convert.py` writes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import sharding, trees
from g4v_jax.errors import UserError
from g4v_jax.weights.families import by_name
from g4v_jax.weights.tables import Family, boxed_shapes
from g4v_jax.weights.tensors import SafetensorsFile

MARK, WEIGHTS, LEFT = "tower.json", "weights.safetensors", "left.safetensors"
SHAPING = {"remat", "unroll", "position_std", "dropout"}  # fields that a run may choose: they change no result
FREE = SHAPING | {"lora", "lora_rank", "lora_alpha", "lora_dropout", "added_tokens"}  # and those that only add to it
BLOCK = 16 << 20  # bytes hashed at a time


def is_tower(folder: str | Path) -> bool:
    """Whether a folder holds an imported tower."""
    return (Path(folder) / MARK).is_file()


@dataclasses.dataclass(frozen=True)
class TowerFolder:
    """An imported tower, opened. Raises UserError, naming the folder, where it is not one or its files do not agree."""

    path: Path

    @cached_property
    def about(self) -> dict:
        """tower.json."""
        try:
            return json.loads((self.path / MARK).read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path}: no imported tower here ({MARK} is missing); make one: g4v import SRC") from None
        except ValueError as error:
            raise UserError(f"{self.path / MARK}: not valid JSON ({error})") from None

    @property
    def family(self) -> Family:
        return by_name(self.about["family"])

    @cached_property
    def module(self):
        """The tower as the source's config makes it."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in self.about["fields"].items()}
        return self.family.module(**fields)

    @cached_property
    def file(self) -> SafetensorsFile:
        return SafetensorsFile(self.path / WEIGHTS)

    def verify(self) -> None:
        """Read every byte once. Raises UserError for a leaf that is not what was imported."""
        for path, sha in self.about["leaves"].items():
            if sha != leaf_hash(self.file, path):
                raise UserError(f"{self.path / WEIGHTS}: {path} is damaged (another SHA-256); import it again")

    def load(self, shapes: dict) -> dict:
        """Leaves as sharded arrays: `shapes` holds nested ShapeDtypeStructs with shardings, any part of the tower.

        Each device's part is read from the file alone, cast to the wanted dtype. Raises UserError for a leaf that is
        damaged, not there, or of another shape.
        """
        self.verify()
        # the largest first, while little is held: reading one takes its room twice
        largest = sorted(trees.flatten(shapes).items(), key=lambda item: -item[1].size)
        return trees.unflatten({path: self._leaf(path, leaf) for path, leaf in largest})

    def load_whole(self, dtype=jnp.float32) -> dict:
        """All leaves on one device."""
        one = sharding.one_device()
        return self.load(self.shapes(one, dtype))

    def shapes(self, mesh: jax.sharding.Mesh, dtype=jnp.float32) -> dict:
        """All leaves as ShapeDtypeStructs, laid over a mesh as training lays them."""
        with jax.set_mesh(mesh):
            boxed = boxed_shapes(self.family.tower, self.module)
        specs = sharding.named(mesh, sharding.parameter_specs(boxed))
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=spec), nn.meta.unbox(boxed), specs
        )

    def _leaf(self, path: str, wanted) -> jax.Array:
        if path not in self.about["leaves"]:
            raise UserError(f"{self.path}: holds no {path}; it can be trained from nothing, but not frozen")
        shape = self.file.shape(path)
        if shape != tuple(wanted.shape):
            raise UserError(f"{self.path}: {path} is {list(shape)} where the config makes it {list(wanted.shape)}")
        parts = {}  # devices that hold the same part share its reading

        def part(index):
            key = str(index)
            if key not in parts:
                parts[key] = part_of(self.file, path, index, wanted.dtype)
            return parts[key]

        return jax.block_until_ready(jax.make_array_from_callback(shape, wanted.sharding, part))

    def check(self, module, field: str) -> None:
        """Raise UserError, naming the config's field, where a run's tower computes another thing than this one."""
        if type(module) is not self.family.module:
            raise UserError(f"config: {field} is a {type(module).__name__}, {self.path} a {self.family.name}")
        free = SHAPING if getattr(self.module, "lora", ()) else FREE
        for name in sorted(self.about["fields"].keys() - free):
            here, there = (json.loads(json.dumps(plain(getattr(m, name)))) for m in (module, self.module))
            if here != there:
                raise UserError(f"config: {field}.{name} is {here!r}, but {self.path} has {there!r}")


def plain(value):
    """A field's value as JSON can hold it."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def part_of(file: SafetensorsFile, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """A slice of a tensor in `dtype`, reading little beside it: one item of its first axis at a time."""
    shape = file.shape(name)
    if len(shape) < 2:
        return file.read(name)[index].astype(dtype)
    first, last, _ = index[0].indices(shape[0])
    lengths = [len(range(*part.indices(length))) for part, length in zip(index[1:], shape[1:])]
    out = np.empty((last - first, *lengths), dtype)
    if len(shape) == 2:
        out[:] = file.read(name, rows=index[0])[:, index[1]]
        return out
    for layer in range(first, last):
        out[layer - first] = file.read(name, layer, index[1])[(slice(None), *index[2:])]
    return out


def leaf_hash(file: SafetensorsFile, name: str) -> str:
    """SHA-256 of a tensor's bytes."""
    content = hashlib.sha256()
    for block in file.blocks(name, BLOCK):
        content.update(block)
    return content.hexdigest()


def fingerprint(leaves: Mapping[str, str]) -> str:
    """One hash of a whole tree, from {path: hash}."""
    return hashlib.sha256(json.dumps(sorted(leaves.items())).encode()).hexdigest()
