"""What the folders that records are built from have in common: lines of JSON, written whole, and splits kept apart.

May hold nothing of what a folder's clips or texts are about.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from g4v_jax.errors import UserError


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write one object a line, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def read_lines(path: Path, place: str) -> Iterator[tuple[dict, str]]:
    """Each line's object, and where it is: `place`:number. Raises UserError where a line is anything else."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{place}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise UserError(f"{where}: not a line of JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object {{...}}, found {type(row).__name__}")
            yield row, where


def split_of(key: str) -> str:
    """80 % train, 10 % validation, 10 % test, by the key alone: what shares a key never straddles splits."""
    place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100
    return "train" if place < 80 else "validation" if place < 90 else "test"


def refuse_overlap(held: Iterable[tuple[str, str, str]]) -> None:
    """Raise UserError where two splits hold one video, as what was learned from would then be measured on.

    `held`: (the SHA-256 of a video, the line that names it, the split of that line).
    """
    first: dict[str, tuple[str, str]] = {}
    for digest, line, split in held:
        other, its = first.setdefault(digest, (line, split))
        if its != split:
            raise UserError(f"{other} ({its}) and {line} ({split}) hold the same video; give both one \"split\", or leave one out")
