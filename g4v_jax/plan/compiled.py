"""The train step compiled for a machine that may not be here, and what the compiled program says of itself.

May hold the compiling and the reading of its memory, collectives, arithmetic and traffic; what they mean for a step's time
is `roofline`'s business.
"""

import dataclasses
import re
import time
from collections import Counter

import jax

from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.plan import buffers, flops, hlo, work
from g4v_jax.plan.account import SCOPES
from g4v_jax.plan.buffers import Buffer
from g4v_jax.plan.chips import GIB
from g4v_jax.plan.collectives import Collective, collectives
from g4v_jax.train.step import jit_step, make_step

@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one device holds, does and sends in one step."""

    memory: dict[str, int]  # bytes: "arguments", "outputs", "aliased", "temporaries", "peak", "needed"
    flops: dict[str, int]  # by tower, of one device
    traffic: dict[str, int]  # bytes to and from its memory, by tower
    collectives: list[Collective]
    fullest: list[Buffer]  # temporaries at the fullest moment, largest first
    seconds: float  # that compiling took
    text: str


class DoesNotFit(UserError):
    """The compiler refused a program for want of memory. `needs` and `has`: bytes, None where it did not say."""

    def __init__(self, message: str, needs: float | None, has: float | None):
        super().__init__(message)
        self.needs, self.has = needs, has

    @classmethod
    def of(cls, needs: float, has: float) -> "DoesNotFit":
        """Told in GiB."""
        return cls(f"needs {needs / GIB:.2f} of {has / GIB:.2f} GiB", needs, has)


def tower_of(scope: str) -> str:
    """The tower, or "optimizer", that an instruction belongs to."""
    return flops.tower_of(scope, SCOPES)


def compile_step(build: Build, memory_has: int = 0) -> Compiled:
    """Compile the very step that `g4v train` runs. `memory_has`: bytes of a device, 0 where that is not known.

    Raises DoesNotFit, which a GPU's compiler leaves to us, and UserError as `Build` does.
    """
    step = make_step(build.objective, build.optimizer, build.step, seed=0)
    state = build.blueprint.state_shapes(build.optimizer)
    started = time.perf_counter()
    with jax.set_mesh(build.mesh):
        traced = jit_step(step, state).trace(state, build.blueprint.frozen_shapes, build.batch_shapes())
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refused(str(error)) from error
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    program = hlo.parse(text)
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    whole = memory["arguments"] + memory["temporaries"] + max(0, memory["outputs"] - memory["aliased"])
    # A TPU's compiler refuses by itself, and by its peak: of 15.75 GiB it took a program with 20.3 of arguments and temporaries,
    # its peak 15.55. What waits in host memory is in the peak too, and not in the sum.
    on_tpu = build.platform == "tpu"
    memory["needed"] = min(memory["peak"], whole) if on_tpu else whole
    if memory_has and not on_tpu and whole > memory_has:
        raise DoesNotFit.of(whole, memory_has)
    kernels = flops.kernels(traced.jaxpr, SCOPES)  # of the whole mesh
    inside = Counter({tower: count // build.mesh.size for tower, count in kernels.items()})
    return Compiled(
        memory,
        dict(sorted((work.flops(program, tower_of) + inside).items())),
        dict(sorted(work.traffic(program, tower_of).items())),
        collectives(program, build.mesh, tower_of),
        buffers.fullest(program, tower_of),
        seconds,
        text,
    )


def _refused(text: str) -> UserError:
    """The compiler's refusal as an error of ours; what is not about memory stays what it was."""
    if "RESOURCE_EXHAUSTED" not in text:
        return UserError(f"the compiler refused the step: {text.strip().splitlines()[0]}")
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", text)
    if not found:
        return DoesNotFit(f"does not fit: {text.strip().splitlines()[0]}", None, None)
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return DoesNotFit.of(float(found[1]) * units[found[2]], float(found[3]) * units[found[4]])
