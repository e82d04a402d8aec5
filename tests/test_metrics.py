"""The log: what an entry says, when it is written, and where wall time is charged."""

import io
import json
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from g4v_jax.errors import UserError
from g4v_jax.train.metrics import IN_FLIGHT, Logger, Stopwatch


class Slow:
    """An output of a device that needs a moment."""

    def __init__(self, seconds: float):
        self._ready = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self._ready - time.perf_counter()))


def metrics(value=2.0, **others):
    base = {
        "loss/captioning": value,
        "gradient/llm": 1.0,
        "work/tokens": 100.0,
        "work/padding": 0.25,
        "work/clips": 3.0,
    }
    return {name: jnp.float32(x) for name, x in (base | others).items()}


def take(logger, step, values):
    with logger.stopwatch.step() as outputs:
        outputs.append(values)
    logger.push(step, values)


@pytest.fixture
def logger(tmp_path):
    logger = Logger(tmp_path, total_steps=40, every=2, console=Console(file=io.StringIO(), width=400))
    yield logger
    logger.close()


def test_an_entry_is_a_mean_over_its_steps_and_written_when_they_are_over(logger):
    for step in range(1, 6):
        assert len(logger.entries()) == (step > 2 + IN_FLIGHT)
        take(logger, step, metrics(step, **{"loss/safety": 0.0 if step % 2 else 6.0}))
    entry = logger.entries()[0]
    assert (entry["step"], entry["steps"], entry["loss/captioning"]) == (2, 2, 1.5)
    assert entry["loss/safety"] == 6.0  # the step without the task does not pull the mean down
    assert entry["padding"] == 0.25
    # the first step, which compiles, is in no rate
    assert entry["tokens_per_second"] * entry["seconds_per_step"] == pytest.approx(100)
    logger.flush()
    assert [entry["steps"] for entry in logger.entries()] == [2, 2, 1]
    assert logger.losses()["captioning"] == 5
    line = logger._console.file.getvalue().splitlines()[1]
    assert line.startswith("step 4/40 10% | captioning 3.5 (+133%) | safety 6 | ")
    for part in ("s/step", "tokens/s", "clips/s", "padding 25.0%", "left"):
        assert part in line


@pytest.mark.parametrize("name", ["loss/captioning", "gradient/llm"])
def test_not_finite_names_step_and_term(logger, name):
    with pytest.raises(UserError, match=f"step 3: {name} is nan"):
        for step in range(1, 9):
            take(logger, step, metrics(**({name: float("nan")} if step >= 3 else {})))


def test_check_looks_before_the_interval(logger):
    take(logger, 1, metrics(float("inf")))
    with pytest.raises(UserError, match="step 1: loss/captioning is inf"):
        logger.check()


def test_resume_drops_later_entries_and_torn_lines(logger):
    logger._file.write_text(
        '{"step": 2, "loss/captioning": 8.0, "steps": 2, "padding": 0.5}\n{"step": 4}\n{"step": 6, "lo'
    )
    logger.resume(2)
    assert logger._file.read_text().count("\n") == 1
    for step in (3, 4):
        take(logger, step, metrics(4.0))
    logger.flush()
    assert [entry["step"] for entry in logger.entries()] == [2, 4]
    assert "captioning 4 (-50%)" in logger._console.file.getvalue()
    assert logger.padding() == 0.375


def test_a_terminal_gets_a_bar(tmp_path):
    screen = io.StringIO()
    logger = Logger(tmp_path, 4, 1, console=Console(file=screen, force_terminal=True, width=200))
    for step in range(1, 5):
        take(logger, step, metrics())
    logger.flush()
    logger.close()
    assert "4/4" in screen.getvalue() and "captioning 2" in screen.getvalue() and "tokens/s" in screen.getvalue()


def test_plot_and_note(logger, tmp_path):
    for step in (1, 2, 3):
        take(logger, step, metrics(4.0 / step, **{"loss/safety": 1.0, "loss/preference": 0.0}))
    logger.note(3, {"eval/cider": 0.5})
    logger.flush()
    logger.plot()
    picture = (tmp_path / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20]) == 2 * 495  # its width: no panel for what the data never had
    assert {"step": 3, "eval/cider": 0.5} in [json.loads(line) for line in logger._file.read_text().splitlines()]


def test_interval_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="log_every=0"):
        Logger(tmp_path, 4, 0)


def test_only_idle_time_is_outside():
    watch = Stopwatch()
    with watch.step() as outputs:
        outputs.append(Slow(0.01))
    watch.wait()
    with watch.step() as outputs:
        outputs.append(Slow(0.3))
    with watch.phase("data"):
        time.sleep(0.1)  # while the step is in flight: costs nothing
    watch.wait()
    with watch.phase("checkpoint"):
        time.sleep(0.2)  # nothing is in flight
    with watch.step() as outputs:
        outputs.append(Slow(0.3))
    watch.wait()
    watch.close()
    report = watch.report()
    assert report["outside"]["data"] < 0.02
    assert report["outside"]["checkpoint"] == pytest.approx(0.2 / 0.8, abs=0.1)
    assert report["outside_step"] == pytest.approx(sum(report["outside"].values()))
    assert report["seconds_per_step"] > 0.25


def test_at_most_two_steps_are_in_flight():
    watch, start = Stopwatch(), time.perf_counter()
    for _ in range(IN_FLIGHT + 1):
        with watch.step() as outputs:
            outputs.append(Slow(0.15))
    assert time.perf_counter() - start > 0.14
    watch.wait()
    watch.close()
    assert len(watch.ended) == IN_FLIGHT + 1


def test_a_fault_of_the_device_reaches_the_loop():
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("device lost")

    watch = Stopwatch()
    with watch.step() as outputs:
        outputs.append(Broken())
    with pytest.raises(RuntimeError, match="device lost"):
        watch.wait()
    watch.close()
