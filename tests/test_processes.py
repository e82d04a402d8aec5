"""Several processes as one run, each a Python of its own with gloo between them: the losses of one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from folder import make
from network import free_address

from g4v_jax.data import records

ROOT = Path(__file__).parent.parent
DEVICES = 4
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import tiny

def get_config(stage):
    config = tiny.config(
        rows__rows=4, rows__tokens=192, data__mixture=dict(caption=0.4, generate=0.3, refuse_clip=0.3),
        train__steps=4,
    )
    config.data.records, config.data.threads, config.data.shards = {records!r}, 2, 4
    config.train.update(log_every=1, checkpoint_every=2)
    if stage == "autoencoder":
        config.objective, config.losses, config.ema, config.trainable = "reconstruction", {{}}, (), ("autoencoder/.*",)
        config.data.mixture, config.rows.tokens = dict(pixels=1.0), 4
        config.train.update(steps=1, checkpoint_every=1)
    else:
        config.init = dict(autoencoder={autoencoder!r})
        config.train.eval_every = 2
        config.sample, config.evaluate = dict(max_tokens=4, rows=4, steps=2), dict(live=2)
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("processes")
    records.build(make(folder / "source"), folder / "records")
    tiny.tokenizer().save(folder / "records/tokenizer.json")
    file = folder / "config.py"
    autoencoder = folder / "autoencoder"
    file.write_text(CONFIG.format(tests=str(ROOT / "tests"), records=str(folder / "records"), autoencoder=str(autoencoder)))
    train(f"{file}:autoencoder", autoencoder)
    return f"{file}:model"


def start(config: str, workdir: Path, *arguments: str, devices: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "g4v_jax", "train", f"--config={config}", f"--workdir={workdir}", *arguments]
    # programs that run four times need not be fast
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    return subprocess.Popen(
        command, cwd=ROOT, env=kept | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], status: int = 0) -> str:
    """What they said, once all ended with `status`."""
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=300)[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(said)
    return "".join(said)


def train(config: str, workdir: Path, *arguments: str, processes: int = 1) -> tuple[list[dict], str]:
    """Run `g4v train` in so many processes -> (lines of its metrics, what they printed)."""
    said = finish(start_all(config, workdir, *arguments, processes=processes))
    return metrics(workdir), said


def start_all(config: str, workdir: Path, *arguments: str, processes: int) -> list[subprocess.Popen]:
    if processes == 1:
        return [start(config, workdir, *arguments, devices=DEVICES)]
    together = (*arguments, f"--coordinator={free_address()}", f"--processes={processes}")
    return [start(config, workdir, *together, f"--process={i}", devices=DEVICES // processes) for i in range(processes)]


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def is_free(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> list[dict]:
    return train(config, tmp_path_factory.mktemp("alone") / "run")[0]


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    """Equal losses, gradients and evaluations; not times."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for one, other in zip(found, wanted):
        names = [name for name in other if name.startswith(("loss", "gradient", "live/", "padding"))]
        assert names
        for name in names:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=1e-6, err_msg=f"{name} of {other['step']}")


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_and_evaluations_are_those_of_one_process(processes, config, alone, tmp_path):
    found, said = train(config, tmp_path / "run", processes=processes)
    assert_same(found, alone)
    assert any(name.startswith("live/") for row in alone for name in row)
    assert said.count("step 1/4") == 1  # one of them speaks
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4


def test_processes_that_slurm_started_find_each_other(config, alone, tmp_path):
    job = next(job for job in range(1, 4096) if is_free(job + 61440))  # JAX takes the port from the job's number
    slurm = dict(SLURM_JOB_ID=str(job), SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2")
    started = [
        start(
            config, tmp_path / "run", "--coordinator=auto", devices=DEVICES // 2,
            SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **slurm,
        )
        for i in range(2)
    ]  # fmt: skip
    finish(started)
    assert_same(metrics(tmp_path / "run"), alone)


def test_a_run_goes_on_in_another_number_of_processes(config, alone, tmp_path):
    train(config, tmp_path / "run", "--stop_after=2", processes=2)
    found, said = train(config, tmp_path / "run")
    assert "resumed from step 2" in said and "differ from the saved ones" not in said
    assert_same(found, alone)


def test_a_signal_to_one_process_ends_all_after_the_same_step(config, tmp_path):
    run = tmp_path / "run"
    endless = ("--config.train.steps=100000", "--config.train.eval_every=0")
    started = start_all(config, run, *endless, processes=2)
    try:
        for _ in range(1200):
            if (run / "metrics.jsonl").exists() or any(process.poll() is not None for process in started):
                break
            time.sleep(0.1)
        started[1].terminate()
    finally:
        said = finish(started, status=128 + signal.SIGTERM)
    (last,) = re.findall(r"SIGTERM: saved step (\d+)", said)
    assert (run / f"checkpoints/{last}").exists() and not (run / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("--processes=2",), {}, "need --coordinator"),
        (("--coordinator=localhost", "--processes=2", "--process=0"), {}, "--coordinator=localhost: expected"),
        (("--coordinator=127.0.0.1:1", "--processes=2", "--process=2"), {}, "of 2 processes the last is 1"),
        (("--coordinator=auto", "--processes=2"), {}, "finds the processes by itself"),
        (("--coordinator=auto",), {}, "did not find each other"),
        ((), {"SLURM_STEP_NUM_TASKS": "2"}, "2 processes were started"),
    ],
)
def test_mistakes_are_one_line(arguments, environment, words, config, tmp_path):
    said = finish([start(config, tmp_path / "run", *arguments, devices=1, **environment)], status=2)
    assert words in said and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "run").exists()
