"""Several processes as one run: how they find each other, and what they tell each other beside the step's collectives.

May hold the joining of `jax.distributed`, and values that are gathered between steps. What the processes do together in
a step is the mesh's business (`sharding.py`).
"""

import functools
import json
import logging
import os

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from g4v_jax.errors import UserError

STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many a launcher started
SPELLING = "--coordinator=auto, or --coordinator=HOST:PORT --processes=N --process=I"


def define_flags(values: flags.FlagValues) -> None:
    """The flags that `join` reads."""
    flags.DEFINE_string(
        "coordinator", None, "Where process 0 listens, HOST:PORT, the same in every process; auto: as Slurm, Open MPI, "
        "Kubernetes or a TPU pod tell.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("processes", None, "How many processes run this command.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0, flag_values=values)


def join(values: flags.FlagValues, timeout_s: int = 300) -> None:
    """Join the other processes of this run, before anything asks JAX for a device; one process does nothing.

    Waits up to `timeout_s` for the others. Raises UserError where the flags do not belong together, where nothing tells
    who the others are, and where a launcher started several processes that were not told to join.
    """
    where, count, index = values.coordinator, values.processes, values.process
    if where is None:
        if count is not None or index is not None:
            raise UserError(f"--processes and --process need --coordinator: {SPELLING}")
        for name in STARTED:
            if os.environ.get(name, "1") not in ("", "1"):
                raise UserError(f"{os.environ[name]} processes were started ({name}), each would train alone: {SPELLING}")
        return
    if where == "auto":
        if count is not None or index is not None:
            raise UserError(f"--coordinator=auto finds the processes by itself: {SPELLING}")
        given = {}
    else:
        host, _, port = where.rpartition(":")
        if not host or not port.isdecimal() or count is None or index is None:
            raise UserError(f"--coordinator={where}: expected {SPELLING}")
        if index >= count:
            raise UserError(f"--process={index}: of {count} processes the last is {count - 1}")
        if count == 1:
            return
        given = dict(coordinator_address=where, num_processes=count, process_id=index)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # other devices bring their own
    try:
        jax.distributed.initialize(**given, initialization_timeout=timeout_s)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--coordinator={where}: the processes did not find each other ({reason}): {SPELLING}") from error
    if jax.process_index():
        logging.getLogger("g4v_jax.nn.kernels").setLevel(logging.WARNING)  # what is chosen is the same in all: one tells


def merged(state: dict) -> dict:
    """One JSON state made of every process's: dictionaries joined key by key; what else they hold is the same in all.

    A collective: every process calls it, in the same order as others.
    """
    if jax.process_count() == 1:
        return state
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(sizes) - text.size)))
    return functools.reduce(joined, (json.loads(bytes(row[:size])) for row, size in zip(texts, sizes)))


def joined(one, other):
    """Two JSON values as one: dictionaries key by key, of all else the first."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    return {key: joined(one.get(key, other.get(key)), other.get(key, one.get(key))) for key in one | other}
