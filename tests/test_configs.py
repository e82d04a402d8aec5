"""Shipped configs at full size, and every way a config can be wrong.

The sharding of every parameter of every config is kept in tests/golden. After a change that is meant to change it:

    G4V_UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py
"""

import importlib
import inspect
import math
import os
import sys
from functools import cache, partial
from pathlib import Path

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from g4v_jax import config as configs
from g4v_jax import trees
from g4v_jax.build import Build
from g4v_jax.plan.account import describe, sharding_table
from g4v_jax.commands.common import parse
from g4v_jax.errors import UserError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
MESH = {"fsdp": 4, "tensor": 2}
MESHES = {"smol": {"fsdp": 2}, "bench": {"fsdp": 2}}  # few rows a step, and nine heads


@cache
def shipped() -> dict:
    """{name: function that makes the config} of every config file and its stages."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        make = getattr(module, "get_config", None)
        if make and inspect.signature(make).parameters:
            found |= {f"{path.stem}-{stage}": partial(make, stage) for stage in getattr(module, "STAGES", ("autoencoder", "model"))}
        elif make:
            found[path.stem] = make
    return found


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_config_builds_and_shards_as_it_did(name):
    config = shipped()[name]()
    config.mesh = MESHES.get(name.split("-")[0], MESH)
    build = Build(config, tuple(jax.devices()[: math.prod(dict(config.mesh).values())]))
    build.sources()
    report = describe(build)  # reads every section; sizes that do not divide over the mesh raise
    assert all(size >= 0 for size in report["bytes_per_device"].values())
    assert sum(count["trainable"] for count in report["parameters"].values()) > 0
    table, golden = sharding_table(build), GOLDEN / f"{name}.txt"
    if os.environ.get("G4V_UPDATE_GOLDEN") == "1":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(table)
    assert golden.exists(), "no golden file; see this module's docstring"
    assert table.splitlines() == golden.read_text().splitlines(), "if this is meant, see this module's docstring"


def test_no_golden_file_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(shipped())


def test_the_papers_sizes():
    """What GPT4Video states: 65 tokens a clip of 257 features a frame, LoRA of rank 16 on q and v of a 7B LLaMA."""
    build = Build(shipped()["paper_7b"](), tuple(jax.devices()))
    report, model = describe(build)["parameters"], build.model
    assert model.summarizer.tokens == 65 and model.vision.patches == 257
    added = 2 * 8 * 4096  # our own words, in and out
    assert report["llm"] == {"trainable": 32 * 2 * (4096 * 16 + 16 * 4096) + added, "frozen": 6_738_415_616}
    assert [report[tower] for tower in ("denoiser", "autoencoder")] == [
        {"trainable": 0, "frozen": 1_411_233_860},
        {"trainable": 0, "frozen": 83_653_863},
    ]


def test_our_sizes():
    """Published parameter counts; of SigLIP without the pooling head, which we do not use."""
    report = describe(Build(shipped()["g4v_8b"](), tuple(jax.devices())))["parameters"]
    head = 1152 + 4 * 1152**2 + 4 * 1152 + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
    assert report["vision"] == {"trainable": 0, "frozen": 428_225_600 - head}
    assert report["llm"]["frozen"] == 8_190_735_360
    assert report["denoiser"] == {"trainable": 1_418_996_800, "frozen": 0}
    assert report["autoencoder"] == {"trainable": 0, "frozen": 126_892_531}


@pytest.mark.parametrize("name, fsdp", [("paper_7b", 64), ("g4v_8b", 128)])
def test_large_models_divide_over_many_devices(name, fsdp):
    """What a mesh axis splits must be a multiple of its size on a pod, not of 8 alone. A UNet has 320 channels."""
    sizes = {"fsdp": fsdp, "tensor": 4}
    for path, leaf in trees.flatten(Build(shipped()[name](), tuple(jax.devices())).blueprint.shapes).items():
        for size, axis in zip(leaf.shape, leaf.sharding.spec):
            assert size % sizes.get(axis, 1) == 0, f"{path} {leaf.shape} {axis}"


# Mistakes


def broken(path: str, value) -> ConfigDict:
    """`tiny.config()` with one field, known or not, set to something."""
    config = tiny.config().to_dict()
    section = config
    *parents, last = path.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return ConfigDict(config)


def read_all(config: ConfigDict) -> None:
    describe(Build(config, tuple(jax.devices()[:1])))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("optimiser", {}, "config has no field 'optimiser'; did you mean 'optimizer'"),
        ("model.lm", {}, "model has no tower 'lm'; did you mean 'llm'"),
        ("model.llm.num_layer", 3, "model.llm has no field 'num_layer'; did you mean 'num_layers'"),
        ("model.vision.dims", 32, "model.vision has no field 'dims'; did you mean 'dim'"),
        ("model.llm.parent", 1, "model.llm has no field 'parent'"),
        ("rows.token", 3, "rows has no field 'token'; did you mean 'tokens'"),
        ("losses.captions", 1.0, "losses has no field 'captions'; did you mean 'caption'"),
        ("optimizer.lr", 0.1, "optimizer has no field 'lr'; known: .*learning_rate"),
        ("step.micro_batch", 2, "step has no field 'micro_batch'; did you mean 'micro_batches'"),
        ("data.seeds", 2, "data has no field 'seeds'; did you mean 'seed'"),
        ("sample.guidence", 2, "sample has no field 'guidence'; did you mean 'guidance'"),
        ("evaluate.caption", 2, "evaluate has no field 'caption'; did you mean 'captions'"),
        ("precision.frozn", "auto", "precision has no field 'frozn'; did you mean 'frozen'"),
        ("tokenizer.size", 3, "tokenizer has no field 'size'; known: path, vocab_size"),
        ("mesh.tensors", 1, "unknown axis 'tensors'; did you mean 'tensor'"),
        ("objective", "joined", "objective: unknown 'joined'; did you mean 'joint'"),
        ("optimizer.name", "moun", "optimizer.name: unknown 'moun'; did you mean 'muon'"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(path, value, message):
    with pytest.raises(UserError, match=message):
        read_all(broken(path, value))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.denoiser.image_dim", 8, "image-to-video denoisers can be imported, run and exported, not trained"),
        ("model.denoiser.kind", "dot", "model.denoiser.kind: unknown 'dot'; did you mean 'dit'"),
        ("model.summarizer.kind", "x", "model.summarizer.kind: unknown 'x'; known: abstractor, summarizer"),
        ("rows.clips", 0, "rows.clips is 0; objective 'joint' needs 1 at least"),
        ("rows.targets", 0, "rows.targets is 0; objective 'joint' needs 1 at least"),
        ("model.llm.dim", "wide", "model.llm.dim is 'wide'; expected int"),
        ("model.llm.dim", 32.5, "model.llm.dim is 32.5; expected int"),
        ("model.llm.tied", 1, "model.llm.tied is 1; expected bool"),
        ("model.llm.num_layers", True, "model.llm.num_layers is True; expected int"),
        ("model.llm.qk_norm", 3, "model.llm.qk_norm is 3; expected str or NoneType"),
        ("model.denoiser.patch", 2, "model.denoiser.patch is 2; expected tuple"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate is 'fast'; expected float"),
        ("optimizer.learning_rate", True, "optimizer.learning_rate is True; expected float"),
        ("trainable", "llm/.*", "config.trainable is 'llm/..'; expected tuple"),
        ("rows", 8, "config.rows is 8; expected dict"),
        ("model.llm.vocab_size", 264, r"model.llm.vocab_size follows from other fields \(264\); do not set it"),
        ("model.summarizer.llm_dim", 32, "model.summarizer.llm_dim follows from other fields"),
        ("model.conditioner.length", 2, "model.conditioner.length follows from other fields"),
        ("model.caption_window", -1, "model.caption_window is -1; expected a whole number"),
        ("model.caption_window", "all", "model.caption_window is 'all'; expected a whole number"),
        ("rows.clip_size", 16, "rows.clip_size follows from other fields"),
        ("sample.time_shift", 3.0, "sample.time_shift follows from other fields"),
        ("rows.target_frames", 6, "rows.*: autoencoder: 6 frames of 16x16 px; needs 1 . 4k"),
        ("rows.clips", -1, "clips is -1; it must be at least 0"),
        ("train.log_every", 0, "log_every: 0 is below 1"),
        ("rows.rows", 3, "rows.rows is 3"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(path, value, message):
    config = broken(path, value)
    if path == "rows.rows":
        config.step.micro_batches = 2
    with pytest.raises(UserError, match=message):
        read_all(config)


REQUIRED = ("model.llm.dim", "rows.tokens", "data.records", "train.steps", "tokenizer.vocab_size")


@pytest.mark.parametrize("path", REQUIRED)
def test_a_missing_field_is_named(path):
    config = tiny.config()
    section, field = path.rsplit(".", 1)
    with config.unlocked():
        parent = config
        for name in section.split("."):
            parent = parent[name]
        del parent[field]
    with pytest.raises(UserError, match=f"{path} is not set"):
        build = Build(config, tuple(jax.devices()[:1]))
        read_all(config)
        build.loop


@pytest.mark.parametrize("section", ["model", "rows", "data", "tokenizer", "train"])
def test_a_missing_section_is_named(section):
    config = tiny.config()
    del config[section]
    with pytest.raises(UserError, match=f"config.{section} is not set"):
        read_all(config)


def test_whole_numbers_stand_for_floats_and_lists_for_tuples():
    config = broken("optimizer.learning_rate", 1)
    config.model.denoiser.patch = [1, 2, 2]
    build = Build(config, tuple(jax.devices()[:1]))
    assert build.optimizer and build.model.denoiser.patch == (1, 2, 2)
    assert hash(build.model) == hash(Build(config, tuple(jax.devices()[:1])).model)  # jit takes it as a static argument


def test_frozen_towers_need_weights_and_weights_a_tower():
    with pytest.raises(UserError, match="autoencoder has frozen parameters but no weights; set init.autoencoder"):
        Build(tiny.config(), tuple(jax.devices()[:1])).sources()
    config = broken("init", {"autoencoder": "runs/a", "autoencodr": "runs/b"})
    with pytest.raises(UserError, match="init.autoencodr: no such tower; did you mean 'autoencoder'"):
        Build(config, tuple(jax.devices()[:1])).sources()


# On disk and on the command line


def test_a_workdir_keeps_its_config_and_refuses_another(tmp_path):
    configs.save(tiny.config(), tmp_path / "run")
    assert read(tmp_path / "run") == read(tmp_path / "run")
    configs.save(tiny.config(), tmp_path / "run")
    loaded = Build(configs.load(tmp_path / "run"), tuple(jax.devices()[:1]))
    assert loaded.model == tiny.build().model and loaded.shape == tiny.build().shape
    other = broken("optimizer.learning_rate", 0.5)
    other.model.llm.num_layers = 7
    differing = r"model.llm.num_layers: 2 there, 7 here; optimizer.learning_rate: 0.01 there, 0.5 here"
    with pytest.raises(UserError, match=rf"made with another config \({differing}\); choose another --workdir"):
        configs.save(other, tmp_path / "run")
    with pytest.raises(UserError, match="data.threads: None there, 2 here"):
        configs.save(broken("data.threads", 2), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def read(workdir: Path) -> str:
    return (workdir / "config.json").read_text()


def test_a_folder_without_a_run_or_with_a_torn_config_is_named(tmp_path):
    with pytest.raises(UserError, match="no run here .config.json is missing.; train one"):
        configs.load(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        configs.load(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/quickstart.py", "--config.model.llm.dims=3"], 'dims.*Did you mean "dim"'),
        (["--config=configs/quickstart.py", "--config.model.llm.dim=big"], "config.model.llm.dim=big: .*'big'"),
        (["--config=configs/quickstart.py:modle"], "argument 'modle'; known: autoencoder, model"),
        (["--config=configs/nothing.py"], "cannot read the config: .*nothing.py"),
        (["--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: .*workdir"),
    ],
)
def test_mistakes_on_the_command_line_are_named(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"^g4v train: .*{message}") as mistake:
        parse("train", arguments, workdir=True)
    assert "\n" not in str(mistake.value) and "Traceback" not in str(mistake.value)


def test_a_field_is_set_on_the_command_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config=configs/quickstart.py:autoencoder", "--config.train.steps=7", "word", "--workdir=here"]
    values, positional = parse("train", arguments, workdir=True)
    assert values.config.train.steps == 7 and values.config.objective == "reconstruction"
    assert values.workdir == "here" and positional == ["word"]
