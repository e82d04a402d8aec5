"""`g4v eval`."""

import json
import time
from pathlib import Path

from absl import flags

from g4v_jax.commands.common import open_run, parse, threshold_file, write_json
from g4v_jax.errors import UserError

SUITES = ("all", "attack", "qa")  # the whole report; harmful requests in disguises; questions of a public set


def evaluate(arguments: list[str]) -> None:
    """Measure a run; leaves report.json, samples.json, index.html and picture sheets in its folder or --out."""
    started = time.time()

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("times", None, "File of 'stage seconds' lines: adds time/total_s.", flag_values=values)
        flags.DEFINE_bool("again", False, "Measure again where there is a report.", flag_values=values)
        flags.DEFINE_enum("suite", "all", SUITES, "What to measure.", flag_values=values)
        flags.DEFINE_string("records", None, "Records to measure on, if not the run's own.", flag_values=values)
        flags.DEFINE_string("out", None, "Folder for report and pictures (default: the run's).", flag_values=values)
        flags.DEFINE_bool("compare", False, "Compare evaluated runs: g4v eval --compare RUN RUN ...", flag_values=values)
        flags.DEFINE_string("set", None, "Layout of --suite=qa: msvd, msrvtt or activitynet.", flag_values=values)
        flags.DEFINE_list("questions", [], "Files of --suite=qa, in the order of the layout.", flag_values=values)
        flags.DEFINE_string("videos", None, "Folder of the videos of --suite=qa.", flag_values=values)
        flags.DEFINE_string("predictions", None, "Captions from anywhere, a line each, to judge.", flag_values=values)

    values, runs = parse("eval", arguments, extra=extra, config=False, workdir=True, json=True)
    if values.compare:
        return _compare(runs, values.json)
    if runs:
        raise UserError(f"eval: what is {runs[0]!r}? Give a run as --workdir=DIR, or several with --compare")
    if values.records and not values.out:
        raise UserError("eval: --records needs --out: the run's folder keeps the report of its own records")
    out = Path(values.out or values.workdir)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; give --out a folder")
    if values.predictions:
        return _predictions(values, out)
    if values.suite == "all":
        return _report(values, out, started)
    if values.suite == "qa" and not (values.set and values.questions and values.videos):
        raise UserError("eval: --suite=qa needs --set, --questions and --videos")
    from g4v_jax.evals import report, run

    build, assistant, _ = open_run(values.workdir)
    out.mkdir(parents=True, exist_ok=True)
    if values.suite == "attack":
        figures = run.attack(assistant, values.records or build.pipeline.records, build.evaluation, out)
    else:
        figures = run.ask_public(assistant, values.set, values.questions, values.videos, out)
    print(report.table(figures))
    write_json(values.json, json.loads((out / f"{values.suite}.json").read_text()))


def _predictions(values, out: Path) -> None:
    from g4v_jax.evals import report, run
    from g4v_jax.evals.spec import EvalSpec

    if not values.records:
        raise UserError("eval: --predictions needs --records, whose held-out clips they are about, and --out")
    found = run.judge_predictions(values.predictions, values.records, EvalSpec.split, out)
    out.mkdir(parents=True, exist_ok=True)
    found.write()
    print(report.table(found.figures, found.notes))
    write_json(values.json, json.loads((out / "report.json").read_text()))


def _report(values, out: Path, started: float) -> None:
    from g4v_jax.evals import report, run
    from g4v_jax.evals.figures import Figure

    file = out / "report.json"
    seconds = _seconds(Path(values.times)) if values.times else 0.0
    if file.exists() and not values.again:
        figures, about = report.read(file)
        _refuse_stale(values, out, about)
        print(f"{out}: already evaluated (--again measures again)")
        notes = about.get("notes", {})
    else:
        build, assistant, step = open_run(values.workdir)
        out.mkdir(parents=True, exist_ok=True)
        found = run.evaluate(assistant, values.records or build.pipeline.records, build.evaluation, out)
        figures, notes = found.figures, found.notes
        found.asked["step"] = step
        if "safety/threshold" in figures and not values.records:
            threshold_file(values.workdir).write_text(json.dumps({"threshold": figures["safety/threshold"].value}))
        figures |= _training(Path(values.workdir) / "summary.json")
        figures["time/evaluation_s"] = Figure.exact(time.time() - started)
        if values.times:
            figures["time/total_s"] = Figure.exact(seconds + time.time() - started)
        found.write()
    print(report.table(figures, notes))
    print(f"page: {out / 'index.html'}")
    write_json(values.json, json.loads(file.read_text()))


def _refuse_stale(values, out: Path, about: dict) -> None:
    """A report of another step, or of other records, is not what is asked for."""
    from g4v_jax.data import records
    from g4v_jax.train.manifest import steps

    newest, step = max(steps(Path(values.workdir) / "checkpoints"), default=None), about.get("asked", {}).get("step")
    if None not in (newest, step) and newest != step:
        raise UserError(f"{out}: its report is of step {step}, and the run is at {newest}; --again measures again")
    if values.records and about and about["data"] != records.summary(values.records)["source"]:
        raise UserError(f"{out}: its report is of other records than {values.records}; --again measures again")


def _compare(runs: list[str], json_file: str | None) -> None:
    from g4v_jax.evals import compare

    found = compare.compare([path / "samples.json" if path.is_dir() else path for path in map(Path, runs)])
    print(compare.table(found))
    write_json(json_file, json.loads(compare.as_json(found)))


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
    """Sum of the last column of a file of 'stage seconds' lines. Raises UserError where it is none."""
    try:
        return sum(float(line.split()[-1]) for line in path.read_text().splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not lines of a stage and its seconds ({error}); give another file for --times") from None
