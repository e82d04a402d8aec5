"""What an evaluation found, as it grows: figures, per-sample scores, picture sheets and talks; and its files.

    report.json    figure -> {"value", "low", "high", "n", "split"}; and "about": what was asked of which model, and
                   what is not measured and why
    samples.json   per-sample scores, by which runs are compared (`compare.py`)
    index.html     a page with the pictures

May hold the keeping and writing of what was measured, and nothing of how.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from g4v_jax.errors import UserError
from g4v_jax.evals import compare, pictures
from g4v_jax.evals.figures import Figure

ABOUT = "about"  # a name that no figure has
BESIDE = {"safety/f1": "GPT4Video (2023) reports over 0.80 on its own set"}  # what the page says beside a figure


@dataclasses.dataclass
class Report:
    """A report on one split of a data set, `data` its fingerprint, into the folder `out`."""

    out: Path
    split: str
    data: str
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    scores: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # figure -> sample id -> score
    clips: dict[str, str] = dataclasses.field(default_factory=dict)  # sample id -> clip, where one has several samples
    counts: dict[str, str] = dataclasses.field(default_factory=dict)  # part -> on how many samples, which says on which
    asked: dict = dataclasses.field(default_factory=dict)  # what was asked of which model, by part
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # figure -> why it is not measured, or what it lacks
    sheets: dict[str, str] = dataclasses.field(default_factory=dict)  # title -> file
    talks: list[tuple] = dataclasses.field(default_factory=list)  # (request, reply, verdict)

    def score(self, judged: Sequence) -> None:
        """Keep the scores of judged samples: each has a `record` and `scores` by figure."""
        for one in judged:
            for figure, score in one.scores.items():
                self.scores.setdefault(figure, {})[one.record.id] = score

    def show(self, name: str, title: str, strips: Sequence) -> None:
        """Write a sheet of strips as `name`.png; nothing where there are none."""
        if strips:
            pictures.sheet(strips, self.out / f"{name}.png")
            self.sheets[title] = f"{name}.png"

    def write(self) -> None:
        """All three files."""
        about = {"split": self.split, "data": self.data, "asked": self.asked, "notes": self.notes}
        write(self.out / "report.json", self.figures, self.split, about)
        if self.scores:
            compare.write_samples(self.out / "samples.json", self.split, self.data, self.scores, self.clips, self.counts)
        rows = {name: row | {"beside": BESIDE.get(name, "")} for name, row in as_rows(self.figures).items()}
        words = f"Split {self.split}, data {self.data[:12]}. {json.dumps(self.asked)}"
        title = f"Evaluation of {self.out}"
        pictures.page(self.out / "index.html", title, words, rows, self.notes, self.sheets, self.talks)


def write(path: Path, figures: dict[str, Figure], split: str, about: dict) -> None:
    """Figures as JSON, each with the split that it is of, and what is to be known about them; whole or not at all."""
    rows = {name: row | {"split": _split(name, split)} for name, row in as_rows(figures).items()} | {ABOUT: about}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.rename(path)


def as_rows(figures: dict[str, Figure]) -> dict[str, dict]:
    """Figures by name as JSON has them."""
    return {name: dataclasses.asdict(figure) for name, figure in sorted(figures.items())}


def _split(name: str, measured: str) -> str:
    """Which split a figure is of: the threshold is chosen before, and some tell of the training or of no data at all."""
    if name == "safety/threshold":
        return "validation"
    return {"data": "train", "train": "train", "time": ""}.get(name.partition("/")[0], measured)


def read(path: Path) -> tuple[dict[str, Figure], dict]:
    """The figures of a written report, and what is to be known about them ({} where an older program wrote it).

    Raises UserError where it is no report.
    """
    fields = [field.name for field in dataclasses.fields(Figure)]
    try:
        rows = json.loads(path.read_text())
        about = rows.pop(ABOUT, {})
        return {name: Figure(*(row[field] for field in fields)) for name, row in rows.items()}, about
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a report ({type(error).__name__}); --again measures again") from None


def table(figures: dict[str, Figure], notes: dict[str, str] | None = None) -> str:
    """Figures as aligned text, and what is not among them, with the reason."""
    width = max(map(len, figures))
    head = f"{'figure':{width}}   value   95 % interval        n"
    lines = [f"{k:{width}} {f.value:7.3f}  {f.low:7.3f} – {f.high:7.3f}  {f.n:5d}" for k, f in sorted(figures.items())]
    return "\n".join([head, *lines, *(f"{name}: {why}" for name, why in (notes or {}).items())])
