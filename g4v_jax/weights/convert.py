"""Import and export: tensors stream one at a time between a published layout and ours, and every one is accounted for.

May hold the two directions and their staging: a folder appears whole, under its name, or not at all.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import flax.linen as nn
import numpy as np

from g4v_jax import config as configs
from g4v_jax import trees
from g4v_jax.errors import UserError
from g4v_jax.weights import tables
from g4v_jax.weights.leaves import Leaves, merged
from g4v_jax.weights.families import recognise
from g4v_jax.weights.folder import LEFT, MARK, WEIGHTS, TowerFolder, fingerprint, plain
from g4v_jax.weights.report import Report, Row
from g4v_jax.weights.sources import Opened, open_source
from g4v_jax.weights.tables import Family, Move
from g4v_jax.weights.tensors import SafetensorsFile, Writer, explained
from g4v_jax.weights.vision import RESIZABLE, Resized

FORMAT = 1  # of tower.json
FLOATS = (np.float64, np.float32, np.float16, "bfloat16")


@contextlib.contextmanager
def staged(out: str | Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` when all went well, and is gone when not.

    Raises UserError where `out` holds something and `overwrite` is not set, or the disk is full.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise UserError(f"{out}: already holds something; choose another --out, or say --overwrite")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise explained(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_tower(
    source: str | Path,
    out: str | Path,
    ignore: Iterable[str] = (),
    overwrite: bool = False,
    tower: str | None = None,
    layers: int | None = None,
    image_size: int | None = None,
) -> tuple[TowerFolder, Report]:
    """Convert a published tower into a folder of ours.

    Holds one tensor at a time. `tower`: which one of a checkpoint that holds several. `layers`: the first so many alone;
    the others' tensors must then be named by `ignore`. `image_size`: of a vision tower, whose table of positions is
    resized to it. Raises UserError as `sources.open_source`, `families.recognise`, `tables.plan` and `staged` do, for
    layers or a size that the tower cannot have, and for a tensor that is no floating-point number.
    """
    opened = open_source(source)
    if opened.kind == "adapter":
        raise UserError(f"{source}: an adapter; say which imported tower it is for by --base=DIR")
    family = recognise(opened.config, str(opened.path), tower)
    module = _module(family, opened)
    if layers is not None:
        module = _shortened(module, layers)
    if image_size is not None:
        module, opened = _resized(family, module, opened, image_size)
    plan = tables.plan(family, module, opened.tensors, ignore)
    dtypes = _leaf_dtypes(plan, opened.tensors)
    rows = []

    def values():
        for move in plan.moves:
            name, dtype = plan.names[move.name], dtypes[move.path]
            rows.append(Row(name, move.theirs, str(dtype), move.path, move.layer))
            yield move.path, move.layer, move.layout.ours(opened.tensors.read(name), move.ours).astype(dtype)

    with staged(out, overwrite) as folder:
        hashes = write_leaves(folder, family, module, dtypes, values())
        _carry_left(folder, family, module, plan, opened.tensors)
        report = Report("import", str(opened.path), family.name, rows, plan.left, fingerprint(hashes))
        finish(folder, family, module, opened.config, hashes, opened.files, report)
    return TowerFolder(Path(out)), report


def write_leaves(folder: Path, family: Family, module, dtypes: dict, values: Iterable) -> dict[str, str]:
    """Write a tower's leaves from (path, layer, value), layers in order, and return the SHA-256 of each."""
    shapes = trees.flatten(tables.tower_shapes(family.tower, module))
    hashes = {path: hashlib.sha256() for path in shapes}
    with Writer(folder / WEIGHTS, {path: (dtypes[path], leaf.shape) for path, leaf in shapes.items()}) as writer:
        for path, layer, value in values:
            value = np.ascontiguousarray(value)
            writer.write(path, value, layer)
            hashes[path].update(value.reshape(-1).view(np.uint8))
    return {path: content.hexdigest() for path, content in hashes.items()}


def finish(folder: Path, family: Family, module, config: dict, hashes: dict, files: dict, report: Report) -> None:
    """Write what stands beside the leaves; tower.json last, since it makes the folder a tower."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    report.write(folder)
    about = {
        "format": FORMAT,
        "tower": family.tower,
        "family": family.name,
        "source": report.source,
        "fields": {f.name: plain(getattr(module, f.name)) for f in _own_fields(module)},
        "config": config,
        "leaves": hashes,
        "fingerprint": report.fingerprint,
    }
    (folder / MARK).write_text(json.dumps(about, indent=1))


def _module(family: Family, opened: Opened) -> nn.Module:
    """The tower that config.json describes. Raises UserError where it describes none."""
    config = dict(opened.config)
    with contextlib.suppress(KeyError, ValueError, AttributeError):  # where there is none, the family's own serves
        seen = json.loads(opened.files["preprocessor_config.json"])
        config |= {name: seen[name] for name in ("image_mean", "image_std") if name in seen}
    try:
        module = configs.read(family.module, family.fields(config), "config.json")
        tables.tower_shapes(family.tower, module)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError) as error:
        raise UserError(f"{opened.path}: config.json does not describe a {family.name} ({error!r})") from None
    return module


def _shortened(module: nn.Module, layers: int) -> nn.Module:
    """The first layers of a tower."""
    have = getattr(module, "num_layers", 0)
    if not 1 <= layers <= have:
        raise UserError(f"import: --layers={layers}; this tower has {have}")
    return module.clone(parent=None, num_layers=layers)


def _resized(family: Family, module: nn.Module, opened: Opened, size: int) -> tuple[nn.Module, Opened]:
    """A vision tower for square pictures of another size."""
    if family.name not in RESIZABLE:
        raise UserError(f"import: --image_size is for {', '.join(RESIZABLE)}, not for {family.name}")
    if size < module.patch_size:
        raise UserError(f"import: --image_size={size} is less than a patch of {module.patch_size}")
    bare = next(entry.name for entry in family.entries(module) if entry.path == "positions")
    name = next((name for name in opened.tensors.names() if family.bare(name) == family.bare(bare)), bare)
    tensors = Resized(opened.tensors, name, size // module.patch_size, module.class_token)
    return module.clone(parent=None, image_size=size), dataclasses.replace(opened, tensors=tensors)


def _own_fields(module: nn.Module):
    return [f for f in dataclasses.fields(module) if f.name not in configs.FLAX_FIELDS]


def _leaf_dtypes(plan: tables.Plan, source: tables.Source) -> dict[str, np.dtype]:
    """The dtype of each leaf: its tensors', or the widest of them where layers differ."""
    found: dict[str, np.dtype] = {}
    for move in plan.moves:
        name = plan.names[move.name]
        dtype = source.dtype(name)
        if dtype not in map(np.dtype, FLOATS):
            raise UserError(f"{name} is {dtype}; weights can be {', '.join(np.dtype(f).name for f in FLOATS)}")
        known = found.setdefault(move.path, dtype)
        if known != dtype:
            found[move.path] = np.dtype(np.float32)
    return found


def _carry_left(folder: Path, family: Family, module, plan: tables.Plan, source: tables.Source) -> None:
    """Keep the tensors that we do not compute with but that the published layout must have."""
    wanted = family.neutral(module)
    held = {family.bare(name): name for name in plan.left}
    kept = {name: held[family.bare(name)] for name in wanted if family.bare(name) in held}
    if kept:
        specs = {name: (source.dtype(theirs), source.shape(theirs)) for name, theirs in kept.items()}
        with Writer(folder / LEFT, specs) as writer:
            for name, theirs in kept.items():
                writer.write(name, source.read(theirs))


@dataclasses.dataclass(frozen=True)
class Published:
    """What export writes beside the weights: taken from where the tower was imported, if it was."""

    config: dict = dataclasses.field(default_factory=dict)
    left: SafetensorsFile | None = None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


def export_tower(
    leaves: Leaves,
    family: Family,
    module: nn.Module,
    out: str | Path,
    source: str,
    published: Published,
    shard_bytes: int,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a tower in its published layout: shards of at most `shard_bytes`, an index, config.json, side files.

    LoRA is merged into the weights. Holds one of our leaves at a time. `dtype`: of the tensors written (None: as they are). Raises UserError where the
    family cannot express the module, and as `staged`.
    """
    leaves, module = merged(leaves, module)
    why = family.fits(module)
    if why is not None:
        raise UserError(f"{source}: {family.name} has no place for this {family.tower}: {why}")
    wanted = tables.moves(family.entries(module), tables.tower_shapes(family.tower, module))
    dtypes = {move.path: np.dtype(dtype or leaves.dtype(move.path)) for move in wanted}
    fused: dict[str, list[Move]] = {}  # a foreign tensor may hold several of our leaves: see `tables.part`
    for move in wanted:
        fused.setdefault(move.name, []).append(move)
    parts: list = [(name, dtypes[group[0].path], group[0].theirs, group) for name, group in fused.items()]
    for name, (shape, fill) in family.neutral(module).items():
        kind = dtypes[wanted[0].path]
        if published.left is not None and name in published.left.names():
            parts.append((name, np.dtype(dtype or published.left.dtype(name)), shape, published.left))
        else:
            parts.append((name, kind, shape, fill))
    generated = family.config(module)
    base = "diffusion_pytorch_model" if "_class_name" in generated else "model"
    rows, content = [], {}
    with staged(out, overwrite) as folder:
        where, total = {}, 0
        groups = list(_shards(parts, shard_bytes))
        for number, group in enumerate(groups, 1):
            suffix = "" if len(groups) == 1 else f"-{number:05}-of-{len(groups):05}"
            path = folder / f"{base}{suffix}.safetensors"
            with Writer(path, {name: (kind, shape) for name, kind, shape, _ in group}) as writer:
                for name, kind, shape, origin in group:
                    value = _value(leaves, name, shape, origin).astype(kind, order="C", copy=False)
                    writer.write(name, value)
                    content[name] = hashlib.sha256(value.reshape(-1).view(np.uint8)).hexdigest()
                    where[name], total = path.name, total + value.nbytes
                    del value  # before the next one is read
                    for move in origin if isinstance(origin, list) else [None]:
                        ours = (None, None) if move is None else (move.path, move.layer)
                        rows.append(Row(name, shape, str(kind), *ours))
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, data in published.files.items():
            (folder / name).write_bytes(data)
        kinds = {kind for _, kind, _, _ in parts}
        config = _export_config(published.config, generated, kinds)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        report = Report("export", source, family.name, rows, {}, fingerprint(content))
        report.write(folder)
    return report


def _value(leaves: Leaves, name: str, shape: tuple, origin) -> np.ndarray:
    """One foreign tensor: from our leaves, from what was carried along, or a neutral filling."""
    if isinstance(origin, list):
        return functools.reduce(operator.add, (m.layout.theirs(leaves.read(m.path, m.layer)) for m in origin))
    return origin.read(name) if isinstance(origin, SafetensorsFile) else np.full(shape, origin, np.float32)


def _shards(parts: list, limit: int) -> Iterator[list]:
    """Split in order so that each group has at most `limit` bytes, or one tensor."""
    group, size = [], 0
    for part in parts:
        nbytes = int(np.prod(part[2])) * part[1].itemsize
        if group and size + nbytes > limit:
            yield group
            group, size = [], 0
        group.append(part)
        size += nbytes
    yield group


def _laid_over(base: dict, top: dict) -> dict:
    both = {k: _laid_over(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **both}


def _export_config(base: dict, generated: dict, kinds: set[np.dtype]) -> dict:
    """The source's config.json where it names the same architecture, under what the module says itself."""
    key = "_class_name" if "_class_name" in generated else "architectures"
    config = _laid_over(base, generated) if base.get(key) == generated[key] else dict(generated)
    if key == "architectures" and len(kinds) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = next(iter(kinds)).name
    if "rope_parameters" in config:
        config.pop("rope_scaling", None), config.pop("rope_theta", None)
    return config
