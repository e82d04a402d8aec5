"""What commands share: their common flags, JSON output, and opening a finished run."""

import json
from pathlib import Path

from absl import flags

from g4v_jax import config as configs
from g4v_jax.errors import UserError

DEFAULT_CONFIG = "configs/quickstart.py"
DEFAULT_WORKDIR = "runs/quickstart"


def parse(command: str, arguments: list[str], extra=None, config: bool = True, workdir: bool = False, json: bool = False):
    """Parse a command's flags -> (values, positional arguments). See `config.parse` for errors."""

    def define(values: flags.FlagValues) -> None:
        if config:
            configs.define_config(values, DEFAULT_CONFIG, arguments)
        if workdir:
            flags.DEFINE_string("workdir", DEFAULT_WORKDIR, "Folder of the run.", flag_values=values)
        if json:
            flags.DEFINE_string("json", None, "Also write the figures to this file.", flag_values=values)
        if extra:
            extra(values)

    return configs.parse(command, arguments, define)


def write_json(path: str | None, value: dict) -> None:
    """Write figures where --json asked for them."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(value, indent=1, default=str))


def open_run(workdir: str):
    """(build, assistant, step of its weights) of a trained run. Raises UserError where there is none."""
    from g4v_jax.build import Build
    from g4v_jax.data.text import Tokenizer
    from g4v_jax.infer.assistant import Assistant
    from g4v_jax.train.saved import SavedRun

    build, saved = Build(configs.load(workdir)), SavedRun(workdir)
    assistant = Assistant(
        model=build.model,
        params=saved.load(build.blueprint.shapes),
        tokenizer=Tokenizer.load(Path(workdir) / "tokenizer.json"),
        shape=build.shape,
        spec=build.sample,
        mesh=build.mesh,
    )
    threshold = threshold_file(workdir)
    if threshold.exists():
        assistant.threshold = float(json.loads(threshold.read_text())["threshold"])
    return build, assistant, saved.step


def open_llm(folder: str):
    """(decoder, tokenizer) of an imported LLM. Raises UserError where there is none."""
    from g4v_jax import sharding
    from g4v_jax.data.text import Tokenizer
    from g4v_jax.infer.decode import Decoder
    from g4v_jax.weights.folder import TowerFolder

    tower = TowerFolder(Path(folder))
    if tower.family.tower != "llm":
        raise UserError(f"{folder} is a {tower.family.tower}; only an llm can talk alone")
    mesh = sharding.one_device()
    return Decoder(tower.module, tower.load_whole(), mesh), Tokenizer.load(tower.path / "tokenizer.json")


def threshold_file(workdir: str) -> Path:
    """Where an evaluation leaves the hazard threshold that it chose."""
    return Path(workdir) / "safety.json"
