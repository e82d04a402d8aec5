"""Two sides of a comparison as processes that take turns, so that a slow hour of the machine meets both.

May hold the processes and what is made of their times; what a side runs is told by `worker`.
"""

import json
import statistics
import subprocess
import sys
import tempfile

from g4v_jax.errors import UserError
from g4v_jax.heap import without_huge_pages


class Side:
    """One side: a process that is ready once constructed, and works only when asked. Use as a context."""

    def __init__(self, about: dict):
        """`about`: see `worker.main`. Raises UserError with the process's last line where it could not start."""
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "g4v_jax.bench.worker", json.dumps(about)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=None if about["side"] == "ours" else without_huge_pages(),
        )  # fmt: skip
        self.about = self._answer()

    def turn(self, times: int) -> dict:
        """{"seconds": of each of so many steps, "peak": bytes of memory that the process has held at most since it was ready}."""
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()  # which ends it
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or [f"it ended with status {self._process.returncode}"]
        raise UserError(lines[-1].removeprefix("g4v: error: "))


def compare(ours: dict, theirs: dict, pairs: int, steps: int, say=print) -> dict:
    """Let both sides take `pairs` turns of `steps` steps each, one after the other, ours first in every other pair.

    -> {"ours", "theirs": {"seconds": median of each turn, "peak": bytes}, "ratio": {"median", "least", "most"} of their
    seconds to ours of a pair, above 1 where ours is the faster; "memory": our peak to theirs}.
    """
    with Side(ours) as a, Side(theirs) as b:
        for name, count in a.about.items():
            if count != b.about[name]:
                raise UserError(f"the two sides differ: {count:,} and {b.about[name]:,} {name}")
        medians, peaks = {a: [], b: []}, {}
        for pair in range(pairs):
            for side in (a, b) if pair % 2 == 0 else (b, a):
                told = side.turn(steps)
                medians[side].append(statistics.median(told["seconds"]))
                peaks[side] = told["peak"]
            say(f"  pair {pair + 1} of {pairs}: ours {medians[a][-1]:.3f} s, theirs {medians[b][-1]:.3f} s")
    return {
        "ours": {"seconds": medians[a], "peak": peaks[a]},
        "theirs": {"seconds": medians[b], "peak": peaks[b]},
        "ratio": spread([theirs / ours for ours, theirs in zip(medians[a], medians[b])]),
        "memory": peaks[a] / peaks[b],
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Of ratios that were measured one pair at a time."""
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
