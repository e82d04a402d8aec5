"""Writes the built-in world to disk: H.264 clips, captions.jsonl and dialogues.jsonl.

Every clip and every dialogue has a random stream of its own, keyed by seed, kind, split and
index. A clip is therefore the same whatever the counts and however many processes share the work.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from g4v_jax.data import video
from g4v_jax.data.world.attributes import SPLITS, Scene, combinations
from g4v_jax.data.world.dialogues import Clips, dialogue
from g4v_jax.data.world.draw import render
from g4v_jax.data.world.phrases import canonical, paraphrases
from g4v_jax.errors import UserError

FORMAT = 4  # raise it when the same arguments no longer give the same world
PARAPHRASES = 8  # for each clip

SIZES = ((64, 64), (80, 80), (96, 96), (112, 112), (128, 128))  # width, height
RATES = (8, 12, 16, 24)  # frames a second
SECONDS = (2.0, 4.0)

_SHARE = {"train": 1.0, "validation": 0.10, "test": 0.15}  # of the training count
_AT_LEAST = {"clip": 60, "hazard": 24, "dialogue": 60}  # in each held-out split
_KINDS = ("clip", "hazard", "dialogue")


def make(
    directory: str | Path,
    clips: int,
    hazards: int,
    dialogues: int,
    seed: int,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Make the world in `directory`, unless it is already there with the same arguments.

    `clips`, `hazards` and `dialogues` count the training split; validation adds 10 % and test
    15 %, but no fewer than 60 clips, 24 hazards and 60 dialogues each. Hazards and dialogues may
    be zero, and then no split has any. `progress` is called with the numbers of clips done and
    of all clips.

    Returns {"directory", "made", "clips", "hazards", "dialogues"}: `made` is False when nothing
    had to be done, and the last three map split to count. With more than one process a calling
    script needs the usual `if __name__ == "__main__"` guard, because the others are spawned.
    Raises UserError for bad counts and for a directory that holds other files.
    """
    if clips < 1 or hazards < 0 or dialogues < 0 or seed < 0:
        raise UserError("a world needs at least one clip and no negative count or seed")
    directory = Path(directory)
    arguments = {"clips": clips, "hazards": hazards, "dialogues": dialogues, "seed": seed}
    record = {"format": FORMAT, "arguments": arguments}
    counts = {
        kind: _split_counts(kind, count)
        for kind, count in zip(_KINDS, (clips, hazards, dialogues))
    }
    summary = {"directory": str(directory), "made": True}
    summary |= {f"{kind}s": per_split for kind, per_split in counts.items()}
    if _found(directory) == record | {"complete": True}:
        return summary | {"made": False}

    (directory / "clips").mkdir(parents=True, exist_ok=True)
    _write_json(directory / "world.json", record | {"complete": False})
    for left_over in (directory / "clips").glob("*.mp4"):
        left_over.unlink()
    jobs = [
        _Job(str(directory), kind, split, index, seed)
        for kind in ("clip", "hazard")
        for split in SPLITS
        for index in range(counts[kind][split])
    ]
    rows = []
    for row in _run(jobs, processes):
        rows.append(row)
        if progress:
            progress(len(rows), len(jobs))
    _write_lines(directory / "captions.jsonl", rows)
    _write_lines(directory / "dialogues.jsonl", _dialogues(rows, counts["dialogue"], seed))
    _write_json(directory / "world.json", record | {"complete": True})
    return summary


@dataclass(frozen=True)
class _Job:
    """One clip to make; small enough to be sent to another process."""

    directory: str
    kind: str
    split: str
    index: int
    seed: int


def _run(jobs: list[_Job], processes: int) -> Iterable[dict]:
    """Rows of the jobs, in their order."""
    if processes <= 1:
        yield from map(_make_clip, jobs)
        return
    # Spawned, because a fork of a process that runs JAX threads can deadlock.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_make_clip, jobs, chunksize=16)


def _make_clip(job: _Job) -> dict:
    """Draw, encode and describe one clip. Returns its row of captions.jsonl."""
    rng = _stream(job.seed, job.kind, job.split, job.index)
    scene = _scene(job)
    width, height = SIZES[rng.integers(len(SIZES))]
    rate = RATES[rng.integers(len(RATES))]
    frames = render(scene, rng, round(rng.uniform(*SECONDS) * rate), height, width)
    name = f"clips/{job.kind}-{job.split}-{job.index:06d}.mp4"
    video.write(Path(job.directory) / name, frames, rate)
    return {
        "video": name,
        "caption": canonical(scene),
        "paraphrases": paraphrases(scene, rng, PARAPHRASES, held_out=job.split != "train"),
        "split": job.split,
        "hazard": scene.hazard,
        "attributes": asdict(scene),
    }


def _scene(job: _Job) -> Scene:
    """Every combination of the split once, in random order, then again in another order."""
    choices = combinations(job.split, hazard=job.kind == "hazard")
    lap, place = divmod(job.index, len(choices))
    order = _stream(job.seed, f"{job.kind} order", job.split, lap).permutation(len(choices))
    return choices[order[place]]


def _dialogues(rows: list[dict], counts: dict[str, int], seed: int) -> Iterable[dict]:
    for split, count in counts.items():
        clips = Clips([row for row in rows if row["split"] == split])
        for index in range(count):
            yield dialogue(index, split, clips, _stream(seed, "dialogue", split, index))


def _stream(seed: int, kind: str, split: str, index: int) -> np.random.Generator:
    name = int.from_bytes(f"{kind} {split}".encode(), "big")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, name, index])))


def _split_counts(kind: str, training: int) -> dict[str, int]:
    if training == 0:
        return dict.fromkeys(SPLITS, 0)
    held_out = {
        split: max(_AT_LEAST[kind], round(share * training)) for split, share in _SHARE.items()
    }
    return held_out | {"train": training}


def _found(directory: Path) -> dict | None:
    """What world.json says, or None for a new or empty directory."""
    path = directory / "world.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError:
            raise UserError(f"{path} is damaged; remove it and the files beside it") from None
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} holds files that are not a built-in world; name another one")
    return None


def _write_json(path: Path, value: dict) -> None:
    """Atomically: whoever reads the file sees the old value or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
