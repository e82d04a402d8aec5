"""What an evaluation found, as it grows: figures, per-sample scores, picture sheets and talks; and its files.

    report.json    figure -> {"value", "low", "high", "n", "split"}
    samples.json   per-sample scores, by which runs are compared (`compare.py`)
    index.html     a page with the pictures

May hold the keeping and writing of what was measured, and nothing of how.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from g4v_jax.evals import compare, pictures
from g4v_jax.evals.figures import Figure

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
    asked: dict = dataclasses.field(default_factory=dict)  # what was asked and decided, by part
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
        write(self.out / "report.json", self.figures, self.split)
        if self.scores:
            compare.write_samples(self.out / "samples.json", self.split, self.data, self.scores, self.clips)
        rows = {name: row | {"beside": BESIDE.get(name, "")} for name, row in as_rows(self.figures).items()}
        about = f"Split {self.split}, data {self.data[:12]}. {json.dumps(self.asked)}"
        title = f"Evaluation of {self.out}"
        pictures.page(self.out / "index.html", title, about, rows, self.sheets, self.talks)


def write(path: Path, figures: dict[str, Figure], split: str) -> None:
    """Figures as flat JSON, whole or not at all."""
    rows = {name: row | {"split": split} for name, row in as_rows(figures).items()}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.rename(path)


def as_rows(figures: dict[str, Figure]) -> dict[str, dict]:
    """Figures by name as JSON has them."""
    return {name: dataclasses.asdict(figure) for name, figure in sorted(figures.items())}


def read(path: Path) -> dict[str, Figure]:
    """The figures of a written report."""
    fields = [field.name for field in dataclasses.fields(Figure)]
    return {name: Figure(*map(row.get, fields)) for name, row in json.loads(path.read_text()).items()}


def table(figures: dict[str, Figure]) -> str:
    """Figures as aligned text."""
    width = max(map(len, figures))
    head = f"{'figure':{width}}   value   95 % interval        n"
    lines = [f"{k:{width}} {f.value:7.3f}  {f.low:7.3f} – {f.high:7.3f}  {f.n:5d}" for k, f in sorted(figures.items())]
    return "\n".join([head, *lines])
