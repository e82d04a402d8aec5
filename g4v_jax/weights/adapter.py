"""LoRA as PEFT lays it out, both ways: an adapter folder beside a base model of a known family.

May hold the adapter's names and its adapter_config.json. PEFT's A is [rank in] and B [out rank]; ours lie as kernels do.
"""

import hashlib
import json
from pathlib import Path

import flax.linen as nn
import numpy as np

from g4v_jax.errors import UserError
from g4v_jax.weights import tables
from g4v_jax.weights.convert import finish, staged, write_leaves
from g4v_jax.weights.folder import TowerFolder, fingerprint
from g4v_jax.weights.leaves import Leaves
from g4v_jax.weights.report import Report, Row
from g4v_jax.weights.sources import open_source
from g4v_jax.weights.tables import Entry, Family, Move, kernel

PREFIX = "base_model.model."
MAPS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"} | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)
PLAIN = {  # settings that change the computation, and the value at which they do not
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "lora_bias": False,
    "trainable_token_indices": None,
}
FILE = "adapter_model.safetensors"


def entries(family: Family, module: nn.Module) -> list[Entry]:
    """The table of a module's LoRA: two lines for each kernel that carries it."""
    carrying = {theirs for theirs, ours in MAPS.items() if ours in module.lora}
    found = []
    for entry in family.entries(module):
        name = entry.name.removesuffix(".weight")
        if entry.path.endswith("/kernel") and name.rsplit(".")[-1] in carrying:
            room = entry.path.removesuffix("kernel")
            inputs = 2 if name.endswith("o_proj") else 1
            found.append(Entry(room + "lora_a", f"{PREFIX}{name}.lora_A.weight", kernel(inputs)))
            found.append(Entry(room + "lora_b", f"{PREFIX}{name}.lora_B.weight", kernel()))
    return found


def _moves(family: Family, module: nn.Module) -> list[Move]:
    table = entries(family, module)
    paths = {entry.path for entry in table}
    from g4v_jax import trees

    shapes = trees.split(tables.tower_shapes(family.tower, module), paths)[0]
    return tables.moves(table, shapes)


def import_adapter(
    source: str | Path, base: str | None, out: str | Path, overwrite: bool = False
) -> tuple[TowerFolder, Report]:
    """Lay an adapter beside the imported tower it was trained on: a new tower that carries LoRA.

    Raises UserError where no base is given, the adapter is for another one (by name or by shape), or it is of a kind
    that LoRA alone does not express.
    """
    opened = open_source(source)
    if base is None:
        raise UserError(f"{source}: an adapter; say which imported tower it is for by --base=DIR")
    tower = TowerFolder(Path(base))
    family, config = tower.family, opened.config
    if family.tower != "llm":
        raise UserError(f"{base}: a {family.tower}; adapters are for an llm")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{source}: peft_type {config.get('peft_type')!r}; supported: LORA")
    for name, value in PLAIN.items():
        if config.get(name) not in (value, None, False, {}, []):
            raise UserError(f"{source}: {name} is {config[name]!r}, which is not supported")
    _same_base(source, config, tower)
    targets = {name.split(".lora_")[0].rsplit(".")[-1] for name in opened.tensors.names()}
    lora = tuple(sorted({MAPS[name] for name in targets & MAPS.keys()}))
    module = tower.module.clone(
        parent=None,
        lora=lora,
        lora_rank=int(config["r"]),
        lora_alpha=float(config["lora_alpha"]),
        lora_dropout=float(config.get("lora_dropout", 0.0)),
    )
    moves = _moves(family, module)
    _same_tensors(source, moves, opened.tensors)
    dtypes = {path: tower.file.dtype(path) for path in tower.about["leaves"]}
    dtypes |= {move.path: opened.tensors.dtype(move.name) for move in moves}
    rows = [Row(move.name, move.theirs, str(dtypes[move.path]), move.path, move.layer) for move in moves]

    def values():
        for path in tower.about["leaves"]:
            shape = tower.file.shape(path)
            stacked = path.startswith("layers/")
            for layer in range(shape[0]) if stacked else (None,):
                yield path, layer, tower.file.read(path, layer)
        for move in moves:
            yield move.path, move.layer, move.layout.ours(opened.tensors.read(move.name), move.ours)

    with staged(out, overwrite) as folder:
        hashes = write_leaves(folder, family, module, dtypes, values())
        report = Report("import", str(source), f"{family.name} + LoRA", rows, {}, fingerprint(hashes))
        files = {p.name: p.read_bytes() for p in Path(base).iterdir() if p.name.startswith(("tokenizer", "chat_"))}
        finish(folder, family, module, tower.about["config"], hashes, files, report)
    return TowerFolder(Path(out)), report


def _same_base(source, config: dict, tower: TowerFolder) -> None:
    """Names are compared where both sides have one: the last part of a hub's name."""
    theirs, ours = config.get("base_model_name_or_path"), tower.about["config"].get("_name_or_path")
    if theirs and ours and Path(theirs).name != Path(ours).name:
        raise UserError(f"{source}: made for {theirs}, but {tower.path} is {ours}")


def _same_tensors(source, moves: list[Move], tensors) -> None:
    wanted, held = {move.name: move.theirs for move in moves}, set(tensors.names())
    differing = sorted(wanted.keys() ^ held)
    if differing:
        where = "has no place in the base" if differing[0] in held else "is missing"
        raise UserError(f"{source}: an adapter for another base, or of part of a layer: {differing[0]} {where}")
    for name, shape in wanted.items():
        if tuple(tensors.shape(name)) != shape:
            raise UserError(
                f"{source}: an adapter for another base: {name} is {list(tensors.shape(name))}, the base makes it {list(shape)}"
            )


def export_adapter(
    leaves: Leaves, family: Family, module: nn.Module, out: str | Path, source: str, base: str, overwrite: bool = False
) -> Report:
    """Write a tower's LoRA alone as a PEFT folder. `base`: the name of the model it goes with.

    Raises UserError where the tower carries none.
    """
    from g4v_jax.weights.tensors import Writer

    if not module.lora_rank:
        raise UserError(f"{source}: the llm carries no LoRA to write as an adapter")
    moves = _moves(family, module)
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=module.lora_rank,
        lora_alpha=module.lora_alpha,
        lora_dropout=module.lora_dropout,
        target_modules=sorted(theirs for theirs, ours in MAPS.items() if ours in module.lora),
        bias="none",
        inference_mode=True,
        fan_in_fan_out=False,
    )
    rows, content = [], {}
    with staged(out, overwrite) as folder:
        specs = {move.name: (leaves.dtype(move.path), move.theirs) for move in moves}
        with Writer(folder / FILE, specs) as writer:
            for move in moves:
                value = move.layout.theirs(leaves.read(move.path, move.layer))
                writer.write(move.name, value)
                rows.append(Row(move.name, move.theirs, str(value.dtype), move.path, move.layer))
                content[move.name] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        report = Report("export", source, f"{family.name} LoRA", rows, {}, fingerprint(content))
        report.write(folder)
    return report
