"""Our leaves as export reads them, one layer at a time: of an imported tower, or with LoRA and added words merged in.

May hold readers that give leaves by path; a run's own reader is beside its checkpoints.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Protocol

import flax.linen as nn
import numpy as np

from g4v_jax.weights.folder import TowerFolder


EXTRA = r".*/lora_[ab]|embedding/added|head_added/kernel"  # leaves of a tower that its published form has not


class Leaves(Protocol):
    """Leaves of one tower by path; `layer` is an index of the first axis, None the whole leaf."""

    def paths(self) -> Iterable[str]: ...

    def dtype(self, path: str) -> np.dtype: ...

    def read(self, path: str, layer: int | None) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class FolderLeaves:
    """The leaves of an imported tower."""

    folder: TowerFolder

    def paths(self):
        return self.folder.about["leaves"].keys()

    def dtype(self, path: str) -> np.dtype:
        return self.folder.file.dtype(path)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        return self.folder.file.read(path, layer)


@dataclasses.dataclass(frozen=True)
class RunLeaves:
    """The leaves of one tower of a run: `load(path, layer)` reads one, `shapes` tells of every one by its whole path."""

    load: Callable[[str, int | None], np.ndarray]
    shapes: dict
    tower: str

    def paths(self) -> Iterable[str]:
        return {path.removeprefix(f"{self.tower}/") for path in self.shapes}

    def dtype(self, path: str) -> np.dtype:
        return np.dtype(self.shapes[f"{self.tower}/{path}"].dtype)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        return self.load(f"{self.tower}/{path}", layer)


@dataclasses.dataclass(frozen=True)
class Merged:
    """Leaves of the plain tower: kernel + (alpha / rank) · A · B, in float32, and added words behind the others."""

    leaves: Leaves
    scale: float

    def paths(self) -> Iterable[str]:
        return {path for path in self.leaves.paths() if not re.fullmatch(EXTRA, path)}

    def dtype(self, path: str) -> np.dtype:
        return self.leaves.dtype(path)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        value, known = self.leaves.read(path, layer), self.leaves.paths()
        added, axis = {"embedding/table": ("embedding/added", 0), "head/kernel": ("head_added/kernel", 1)}.get(
            path, (None, 0)
        )
        if added in known:
            value = np.concatenate([value, self.leaves.read(added, None).astype(value.dtype)], axis=axis)
        room = path.removesuffix("kernel")
        if room == path or room + "lora_a" not in known:
            return value
        if layer is None:  # LoRA is in stacked layers alone
            return np.stack([self.read(path, index) for index in range(len(value))])
        a, b = (self.leaves.read(room + name, layer).astype(np.float32) for name in ("lora_a", "lora_b"))
        return value.astype(np.float32) + self.scale * np.tensordot(a, b, 1)


def merged(leaves: Leaves, module: nn.Module) -> tuple[Leaves, nn.Module]:
    """Leaves and module of the same tower without LoRA and with all words in one table."""
    if not getattr(module, "lora_rank", 0) and not getattr(module, "added_tokens", 0):
        return leaves, module
    words = module.vocab_size + module.added_tokens
    plain = module.clone(parent=None, lora=(), lora_rank=0, vocab_size=words, added_tokens=0)
    return Merged(leaves, module.lora_alpha / max(module.lora_rank, 1)), plain
