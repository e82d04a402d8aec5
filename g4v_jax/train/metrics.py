"""What a run tells while it trains: log lines or a progress bar, metrics.jsonl, loss curves, and where time goes.

May hold the host's view of a run: values that have left the device, clocks, and how they are shown. Nothing here
makes the device wait: a step's metrics are fetched when the step is known to be over.
"""

import collections
import contextlib
import json
import math
import queue
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from g4v_jax.errors import UserError

IN_FLIGHT = 2  # steps dispatched and not over: enough to keep the device busy, few enough to stop soon


class Stopwatch:
    """How long steps take, and how much of the wall time lies outside them.

    A step is in flight from its call until its metrics are ready on the device; a thread waits for them in order and
    notes the time, so that the loop itself need not. **Outside** is the time in which no step is in flight, from the
    end of the first step (which compiles) to the end of the last. It is charged to what the host did meanwhile (see
    `phase`), and to `other` where that was none of them. Host work that overlaps a step costs the device nothing and
    is not counted, though on a CPU the two share cores and the step itself may take longer for it. A loop that holds
    the interpreter's lock for long delays the note of a step's end, and with it the start of what is counted.
    """

    def __init__(self):
        self.ended: list[float] = []  # seconds of time.perf_counter at which each step was over
        self._outside: dict[str, float] = collections.defaultdict(float)
        self._phases: list[tuple[str, float, float]] = []  # since the last call of a step
        self._slots = threading.Semaphore(IN_FLIGHT)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._error: Exception | None = None
        self._called: list[float] = []
        self._watcher = threading.Thread(target=self._watch, name="stopwatch", daemon=True)
        self._watcher.start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what the host does between two steps: data, log, checkpoint, ..."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases.append((name, start, time.perf_counter()))

    @contextlib.contextmanager
    def step(self) -> Iterator[list]:
        """Around the call of a step, to which the caller appends its metrics. Waits while too many are in flight."""
        self._slots.acquire()
        self._raise()
        self._called.append(time.perf_counter())
        outputs: list = []
        try:
            yield outputs
        finally:
            self._queue.put((outputs, self._phases))
            self._phases = []

    def wait(self) -> None:
        """Block until no step is in flight."""
        for _ in range(IN_FLIGHT):
            self._slots.acquire()
        self._slots.release(IN_FLIGHT)
        self._raise()

    def close(self) -> None:
        """End the thread, after the steps in flight."""
        self._queue.put(None)
        self._watcher.join()

    def report(self) -> dict:
        """{"seconds_per_step" (median), "outside_step" (share of wall time), "outside" (the share of each phase)}.

        None for the first two until two steps are over. Call `wait` first.
        """
        if len(self.ended) < 2:
            return {"seconds_per_step": None, "outside_step": None, "outside": {}}
        wall = self.ended[-1] - self.ended[0]
        shares = {name: seconds / wall for name, seconds in sorted(self._outside.items())}
        steps = [after - before for before, after in zip(self.ended, self.ended[1:])]
        return {"seconds_per_step": statistics.median(steps), "outside_step": sum(shares.values()), "outside": shares}

    def _watch(self) -> None:
        while (item := self._queue.get()) is not None:
            outputs, phases = item
            try:
                jax.block_until_ready(outputs)
            except Exception as error:  # a fault on the device: the loop raises it at its next turn
                self._error = error
            if self.ended:
                self._charge(self.ended[-1], self._called[len(self.ended)], phases)
            self.ended.append(time.perf_counter())
            self._slots.release()

    def _charge(self, idle: float, busy: float, phases: list) -> None:
        """Divide the time from `idle` to `busy`, if any, over the phases."""
        rest = max(0.0, busy - idle)
        for name, start, stop in phases:
            seconds = max(0.0, min(stop, busy) - max(start, idle))
            self._outside[name] += seconds
            rest -= seconds
        self._outside["other"] += max(0.0, rest)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class Logger:
    """The log of a run: one entry every `every` steps, on the terminal and in `WORKDIR/metrics.jsonl`.

    An entry covers all steps since the one before: its losses are means over those steps in which the term had
    something to learn from (an absent task's loss is exactly 0), its rates are counts over wall time. It is written
    once its steps are over, so up to two steps late. Only process 0 writes; all check for non-finite values.
    """

    def __init__(self, workdir: str | Path, total_steps: int, every: int, console: Console | None = None):
        """`console` is where lines or, on a terminal, the progress bar go. Raises UserError where `every` < 1."""
        if every < 1:
            raise UserError(f"log_every={every}: must be at least 1")
        self.workdir = Path(workdir)
        self.stopwatch = Stopwatch()
        self._total = total_steps
        self._every = every
        self._writes = jax.process_index() == 0
        self._pending: collections.deque = collections.deque()  # (step, metrics), not yet in an entry
        self._fetched = 0  # how many of the pending, from the left, are floats already
        self._entry_end: float | None = None  # when the last step of the last entry was over
        self._first: dict[str, float] = {}  # the first value of each loss
        self._start = 0  # the step that the stopwatch's first is counted from
        self._console = console or Console()
        self._bar: Progress | None = None
        self._file = self.workdir / "metrics.jsonl"
        self.workdir.mkdir(parents=True, exist_ok=True)

    def resume(self, step: int) -> None:
        """Go on after `step` (0: a new run): entries of later steps, which will be taken again, are dropped."""
        self._start = step
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        for entry in kept:
            for name, value in _losses(entry).items():
                self._first.setdefault(name, value)
        if self._writes and self._file.exists():
            partial = self._file.with_name("metrics.jsonl.partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            partial.replace(self._file)

    def push(self, step: int, metrics: dict) -> None:
        """Take a step's metrics, still on the device. Raises UserError where an older step's were not finite."""
        self._pending.append((step, metrics))
        over = step - IN_FLIGHT  # as the stopwatch lets no more be in flight, this step is over
        if over % self._every == 0 and over >= self._pending[0][0]:
            self._emit(over)
        self._move_bar(step)

    def check(self) -> None:
        """Wait for the steps in flight. Raises UserError where a loss or gradient of any is not finite, naming it."""
        self.stopwatch.wait()
        self._fetch(len(self._pending))

    def note(self, step: int, values: dict[str, float]) -> None:
        """Write values that belong to one step alone, such as an evaluation's."""
        if not self._writes:
            return
        self._append({"step": step, **values})
        self._print(f"step {step} | " + " | ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._writes:
            self._print(line)

    def flush(self) -> None:
        """Write what is left, be it less than an interval."""
        self.check()
        steps = [step for step, _ in self._pending]
        for step in steps:
            if step % self._every == 0 or step == steps[-1]:
                self._emit(step)

    def entries(self) -> list[dict]:
        """All of metrics.jsonl. A line that a killed run left half written is skipped."""
        found = []
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def padding(self) -> float | None:
        """Mean padding over the whole run, or None before the first entry."""
        entries = [entry for entry in self.entries() if "padding" in entry]
        steps = sum(entry["steps"] for entry in entries)
        return sum(entry["padding"] * entry["steps"] for entry in entries) / steps if steps else None

    def losses(self) -> dict[str, float]:
        """Each loss as last written."""
        latest = {}
        for entry in self.entries():
            latest |= _losses(entry)
        return latest

    def plot(self) -> None:
        """Write `WORKDIR/losses.png`: a panel for each loss that the run's data had, over steps."""
        from matplotlib.figure import Figure  # two seconds of every start, for one picture at the end

        entries = self.entries()
        names = sorted({name for entry in entries for name, value in _losses(entry).items() if value})
        if not (self._writes and names):
            return
        figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
            points = [(entry["step"], _losses(entry)[name]) for entry in entries if name in _losses(entry)]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
            axes.set(title=name, xlabel="step", ylabel="loss")
            axes.grid(alpha=0.3)
        figure.savefig(self.workdir / "losses.png", dpi=110)

    def close(self) -> None:
        """Take the bar off and end the stopwatch; does not write what is pending."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.stopwatch.close()

    def _fetch(self, count: int) -> None:
        """Turn the first `count` pending metrics into floats and check them."""
        todo = list(range(self._fetched, count))
        values = jax.device_get([self._pending[i][1] for i in todo])  # one call: the copies overlap
        for i, value in zip(todo, values):
            step, value = self._pending[i][0], {name: float(x) for name, x in value.items()}
            for name, x in value.items():
                if name.startswith(("loss/", "gradient/")) and not math.isfinite(x):
                    raise UserError(
                        f"step {step}: {name} is {x}; the last checkpoint is kept: lower the learning rate or look at "
                        f"the data of this step, then start again from it"
                    )
            self._pending[i] = (step, value)
        self._fetched = max(self._fetched, count)

    def _emit(self, last: int) -> None:
        """Write the entry of all pending steps up to `last`, which are over."""
        self._fetch(sum(step <= last for step, _ in self._pending))
        rows = []
        while self._pending and self._pending[0][0] <= last:
            rows.append(self._pending.popleft()[1])
            self._fetched -= 1
        ended, steps = self.stopwatch.ended, len(rows)
        end = ended[last - self._start - 1]
        if self._entry_end is None:  # leave out the first step, which compiles, unless it is all there is
            self._entry_end, timed = ended[0], rows[1:]
        else:
            timed = rows
        entry = {"step": last, "steps": steps, "time": time.time(), **_means(rows)}
        entry["padding"] = entry.pop("work/padding", 0.0)
        for name in [name for name in entry if name.startswith("work/")]:
            del entry[name]
        if timed and end > self._entry_end:
            seconds = end - self._entry_end
            entry["seconds_per_step"] = seconds / len(timed)
            for name in ("tokens", "clips"):
                entry[f"{name}_per_second"] = sum(row.get(f"work/{name}", 0.0) for row in timed) / seconds
        self._entry_end = end
        for name, value in _losses(entry).items():
            self._first.setdefault(name, value)
        if self._writes:
            self._append(entry)
            self._show(entry)

    def _append(self, entry: dict) -> None:
        try:
            with open(self._file, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._file} ({error.strerror}): make room, then start again") from error

    def _show(self, entry: dict) -> None:
        parts = [f"{name} {value:.4g}{self._change(name, value)}" for name, value in _losses(entry).items()]
        left = ""
        if "seconds_per_step" in entry:
            parts.append(f"{entry['seconds_per_step']:.3g} s/step")
            parts += [f"{_short(entry[f'{name}_per_second'])} {name}/s" for name in ("tokens", "clips")]
            left = f"{_clock(entry['seconds_per_step'] * (self._total - entry['step']))} left"
        parts.append(f"padding {entry['padding']:.1%}")
        if left:
            parts.append(left)
        text = " | ".join(parts)
        if not self._console.is_terminal:
            step, total = entry["step"], self._total
            self._print(f"step {step}/{total} {step / total:.0%} | {text}")
            return
        self._move_bar(entry["step"], text)

    def _move_bar(self, step: int, text: str | None = None) -> None:
        """On a terminal, move the bar to a step; it starts at the first."""
        if not (self._writes and self._console.is_terminal):
            return
        if self._bar is None:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._bar.add_task("compiled, first losses soon", total=self._total)
            self._bar.start()
        self._bar.update(0, completed=step, **({} if text is None else {"description": text}))

    def _change(self, name: str, value: float) -> str:
        """How far a loss has come since its first entry, as ` (-45%)`."""
        first = self._first[name]
        return f" ({value / first - 1:+.0%})" if first and value != first else ""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _losses(entry: dict) -> dict[str, float]:
    return {name.removeprefix("loss/"): value for name, value in entry.items() if name.startswith("loss/")}


def _means(rows: list[dict]) -> dict[str, float]:
    """Mean of each metric over the steps that have it; of a loss, over the steps where it is not exactly 0."""
    columns = collections.defaultdict(list)
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    means = {}
    for name, values in columns.items():
        present = [value for value in values if value or not name.startswith("loss/")]
        means[name] = statistics.fmean(present) if present else 0.0
    return means


def _short(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
