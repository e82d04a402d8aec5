"""safetensors files, one tensor or slice at a time: a strict reader, a streaming writer, folders with an index.

May hold this one file format. The library beside it reads by mapping whole files and writes from a dict that holds
them; here neither a file nor a tensor need ever be whole in memory. Every header is taken as hostile until checked.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from g4v_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes, the format's own limit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")


class SafetensorsFile:
    """One file's tensors by name. Raises UserError, naming the file, for anything that is not whole and consistent."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(MAX_HEADER, size - 8):
                    raise ValueError("the header is longer than the file")
                header = json.loads(file.read(length))
            self._start = 8 + length
            self.metadata = header.pop("__metadata__", {})
            self._tensors = {name: self._entry(name, entry) for name, entry in header.items()}
            end = 0
            for name, (dtype, shape, offset) in sorted(self._tensors.items(), key=lambda item: item[1][2]):
                if offset != end:
                    raise ValueError(f"{name!r} does not begin where the tensor before it ends")
                end += math.prod(shape) * dtype.itemsize
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path}: not a safetensors file ({error})") from None
        if self._start + end != size:
            raise UserError(
                f"{self.path}: {size} bytes where the header tells of {self._start + end}: truncated or damaged; "
                "fetch it again"
            )

    def _entry(self, name: str, entry: dict) -> tuple[np.dtype, tuple[int, ...], int]:
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}")
        shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
        if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name!r} has a shape or offsets that are not whole numbers")
        dtype = DTYPES[entry["dtype"]]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name!r} has {end - begin} bytes for {entry['dtype']} {list(shape)}")
        return dtype, shape, begin

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name][0]

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or index `layer` of its first axis, or of that only `rows` of the next axis."""
        dtype, shape, offset = self._tensors[name]
        offset += self._start
        if layer is not None:
            shape = shape[1:]
            offset += layer * math.prod(shape) * dtype.itemsize
        if rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            offset += first * math.prod(shape[1:]) * dtype.itemsize
            shape = (last - first, *shape[1:])
        values = np.fromfile(self.path, dtype, math.prod(shape), offset=offset)
        return values.reshape(shape)


    def blocks(self, name: str, size: int) -> Iterable[bytes]:
        """The bytes of a tensor, so many at a time."""
        dtype, shape, offset = self._tensors[name]
        left = math.prod(shape) * dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(self._start + offset)
            while left:
                block = file.read(min(size, left))
                left -= len(block)
                yield block


class SafetensorsFolder:
    """The tensors of a folder as transformers, diffusers and peft write it: one file, or shards under an index."""

    def __init__(self, folder: str | Path):
        """Raises UserError for a shard that is missing or damaged, and for a folder that holds pickles alone."""
        folder = Path(folder)
        index = next((folder / name for name in INDEX if (folder / name).exists()), None)
        paths = sorted(folder.glob("*.safetensors"))
        if index is not None:
            try:
                where = json.loads(index.read_text())["weight_map"]
                names = sorted({str(name) for name in where.values()})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index}: not an index of shards ({error})") from None
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index}: names a shard outside its folder")
            paths = [folder / name for name in names]
            for path in paths:
                if not path.is_file():
                    raise UserError(f"{path}: this shard of {index.name} is missing; fetch it again")
        if not paths:
            pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise UserError(
                    f"{folder / pickles[0]}: a pickle runs whatever code it holds when it is read, so it is refused; "
                    "convert it to safetensors where you trust it"
                )
            raise UserError(f"{folder}: holds no .safetensors file")
        self._files = {}
        for file in map(SafetensorsFile, paths):
            for name in file.names():
                if name in self._files:
                    raise UserError(f"{folder}: {name} is in {self._files[name].path.name} and in {file.path.name}")
                self._files[name] = file
        if index is not None:
            for name, shard in where.items():
                if name not in self._files or self._files[name].path.name != shard:
                    raise UserError(f"{index}: {name} is not in {shard}")

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)


class Writer:
    """Writes one safetensors file whose tensors, given as {name: (dtype, shape)}, come in any order and in parts.

    Room for all of it is taken from the disk at once, so that a full disk is told before the work. `close` raises
    ValueError where a byte was not written.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata=None):
        """Raises UserError for a dtype that the format has not, or too little room."""
        self.path, self._offsets, end = Path(path), {}, 0
        header = {"__metadata__": metadata or {"format": "pt"}}
        for name, (dtype, shape) in tensors.items():
            if np.dtype(dtype) not in NAMES:
                raise UserError(f"{path}: {name} has dtype {dtype}; supported: {', '.join(map(str, NAMES))}")
            size = math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = (end, np.dtype(dtype), tuple(shape))
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        self._left, self._start = end, 8 + len(text)
        self._file = open(self.path, "wb")
        try:
            if shutil.disk_usage(self.path).free < self._start + end:  # before a part of it is taken
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.posix_fallocate(self._file.fileno(), 0, self._start + end)
            self._file.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            self._file.close()
            raise explained(error, self.path) from error

    def write(self, name: str, value: np.ndarray, layer: int | None = None) -> None:
        """Write a tensor, or index `layer` of its first axis. Raises ValueError for another dtype or shape."""
        offset, dtype, shape = self._offsets[name]
        expected = shape if layer is None else shape[1:]
        if value.dtype != dtype or value.shape != expected:
            raise ValueError(f"{name}: {value.dtype}{list(value.shape)} in place of {dtype}{list(expected)}")
        value = np.ascontiguousarray(value)
        self._file.seek(self._start + offset + (layer or 0) * value.nbytes)
        try:
            self._file.write(value.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise explained(error, self.path) from error
        self._left -= value.nbytes

    def close(self) -> None:
        """Flush to the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise explained(error, self.path) from error
        finally:
            self._file.close()
        if self._left:
            raise ValueError(f"{self.path}: {self._left} bytes were not written")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        self._file.close() if kind else self.close()


def explained(error: OSError, path: Path) -> Exception:
    """A full disk as UserError; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return UserError(f"no space left for {path}: free some, then start again; nothing half-written is kept")
