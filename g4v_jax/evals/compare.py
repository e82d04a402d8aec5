"""Runs beside each other on the same samples: differences with their intervals, and which of them are more than chance.

May hold the file of per-sample scores (`samples.json`), the paired tests, and the table of a comparison.

    {"split": "test", "fingerprint": "...", "scores": {figure: {sample id: score}},
     optionally "clips": {sample id: clip}, "counts": {part: how many samples it was to be measured on}}

The fingerprint tells data sets apart. Samples of one clip, such as questions about it, are no samples of their own:
where "clips" says which belong together, they are resampled and flipped together. Of another number of samples each is
asked for in another phrasing: figures of a part (their name's first word) whose counts differ are not compared.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure

FLIPS = 10_000  # sign flips of a test, or all of them where there are no more than these
SEED = 0
_BLOCK = 2**22  # signs drawn at once
_LIMIT = 1e100  # of a score's size


@dataclass(frozen=True)
class Row:
    """One figure of a run beside that of the first run."""

    figure: str
    a: str  # the first run
    b: str
    a_value: float  # means over the samples that both have
    b_value: float
    difference: Figure  # b - a, with its paired bootstrap interval; n counts shared samples
    p: float  # two-sided
    p_holm: float  # corrected for all rows of the comparison
    left_out: int  # samples that only one of the two has


@dataclass(frozen=True)
class Comparison:
    """Rows, and the figures that could not be compared: name -> the runs that have it, or those that count otherwise."""

    split: str
    fingerprint: str
    rows: list[Row]
    alone: dict[str, list[str]]
    unlike: dict[str, list[str]]


@dataclass(frozen=True)
class _Run:
    name: str
    split: str
    fingerprint: str
    scores: dict[str, dict[str, float]] = field(repr=False)
    clips: dict[str, str] = field(repr=False)
    counts: dict[str, str] = field(repr=False)


def write_samples(
    path: str | Path,
    split: str,
    fingerprint: str,
    scores: Mapping[str, Mapping[str, float]],
    clips: Mapping[str, str] | None = None,
    counts: Mapping[str, str] | None = None,
) -> None:
    """Write the per-sample scores of a run, whole or not at all."""
    path = Path(path)
    scores = {figure: {key: float(value) for key, value in each.items()} for figure, each in scores.items()}
    row = {"split": split, "fingerprint": fingerprint, "scores": scores} | ({"clips": dict(clips)} if clips else {})
    row |= {"counts": dict(counts)} if counts else {}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(row))
    temporary.rename(path)


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Compare the first run's samples with each other run's, figure by figure, on the samples that both have.

    Intervals are paired bootstrap's; p-values come from flipping signs of the paired differences (`sign_flip`), and are
    corrected by Holm's method (1979) for all rows. Runs are named by their paths.

    Raises UserError for fewer than two runs or one given twice, a file that cannot be read or is malformed, runs of
    another split or fingerprint, no figure in common that can be compared, and a figure without a sample in common.
    """
    names = [str(path) for path in paths]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"compare: give two different files of samples or more, not {', '.join(names) or 'none'}")
    runs = [_read(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        for what in ("split", "fingerprint"):
            mine, theirs = getattr(run, what), getattr(first, what)
            if mine != theirs:
                raise UserError(
                    f"{run.name}: {what} {mine!r} is not {theirs!r} of {first.name}; evaluate both on the same samples"
                )
    holders = {figure: [run for run in runs if figure in run.scores] for run in runs for figure in run.scores}
    shared = sorted(figure for figure in first.scores if len(holders[figure]) > 1)
    if not shared:
        raise UserError(f"compare: {first.name} shares no figure with the others; evaluate the same things")
    pairs = [(figure, run) for figure in shared for run in holders[figure] if run is not first]
    unlike: dict[str, list[str]] = {}
    for figure, run in pairs:
        if run.counts.get(part := figure.partition("/")[0]) != first.counts.get(part):
            unlike.setdefault(figure, []).append(run.name)
    rows = [_row(figure, first, run) for figure, run in pairs if run.name not in unlike.get(figure, ())]
    if not rows:
        raise UserError(f"compare: {', '.join(unlike)} were measured on other numbers of samples; evaluate both alike")
    corrected = holm([row.p for row in rows])
    alone = {k: [run.name for run in some] for k, some in sorted(holders.items()) if len(some) < len(runs)}
    rows = [replace(row, p_holm=p) for row, p in zip(rows, corrected)]
    return Comparison(first.split, first.fingerprint, rows, alone, unlike)


def sign_flip(sums: Sequence[float], flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p-value of a sum of paired differences by clip, [n], against random signs (Fisher's paired test).

    Where 2^n is no more than `flips`, all signs are tried and p is exact; else p is (1 + k) / (1 + flips) for the k
    draws that are as far from 0, so that it is never too small (Phipson & Smyth 2010). 1 where nothing differs.
    """
    sums = np.asarray(sums, np.float64)
    sums = sums[sums != 0]  # their sign is nothing
    n, slack = len(sums), 1e-9 * np.abs(sums).sum()  # sums in another order are as far
    if n == 0:
        return 1.0
    far = abs(sums.sum()) - slack
    if 2**n <= flips:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float(np.mean(np.abs(signs @ sums) >= far))
    rng, hits, step = np.random.default_rng(seed), 0, max(1, _BLOCK // n)
    for start in range(0, flips, step):
        signs = rng.integers(0, 2, (min(step, flips - start), n), np.int8) * 2.0 - 1
        hits += int(np.sum(np.abs(signs @ sums) >= far))
    return (1 + hits) / (1 + flips)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values (1979): the chance of any false finding among them stays below p."""
    corrected, last = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable")):
        last = min(1.0, max(last, (len(values) - rank) * values[place]))
        corrected[place] = last
    return corrected


def table(found: Comparison) -> str:
    """A comparison as aligned text."""
    width = max([len("figure"), *(len(row.figure) for row in found.rows)])
    lines = [f"split {found.split}, data {found.fingerprint}", f"A: {found.rows[0].a}"]
    for number, run in enumerate(dict.fromkeys(row.b for row in found.rows)):
        lines += ["", f"B: {run}"] if number else [f"B: {run}"]
        lines.append(f"{'figure':{width}}        A        B      B - A   95 % interval            p   p (Holm)      n")
        for row in (row for row in found.rows if row.b == run):
            d = row.difference
            lines.append(
                f"{row.figure:{width}} {row.a_value:8.4f} {row.b_value:8.4f}   {d.value:+8.4f}  "
                f"{d.low:+8.4f} – {d.high:+8.4f} {row.p:8.4f}   {row.p_holm:8.4f}  {d.n:5d}"
                + (f"  ({row.left_out} samples of one run alone left out)" if row.left_out else "")
            )
    lines += [f"not compared: {figure}, which only {', '.join(some)} has" for figure, some in found.alone.items()]
    lines += [f"not compared: {figure}, of which {', '.join(some)} has another number of samples" for figure, some in found.unlike.items()]
    return "\n".join(lines)


def as_json(found: Comparison) -> str:
    """A comparison as JSON: the fields of Comparison, Row and Figure, and how the tests were made."""
    return json.dumps(asdict(found) | {"flips": FLIPS, "seed": SEED, "correction": "Holm over all rows"}, indent=1)


def _row(figure: str, first: _Run, run: _Run) -> Row:
    """A row that is not corrected yet."""
    a, b = first.scores[figure], run.scores[figure]
    ids = sorted(a.keys() & b.keys())
    if not ids:
        raise UserError(f"{run.name}: {figure!r} has no sample in common with {first.name}; evaluate the same samples")
    for one in ids:
        if first.clips.get(one) != run.clips.get(one):
            raise UserError(f"{run.name}: {one!r} is of another clip than in {first.name}; evaluate the same data")
    difference = np.array([b[one] - a[one] for one in ids])
    places: dict[tuple, int] = {}
    rows = [places.setdefault(("clip", first.clips[i]) if i in first.clips else ("", i), len(places)) for i in ids]
    sums, counts = np.bincount(rows, difference), np.bincount(rows)
    spread = Figure.bootstrap(lambda chosen: float(sums[chosen].sum() / counts[chosen].sum()), len(sums))
    means = [float(np.mean([scores[one] for one in ids])) for scores in (a, b)]
    left_out = len(a.keys() ^ b.keys())
    return Row(figure, first.name, run.name, *means, replace(spread, n=len(ids)), sign_flip(sums), math.nan, left_out)


def _read(path: str | Path) -> _Run:
    try:
        row = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a file of samples ({error}); give the samples.json of an evaluation") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("split", "fingerprint")):
        raise UserError(f"{path}: not a file of samples, without 'split' and 'fingerprint'; give an evaluation's")
    scores, clips, counts = row.get("scores"), row.get("clips", {}), row.get("counts", {})
    if not isinstance(scores, dict) or not scores:
        raise UserError(f"{path}: 'scores' must be an object of figures that is not empty; evaluate the run again")
    if not isinstance(clips, dict) or not all(isinstance(clip, str) for clip in clips.values()):
        raise UserError(f"{path}: 'clips' must name a clip for each sample id; evaluate the run again")
    if not isinstance(counts, dict):
        raise UserError(f"{path}: 'counts' must be an object; evaluate the run again")
    for figure, each in scores.items():
        if not isinstance(each, dict) or not each:
            raise UserError(f"{path}: {figure!r} must be an object of sample ids that is not empty; evaluate it again")
        for one, value in each.items():
            if type(value) not in (int, float) or not abs(value) < _LIMIT:  # NaN is not less
                raise UserError(f"{path}: {figure!r} of {one!r} is {value!r}, not a finite number; evaluate it again")
    return _Run(str(path), row["split"], row["fingerprint"], scores, clips, counts)
