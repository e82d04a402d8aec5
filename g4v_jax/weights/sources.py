"""What a published folder or file is, and opening it: config, tensors, and the small files beside them.

May hold the recognition of layouts; knows no table. Everything read here is from outside and checked.
"""

import dataclasses
import json
from pathlib import Path

from g4v_jax.errors import UserError
from g4v_jax.weights.tables import Source
from g4v_jax.weights.tensors import PICKLES, SafetensorsFolder

SIDE_FILES = (  # carried along as they are
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
MAX_CONFIG, MAX_SIDE_FILE = 10 << 20, 200 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Opened:
    """A published model, opened: nothing but headers is read yet."""

    path: Path
    kind: str  # "model", "adapter", "gguf" or "onnx"
    config: dict  # config.json, or adapter_config.json
    tensors: Source
    files: dict[str, bytes]


def open_source(path: str | Path) -> Opened:
    """Recognise what lies at `path`. Raises UserError where it is nothing known, not whole, or a pickle."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError(f"{path}: a pickle runs whatever code it holds when it is read, so it is refused")
        if path.suffix == ".onnx":
            from g4v_jax.weights.onnx import OnnxGraph

            graph = OnnxGraph(path)
            return Opened(path, "onnx", graph.config, graph, {})
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path}: neither a GGUF nor an ONNX file; give the folder that holds config.json and the safetensors")
        from g4v_jax.weights.gguf import Gguf

        source = Gguf(path)
        return Opened(path, "gguf", source.config, source, source.files)
    if (path / "model_index.json").exists():
        parts = sorted(part.parent.name for part in path.glob("*/config.json"))
        raise UserError(f"{path}: a whole pipeline; import its parts one by one: {', '.join(parts)}")
    for name, kind in (("adapter_config.json", "adapter"), ("config.json", "model")):
        if (path / name).exists():
            return Opened(path, kind, read_json(path / name), SafetensorsFolder(path), side_files(path))
    SafetensorsFolder(path)  # says so where there are pickles alone
    raise UserError(f"{path}: neither config.json nor adapter_config.json is here, so it cannot be told what it is")


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where it is not one, or too large."""
    if path.stat().st_size > MAX_CONFIG:
        raise UserError(f"{path}: too large for a config")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no object")
    return value


def side_files(folder: Path) -> dict[str, bytes]:
    """The small files of a folder that go along with its weights."""
    paths = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    return {path.name: path.read_bytes() for path in paths if path.stat().st_size <= MAX_SIDE_FILE}
