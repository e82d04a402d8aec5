"""Records: a folder of clips and text becomes a TFDS data set in ArrayRecord files, and is read back.

`build` checks what users wrote once, so that training meets only records that are well formed. A record is one
captioned clip or one dialogue; the TFDS splits are named `{split}_{group}`. TensorFlow is not needed.

    captions.jsonl   {"video", "caption", optionally "paraphrases", "split", "hazard", "attributes"}
    dialogues.jsonl  {"turns": [{"role": "user", "text", optionally "video"},
                                {"role": "assistant", "text", optionally "render": {"caption", "video"},
                                 and in the last turn "rejected": an answer that must lose against it}, ...],
                      optionally "split", "hazard", "kind"}
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from g4v_jax.data import video
from g4v_jax.data.folder import read_lines, refuse_overlap
from g4v_jax.errors import UserError, nearest

SPLITS = ("train", "validation", "test")
GROUPS = ("clips", "hazards", "dialogues")
SUMMARY, SKIPPED = "summary.json", "skipped.jsonl"
KINDS = "kinds/{}.npy"  # u16 [records]: the kind of each, by its place in the summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One captioned clip, or one dialogue whose turns name videos by their place in `videos`."""

    id: str
    videos: tuple[bytes, ...]  # whole files
    sha256: tuple[str, ...]  # of each video
    caption: str  # "" for a dialogue
    paraphrases: tuple[str, ...]
    dialogue: tuple[dict, ...]  # () for a captioned clip
    hazard: bool
    attributes: dict
    kind: str


class Split(Sequence):
    """The records of one split and group, or of one kind among them, by index.

    A record damaged on disk raises UserError when it is read.
    """

    def __init__(self, source, name: str, places: Sequence[int] | None = None):
        self._source, self._name = source, name
        self._places = range(len(source)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        index = int(self._places[range(len(self))[index]])  # IndexError ends an iteration
        try:
            row = self._source[index]
        except RuntimeError as error:  # a checksum of the file format failed
            raise UserError(f"{self._name}: record {index} is damaged ({error}); build the records again") from error
        return Record(
            id=row["id"].decode(),
            videos=tuple(row["videos"]),
            sha256=tuple(digest.decode() for digest in row["sha256"]),
            caption=row["caption"].decode(),
            paraphrases=tuple(text.decode() for text in row["paraphrases"]),
            dialogue=tuple(json.loads(row["dialogue"] or b"[]")),
            hazard=bool(row["hazard"]),
            attributes=json.loads(row["attributes"]),
            kind=row["kind"].decode(),
        )


def summary(directory: str | os.PathLike) -> dict:
    """What `build` wrote about a finished data set, its figures and its source; UserError without one."""
    try:
        return json.loads((Path(directory) / SUMMARY).read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{directory}: no records here; build them with `g4v data build` into an empty folder") from None


def splits(directory: str | os.PathLike) -> dict[str, int]:
    """Number of records of each `{split}_{group}`; UserError where there is no finished data set."""
    return summary(directory)["records"]


def kinds(directory: str | os.PathLike, split: str, group: str) -> dict[str, int]:
    """Number of records of each kind of a split and group, {} where it has none."""
    return summary(directory).get("kinds", {}).get(f"{split}_{group}", {})


def read(directory: str | os.PathLike, split: str, group: str, kind: str = "") -> Split:
    """The records of one split and group, or of one kind of them.

    Raises UserError where the data set does not hold them, or is damaged.
    """
    held, name = summary(directory), f"{split}_{group}"
    if name not in held["records"]:
        raise UserError(f"{directory}: no records {name!r}{nearest(name, held['records'])}")
    known = list(held.get("kinds", {}).get(name, {}))
    if kind and kind not in known:
        raise UserError(f"{directory}: {name} has no records of kind {kind!r}{nearest(kind, known)}")
    try:
        source = tfds.builder_from_directory(directory).as_data_source(split=name)
        codes = np.load(Path(directory) / KINDS.format(name), allow_pickle=False) if kind else None
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{directory}: {name} is damaged ({error}); build the records again") from error
    return Split(source, f"{directory}: {name}", np.flatnonzero(codes == known.index(kind)) if kind else None)


def listed(directory: str | os.PathLike, split: str, group: str) -> list[Record]:
    """All records of a split and group, [] where the data set has none; UserError where it is damaged."""
    return list(read(directory, split, group)) if f"{split}_{group}" in splits(directory) else []


def footage(record: Record, index: int, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode one video of a record as `video.decode` does; UserError where its bytes are not those that were built."""
    data = record.videos[index]
    if hashlib.sha256(data).hexdigest() != record.sha256[index]:
        raise UserError(f"{record.id}: video {index} does not match its checksum; build the records again")
    return video.decode(data, frames, height, width, f"{record.id}: video {index}")


def build(source_dirs: str | os.PathLike | Sequence[str | os.PathLike], out_dir: str | os.PathLike) -> dict:
    """Build the data set `out_dir` from one folder of clips and jsonl files, or several, whole or not at all.

    A line that is not as described above raises UserError with its file and number, and so do two splits that hold one
    video. A video that cannot be read in full takes its records with it: they are listed in `skipped.jsonl`. Where `out_dir` was already
    built from the same source it is kept, and the summary says `reused`.

    Returns the summary: "records" and "kinds" by split, "skipped", "videos", "bytes", "source" (fingerprint) and "reused".
    """
    sources = [source_dirs] if isinstance(source_dirs, str | os.PathLike) else source_dirs
    sources, out = [Path(source) for source in sources], Path(out_dir)
    source = ", ".join(map(str, sources))  # as messages name it
    entries = _settled([entry for folder in sources for entry in _entries(folder, alone=len(sources) == 1)])
    fingerprint = _fingerprint(sources, entries)
    if out.exists() and any(out.iterdir()):
        if not (out / SUMMARY).is_file():
            raise UserError(f"{out}: not a data set of this program and not empty; give another folder")
        found = summary(out)
        if found["source"] == fingerprint:
            log.info("%s is up to date with %s", out, source)
            return found | {"reused": True}

    digests, faults = _check_videos(entries)
    refuse_overlap((digests[path], one.id, one.split) for one in entries for path in one.videos if path in digests)
    good, skipped = {}, []
    for entry in entries:
        bad = next((path for path in entry.videos if path in faults), None)
        if bad is None:
            good.setdefault(f"{entry.split}_{entry.group}", []).append(entry)
        else:
            skipped.append({"record": entry.id, "video": bad, "reason": faults[bad]})
    if not good:
        raise UserError(f"{source}: not one usable record of {len(skipped)}; the first fault: {skipped[0]['reason']}")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        tfds.disable_progress_bar()
        builder = G4vRecords(good, digests, data_dir=partial, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints about downloads, and there are none
            builder.download_and_prepare()
        built = Path(builder.data_path)
        made = {
            "records": {name: len(group) for name, group in sorted(good.items())},
            "kinds": {name: dict(sorted(Counter(one.kind for one in group).items())) for name, group in good.items()},
            "skipped": len(skipped),
            "videos": len(digests),
            "bytes": sum(file.stat().st_size for file in built.iterdir()),
            "source": fingerprint,
        }
        (built / SKIPPED).write_text("".join(json.dumps(row) + "\n" for row in skipped))
        (built / KINDS).parent.mkdir()
        for name, counts in made["kinds"].items():
            codes = {kind: code for code, kind in enumerate(counts)}
            np.save(built / KINDS.format(name), np.array([codes[one.kind] for one in good[name]], np.uint16))
        (built / SUMMARY).write_text(json.dumps(made, indent=2))
        if out.exists():
            out.rename(partial / "replaced")
        built.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if skipped:
        log.warning("%s: %d records skipped, see %s", source, len(skipped), out / SKIPPED)
    return made | {"reused": False}


class G4vRecords(tfds.core.GeneratorBasedBuilder):
    """The TFDS side: the schema, and the records in the order of their files. `Text` holds bytes as they are."""

    VERSION = tfds.core.Version("1.1.0")
    url_infos = None  # nothing is downloaded; looking for checksums would need a package that TFDS does not install

    def __init__(self, entries: dict[str, list["_Entry"]], digests: dict[str, str], **kwargs):
        self._entries, self._digests = entries, digests
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text, lambda: tfds.features.Sequence(tfds.features.Text())
        features = {"id": text(), "videos": texts(), "sha256": texts(), "caption": text(), "paraphrases": texts()}
        features |= {"dialogue": text(), "hazard": np.int64, "attributes": text(), "kind": text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True, description=__doc__
        )

    def _split_generators(self, manager) -> dict:
        return {name: self._generate_examples(entries) for name, entries in self._entries.items()}

    def _generate_examples(self, entries: list["_Entry"]) -> Iterator[tuple[int, dict]]:
        for number, entry in enumerate(entries):
            row = asdict(entry) | {"hazard": int(entry.hazard)}
            row["videos"] = [Path(path).read_bytes() for path in entry.videos]
            row["sha256"] = [self._digests[path] for path in entry.videos]
            del row["split"], row["group"]
            yield number, row


@dataclass(frozen=True)
class _Entry:
    """A checked line, with the paths of its videos."""

    id: str  # file:line, and before it the folder where there are several
    split: str  # "" where the line has none
    group: str
    videos: tuple[str, ...]
    caption: str
    paraphrases: tuple[str, ...]
    dialogue: str  # JSON, or "" for a captioned clip
    hazard: bool
    attributes: str  # JSON
    kind: str


def _entries(source: Path, alone: bool) -> list[_Entry]:
    readers = {"captions.jsonl": _caption, "dialogues.jsonl": _dialogue}
    present = [name for name in readers if (source / name).is_file()]
    if not present:
        raise UserError(f"{source}: no captions.jsonl in it; write one line {{'video': ..., 'caption': ...}} a clip")
    entries = []
    for name in present:
        place = name if alone else str(source / name)
        entries += [readers[name](row, where, source) for row, where in read_lines(source / name, place)]
    if not entries:
        raise UserError(f"{source}: {' and '.join(present)} has no lines")
    return entries


def _settled(entries: list[_Entry]) -> list[_Entry]:
    """Entries without a split get that of another line with their video, else one by their words."""
    of = {path: entry.split for entry in entries if entry.split for path in entry.videos}
    found = []
    for entry in entries:
        if not entry.split:
            words = entry.caption or json.loads(entry.dialogue)[0]["text"]
            entry = replace(entry, split=next((of[path] for path in entry.videos if path in of), None) or _split_of(words))
            of |= dict.fromkeys(entry.videos, entry.split)
        found.append(entry)
    return found


def _caption(row: dict, where: str, source: Path) -> _Entry:
    known = {"video": str, "caption": str, "paraphrases": list, "split": str, "hazard": bool, "attributes": dict}
    _check(row, where, known, required=("video", "caption"))
    paraphrases = row.get("paraphrases", [])
    if not all(isinstance(text, str) and text for text in paraphrases):
        raise UserError(f"{where}: 'paraphrases' must be texts that are not empty")
    hazard = row.get("hazard", False)
    return _Entry(
        id=where,
        split=row.get("split", ""),
        group="hazards" if hazard else "clips",
        videos=(_inside(row["video"], where, source),),
        caption=row["caption"],
        paraphrases=tuple(paraphrases),
        dialogue="",
        hazard=hazard,
        attributes=json.dumps(row.get("attributes", {})),
        kind="clip",
    )


def _dialogue(row: dict, where: str, source: Path) -> _Entry:
    _check(row, where, {"turns": list, "split": str, "hazard": bool, "kind": str}, required=("turns",))
    videos, turns = [], []

    def place(path: str) -> int:
        videos.append(_inside(path, where, source))
        return len(videos) - 1

    for number, turn in enumerate(row["turns"]):
        here = f"{where}: turn {number}"
        role = ("user", "assistant")[number % 2]
        extra = {"video": str} if role == "user" else {"render": dict, "rejected": str}
        if not isinstance(turn, dict):
            raise UserError(f"{here}: expected an object {{...}}, found {type(turn).__name__}")
        _check(turn, here, {"role": str, "text": str} | extra, required=("role",))
        if turn["role"] != role:
            raise UserError(f"{here}: role {turn['role']!r}; turns alternate and start with the user's, so {role!r}")
        if "rejected" in turn and (not turn["rejected"] or number < len(row["turns"]) - 1):
            raise UserError(f"{here}: 'rejected' is a text beside the last answer")
        turn = {"text": ""} | turn
        if "video" in turn:
            turn["video"] = place(turn["video"])
        if "render" in turn:
            _check(turn["render"], here, {"caption": str, "video": str}, required=("caption", "video"))
            turn["render"] = turn["render"] | {"video": place(turn["render"]["video"])}
        turns.append(turn)
    if len(turns) % 2:
        raise UserError(f"{where}: the last turn is the user's; end with an answer")
    return _Entry(
        id=where,
        split=row.get("split", ""),
        group="dialogues",
        videos=tuple(videos),
        caption="",
        paraphrases=(),
        dialogue=json.dumps(turns, ensure_ascii=False),
        hazard=row.get("hazard", False),
        attributes="{}",
        kind=row.get("kind", "dialogue"),
    )


def _check(row: dict, where: str, known: dict[str, type], required: Sequence[str]) -> None:
    """Names and types of a JSON object's fields; required ones must be present and not empty."""
    for name, value in row.items():
        if name not in known:
            raise UserError(f"{where}: unknown field {name!r}{nearest(name, known)}")
        if not isinstance(value, known[name]):
            raise UserError(f"{where}: {name!r} must be a {known[name].__name__}, not {type(value).__name__}")
    for name in required:
        if not row.get(name):
            raise UserError(f"{where}: {name!r} is missing or empty")
    if row.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: split {row['split']!r}; use one of {', '.join(SPLITS)}")


def _inside(path: str, where: str, source: Path) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise UserError(f"{where}: video {path!r} must be a path inside the folder")
    return str(source / parts)


def _split_of(text: str) -> str:
    """90 % train, 5 % validation, 5 % test, by the words alone, so that equal captions never straddle splits."""
    place = int(hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest(), 16) % 100
    return "train" if place < 90 else "validation" if place < 95 else "test"


def _fingerprint(sources: list[Path], entries: list[_Entry]) -> str:
    """Of the text files' bytes, the sizes of the videos that they name, and the schema."""
    digest = hashlib.sha256(str(G4vRecords.VERSION).encode())
    for source in sources:
        for name in ("captions.jsonl", "dialogues.jsonl"):
            if (source / name).is_file():
                digest.update((source / name).read_bytes())
        below = (path for entry in entries for path in entry.videos if Path(path).is_relative_to(source))
        for path in sorted(set(below)):
            size = Path(path).stat().st_size if Path(path).is_file() else -1
            digest.update(f"{Path(path).relative_to(source)}\0{size}\0".encode())
    return digest.hexdigest()


def _check_videos(entries: list[_Entry]) -> tuple[dict[str, str], dict[str, str]]:
    """Decode every video once: the SHA-256 of the good ones, and the fault of the others."""
    paths = sorted({path for entry in entries for path in entry.videos})
    digests, faults = {}, {}

    def check(path: str) -> None:
        try:
            data = Path(path).read_bytes()
            video.probe(data, path)
            digests[path] = hashlib.sha256(data).hexdigest()
        except OSError as error:
            faults[path] = f"{path}: cannot be read ({error.strerror})"
        except UserError as error:
            faults[path] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in tqdm(pool.map(check, paths), "checking videos", len(paths), unit=" clips", disable=None):
            pass
    return digests, faults
