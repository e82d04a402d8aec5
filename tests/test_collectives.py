"""What every shipped config sends between eight devices, at full size: a refactor that changes it must show the new figures.

    G4V_UPDATE_GOLDEN=1 python -m pytest tests/test_collectives.py

The counts are those of a CPU's compiler, which partitions as the others do; theirs may fuse and split differently.
"""

import math
import os

import jax
import pytest
import tiny
from test_configs import GOLDEN, MESH, MESHES, shipped

from g4v_jax.build import Build
from g4v_jax.plan import hlo
from g4v_jax.plan.collectives import collectives
from g4v_jax.plan.compiled import tower_of
from g4v_jax.train.step import jit_step, make_step

FOLDER = GOLDEN / "collectives"
SLOW = ("paper_7b",)  # its UNet is not repeated by a loop: minutes of compiling


def sent(name: str) -> str:
    """A line each of kind, axis, tower, how often, and bytes that one device sends, in alphabetical order."""
    config = shipped()[name]()
    config.mesh = MESHES.get(name.split("-")[0], MESH)
    for tower in config.model.values():
        if hasattr(tower, "get") and tower.get("unroll", 1) > 1:
            tower.unroll = 1  # a loop's turns are counted, and it compiles in seconds
    build = Build(config, tuple(jax.devices()[: math.prod(dict(config.mesh).values())]))
    state = build.blueprint.state_shapes(build.optimizer)
    with jax.set_mesh(build.mesh):
        step = jit_step(make_step(build.objective, build.optimizer, build.step, seed=0), state)
        lowered = step.lower(state, build.blueprint.frozen_shapes, build.batch_shapes())
        text = lowered.compile(compiler_options=tiny.QUICK).as_text()
    found = collectives(hlo.parse(text), build.mesh, tower_of)
    return "".join(sorted(f"{one.kind} {one.axis} {one.tower} {one.count} {one.bytes}\n" for one in found))


@pytest.mark.parametrize("name", [name for name in shipped() if name not in SLOW])
def test_a_shipped_config_sends_what_it_did(name):
    told, golden = sent(name), FOLDER / f"{name}.txt"
    if os.environ.get("G4V_UPDATE_GOLDEN") == "1":
        FOLDER.mkdir(exist_ok=True)
        golden.write_text(told)
    assert golden.exists(), "no golden file; see this module's docstring"
    assert told.splitlines() == golden.read_text().splitlines(), "if this is meant, see this module's docstring"


def test_no_golden_file_is_left_over():
    assert {path.stem for path in FOLDER.glob("*")} == set(shipped()) - set(SLOW)
