"""`g4v eval`."""

import json
import time
from pathlib import Path

from absl import flags

from g4v_jax.commands.common import open_run, parse, threshold_file, write_json
from g4v_jax.errors import UserError

SUITES = ("all", "attack")  # captioning, generation and safety; harmful requests in disguises


def evaluate(arguments: list[str]) -> None:
    """Measure a run; leaves report.json, index.html and picture sheets in its folder or --out."""
    started = time.time()

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("times", None, "File of 'stage seconds' lines: adds time/total_s.", flag_values=values)
        flags.DEFINE_bool("again", False, "Measure again where there is a report.", flag_values=values)
        flags.DEFINE_enum("suite", "all", SUITES, "What to measure.", flag_values=values)
        flags.DEFINE_string("records", None, "Records to measure on, if not the run's own.", flag_values=values)
        flags.DEFINE_string("out", None, "Folder for report and pictures (default: the run's).", flag_values=values)

    values, _ = parse("eval", arguments, extra=extra, config=False, workdir=True, json=True)
    from g4v_jax.evals import run
    from g4v_jax.evals.figures import Figure

    workdir = Path(values.workdir)
    out = Path(values.out or values.workdir)
    if values.records and not values.out:
        raise UserError("eval: --records needs --out: the run's folder keeps the report of its own records")
    if values.suite == "attack":
        build, assistant, _ = open_run(values.workdir)
        out.mkdir(parents=True, exist_ok=True)
        figures = run.attack(assistant, values.records or build.pipeline.records, build.evaluation, out)
        print(run.table(figures))
        write_json(values.json, json.loads((out / "attack.json").read_text()))
        return
    report = out / "report.json"
    if report.exists() and not values.again:
        figures = {name: Figure(**figure) for name, figure in json.loads(report.read_text()).items()}
        print(f"{out}: already evaluated (--again measures again)")
    else:
        build, assistant, _ = open_run(values.workdir)
        out.mkdir(parents=True, exist_ok=True)
        figures = run.evaluate(assistant, values.records or build.pipeline.records, build.evaluation, out)
        if "safety/threshold" in figures and not values.records:
            threshold_file(values.workdir).write_text(json.dumps({"threshold": figures["safety/threshold"].value}))
        figures |= _training(workdir / "summary.json")
        if values.times:
            figures["time/total_s"] = Figure.exact(_seconds(Path(values.times)) + time.time() - started)
        run.write(report, figures)
    print(run.table(figures))
    print(f"page: {out / 'index.html'}")
    write_json(values.json, json.loads(report.read_text()))


def _training(path: Path) -> dict:
    """What the training loop measured of itself, under the report's names."""
    from g4v_jax.evals.figures import Figure

    if not path.exists():
        return {}
    summary = json.loads(path.read_text())
    names = {"padding": "data/padding", "compiles": "train/compiles", "outside_step": "train/outside_step"}
    return {
        name: Figure.exact(summary[key], summary["steps"]) for key, name in names.items() if summary.get(key) is not None
    }


def _seconds(path: Path) -> float:
    """Sum of the last column of a file of 'stage seconds' lines."""
    return sum(float(line.split()[-1]) for line in path.read_text().splitlines() if line.strip())
