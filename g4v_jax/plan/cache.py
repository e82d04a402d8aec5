"""Plans that were made before: compiling for a pod takes minutes, and a TPU program compiled without a TPU cannot be kept.

May hold where plans lie, and what they depend on: the config, the machine, this package's own source and the compilers'
versions. A plan is used again only where all of these are the same, so none goes stale.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from g4v_jax.plan.topology import Target
from g4v_jax.train.manifest import write_json

PACKAGE = Path(__file__).parent.parent
COMPILERS = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")


def folder() -> Path:
    """Where plans are kept: g4v/plans in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g4v" / "plans"


def key(config: ConfigDict, target: Target) -> str:
    """A name for the plan of a config on a machine, by this code."""
    digest = hashlib.sha256(json.dumps([config.to_json_best_effort(), target.name, target.slices, _versions()]).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def load(name: str) -> dict | None:
    """The plan that was kept under a name; None where there is none, or where its file is damaged."""
    try:
        held = json.loads(_file(name).read_text())
        return json.loads(held["plan"]) if held["sha256"] == _digest(held["plan"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save(name: str, plan: dict) -> None:
    """Keep a plan. A folder that cannot be written is no error: the plan is then made again next time."""
    text = json.dumps(plan)  # as text, in the order that it is shown in
    with contextlib.suppress(OSError):
        write_json(_file(name), {"sha256": _digest(text), "plan": text})


def _file(name: str) -> Path:
    return folder() / f"{name}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in COMPILERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found
