"""The parity report of a conversion: where each tensor went, what was left and why, a fingerprint, and compared outputs.

May hold the report's data and its two forms, report.json and report.txt.
"""

import dataclasses
import json
import math
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Row:
    """One foreign tensor and its place among ours (None: carried along, or filled in by export)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: str | None
    layer: int | None


@dataclasses.dataclass
class Report:
    """`left`: foreign name -> why. `compared`: what `parity.compare` found, or {"skipped": why}."""

    direction: str  # "import" or "export"
    source: str
    family: str
    rows: list[Row]
    left: dict[str, str]
    fingerprint: str
    compared: dict = dataclasses.field(default_factory=lambda: {"skipped": "not asked for"})

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every foreign tensor; one that holds several of our leaves has as many rows."""
        return {row.name: row.shape for row in self.rows}

    def summary(self) -> str:
        """One line."""
        compared = self.compared
        if "skipped" in compared:
            outputs = f"outputs not compared: {compared['skipped']}"
        else:
            outputs = f"outputs within {compared['relative_error']:.1e} of {compared['reference']}"
        return (
            f"{self.direction} {self.family}: {len(self.tensors)} tensors, {self.parameters:,} parameters, "
            f"{len(self.left)} left; {outputs}; fingerprint {self.fingerprint[:16]}"
        )

    def write(self, folder: Path) -> None:
        """report.json and report.txt into a folder."""
        (folder / "report.json").write_text(json.dumps(dataclasses.asdict(self), indent=1))
        width = max((len(row.name) for row in self.rows), default=0)
        arrow = "<-" if self.direction == "export" else "->"
        lines = [self.summary(), ""]
        for row in self.rows:
            place = "filled in or carried along" if row.path is None else row.path
            layer = "" if row.layer is None else f"[{row.layer}]"
            lines.append(f"{row.name:{width}} {row.dtype:9} {str(list(row.shape)):22} {arrow} {place}{layer}")
        lines += [f"{name:{width}} left: {why}" for name, why in sorted(self.left.items())]
        (folder / "report.txt").write_text("\n".join(lines) + "\n")

    def figures(self) -> dict:
        """What --json writes: everything but the single rows."""
        return {
            "direction": self.direction,
            "source": self.source,
            "family": self.family,
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "left": self.left,
            "fingerprint": self.fingerprint,
            "compared": self.compared,
        }
