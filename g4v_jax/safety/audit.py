"""The audit trail: one line of JSON for every decision of the controls, appended to a file.

May hold what a line says and how it is written. Requests are named by their SHA-256, not repeated.
"""

import datetime
import errno
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from g4v_jax.errors import UserError


def entry(request: str, outcome, threshold: float, layers, run: Mapping[str, object], mark: int | None = None) -> dict:
    """What is recorded of an `Outcome` (see infer/guard.py): the decision, every score, and what made it.

    `run`: which model, such as {"workdir", "step"}. `mark`: the payload of the invisible mark of the clip that goes with
    it, if any: what is read from a copy of the clip, as `watermark detect` prints it, finds this line.
    """
    decision = "stopped" if outcome.stopped_by else "answered" if outcome.clip is None else "rendered"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "decision": decision,
        "stopped_by": outcome.stopped_by,
        "scores": {name: round(float(value), 6) for name, value in outcome.scores.items()},
        "threshold": threshold,
        "layers": list(layers),
        "watermark": None if mark is None else f"{mark:08x}",
        "request_sha256": hashlib.sha256(request.encode()).hexdigest(),
        "run": dict(run),
        "version": metadata.version("g4v_jax"),
    }


def append(path: str | os.PathLike, line: dict) -> None:
    """Add one line, also with several writers. Raises UserError where it cannot be written, or not whole."""
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.write(file, data) < len(data):  # one call: lines of several writers do not mix
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: the audit line could not be written ({error.strerror}); nothing is rendered without") from None
