"""What the folders that records are built from have in common: lines of JSON, written whole, and splits by a hash.

May hold nothing of what a folder's clips or texts are about.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one object a line, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def split_of(key: str) -> str:
    """80 % train, 10 % validation, 10 % test, by the key alone: what shares a key never straddles splits."""
    place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if place < 80 else "validation" if place < 90 else "test"
