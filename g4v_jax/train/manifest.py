"""Proof that the files of a checkpoint are those that were written: SHA-256 of each, in one JSON file beside them.

May hold the writing and checking of manifests; knows no arrays.
"""

import hashlib
import json
import os
from pathlib import Path

from g4v_jax.errors import UserError


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def steps(root: Path) -> list[int]:
    """Finished steps below a folder of checkpoints, oldest first; not verified."""
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.exists() else []


def manifest_file(root: Path, step: int) -> Path:
    """Where the manifest of a step is."""
    return root / "manifests" / f"{step}.json"


def digest(folder: Path) -> dict:
    """{relative path: {"bytes", "sha256"}} of every file below a folder."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(root: Path, step: int) -> str | None:
    """What is wrong with a step, naming the file, or None."""
    manifest = manifest_file(root, step)
    if not manifest.exists():
        return f"no manifest {manifest.relative_to(root)}: the run ended while the step was being sealed"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError):
        return f"{manifest.relative_to(root)} is not a manifest"
    return first_difference(root / str(step), files)


def first_difference(folder: Path, files: dict) -> str | None:
    """The first file that is not as `digest` saw it, and how, or None."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} does not match its SHA-256"
    return None


def verify_frozen(folder: Path) -> None:
    """Raise UserError where the frozen tree is absent or a file of it is damaged."""
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder}: the run has no frozen weights; give the --workdir of a run that has")
    harm = first_difference(folder, json.loads((folder / "manifest.json").read_text())["files"])
    if harm:
        raise UserError(f"{folder}: {harm}; delete the folder and import the weights again")
