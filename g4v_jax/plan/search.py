"""Which mesh, micro-batches and rematerialisation suit a config on a machine: many are estimated, few are compiled.

May hold the candidates, the estimate that ranks them, and the choice. The estimate follows from shapes and published rates
alone and is only good for putting candidates in order; what is reported of a finalist comes from its compiled step.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.plan.account import describe, model_arithmetic, scores_of_attention
from g4v_jax.plan.chips import GIB, Chip
from g4v_jax.plan.collectives import Collective, along
from g4v_jax.plan.compiled import Compiled, DoesNotFit, compile_step
from g4v_jax.plan.roofline import Bound, bound, step_bound
from g4v_jax.plan.table import mesh_text
from g4v_jax.plan.topology import Target
from g4v_jax.sharding import slice_of

TENSOR = CONTEXT = (1, 2, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8)
REMATERIALISED = ("llm", "denoiser", "vision", "summarizer")  # towers that have a policy
AGAIN = {"none": 0.0, "dots": 0.06, "attention": 0.3, "full": 1 / 3}  # by policy: arithmetic done once more, a share of the model's
ROOM = 0.92  # of a device's memory: the compiler wants some for itself
HOPELESS = 1.3  # of a device's memory: a larger estimate is not compiled


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Fields of a config that a search sets."""

    mesh: tuple[tuple[str, int], ...]
    micro_batches: int
    remat: str

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of the config with these fields."""
        changed = ConfigDict(config.to_dict())
        changed.mesh = dict(self.mesh)
        with changed.unlocked():
            changed.step = dict(config.get("step", {}), micro_batches=self.micro_batches)
            for tower in self._towers(config):
                changed.model[tower].remat = self.remat
        return changed

    def fields(self, config: ConfigDict) -> list[str]:
        """What to write into the config, one assignment each."""
        towers = [f'model.{tower}.remat = "{self.remat}"' for tower in self._towers(config)]
        return [f"mesh = {dict(self.mesh)}", f"step.micro_batches = {self.micro_batches}", *towers]

    def __str__(self) -> str:
        return f"{mesh_text(dict(self.mesh))}, {self.micro_batches} micro-batch(es), remat {self.remat}"

    def _towers(self, config: ConfigDict) -> list[str]:
        """Those that learn or lie before what learns: the others are not kept for a backward pass."""
        return [tower for tower in REMATERIALISED if tower in config.model]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a candidate may need and do: bytes of one device, and the step's bound."""

    candidate: Candidate
    memory: float
    bound: Bound


def candidates(config: ConfigDict, target: Target) -> Iterator[Candidate]:
    """Every mesh of the machine with every number of micro-batches that divides its rows, and every policy.

    Slices are joined by `replica`; within a slice all that is neither context nor tensor is `fsdp`, whole or a quarter of it.
    """
    rows, devices = config.rows.rows, target.count // target.slices
    for tensor, context, whole in itertools.product(TENSOR, CONTEXT, (1, 4)):
        if devices % (tensor * context * whole):
            continue
        fsdp, replica = devices // (tensor * context * whole), target.slices * whole
        if fsdp == 1 and replica > target.slices:
            continue
        mesh = (("replica", replica), ("fsdp", fsdp), ("context", context), ("tensor", tensor))
        for micro_batches, remat in itertools.product(MICRO_BATCHES, AGAIN):
            if rows % (replica * fsdp * micro_batches) == 0:
                yield Candidate(mesh, micro_batches, remat)


def estimate(build: Build, known: dict, candidate: Candidate, chip: Chip, model: dict[str, float]) -> Estimate:
    """Memory and bound of a candidate; `build`: of its mesh, whatever its other fields, and what `describe` says of it.

    `model`: needed operations of a step by tower, over all devices.
    """
    held, size = known["bytes_per_device"], build.compute.itemsize
    given = sum(held.values())
    gradients = held["trainable"] * (1 if candidate.micro_batches > 1 else size / 4)
    memory = given + gradients + activations(build, candidate) + scores(build, candidate)
    everything = activations(build, dataclasses.replace(candidate, remat="none")) * candidate.micro_batches
    needed = sum(model.values()) / build.mesh.size
    found = bound(
        chip,
        needed * (1 + AGAIN[candidate.remat]),
        2 * candidate.micro_batches * given + 3 * everything,
        list(transfers(build, known["parameters"], candidate)),
        needed,
    )
    return Estimate(candidate, memory, found)


def activations(build: Build, candidate: Candidate) -> float:
    """Bytes a device that the layers of one micro-batch keep for the backward pass, and one layer done again."""
    mesh, total = build.mesh.shape, 0.0
    for tower, tokens, length in _stacks(build, candidate):
        dim, mlp = tower.dim, tower.mlp_dim // mesh["tensor"]
        # scores in float32, and as weights
        whole = 9 * dim + 4 * mlp + (1 + 4 / build.compute.itemsize) * scores_of_attention(build, tower, length)
        kept = {"full": dim, "attention": 2 * dim, "dots": 5 * dim + 2 * mlp, "none": whole}[candidate.remat]
        again = whole if candidate.remat != "none" else 0
        total += tokens * min(tower.num_layers * kept + again, tower.num_layers * whole)
    return total * build.compute.itemsize


def scores(build: Build, candidate: Candidate) -> float:
    """Bytes a device of scores over the vocabulary, float32, with their gradient."""
    if build.alone == "denoiser":
        return 0.0
    chunks = getattr(build.objective.spec, "chunks", 1) or 1
    tokens = next(tokens for tower, tokens, _ in _stacks(build, candidate) if tower is build.llm)
    return 2 * 4 * tokens / chunks * build.tokenizer.vocab_size / build.mesh.shape["tensor"]


def transfers(build: Build, parameters: dict, candidate: Candidate) -> Iterator[Collective]:
    """What a device sends in a step: weights gathered and gradients scattered over fsdp, activations over tensor, keys and
    values over context, gradients over replica.
    """
    mesh, size, micro = build.mesh.shape, build.compute.itemsize, candidate.micro_batches
    trainable, frozen = (
        sum(count[kind] for count in parameters.values()) * size / mesh["tensor"] for kind in ("trainable", "frozen")
    )
    passes = 3 if candidate.remat in ("attention", "full") else 2

    def sent(axis: str, count: float, slow: bool = False) -> Collective:
        group = build.mesh.devices[tuple(slice(None) if name == axis else 0 for name in build.mesh.axis_names)]
        return Collective(kind="estimate", axis=axis, slow=slow, tower="", along=along(group), count=1, bytes=int(count))

    share = (mesh["fsdp"] - 1) / mesh["fsdp"]
    yield sent("fsdp", share * (micro * passes * (trainable + frozen) + trainable))
    slices = len({slice_of(device) for device in build.mesh.devices.flat})
    yield sent("replica", 2 * (mesh["replica"] - 1) / mesh["replica"] * trainable / mesh["fsdp"], slow=slices > 1)
    for tower, tokens, _ in _stacks(build, candidate):
        states = micro * tokens * tower.num_layers * tower.dim * size
        yield sent("tensor", 4 * passes * states * (mesh["tensor"] - 1) / mesh["tensor"])
        groups = (getattr(tower, "num_kv_heads", None) or tower.num_heads) / tower.num_heads
        yield sent("context", 3 * states * groups * (mesh["context"] - 1) / mesh["tensor"])


def search(
    config: ConfigDict,
    target: Target,
    devices: tuple,
    finalists: int,
    compile_: Callable[[Build, int], Compiled] = compile_step,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Estimate all candidates and compile the best `finalists` that fit -> them as data, the fastest first:
    {"mesh", "micro_batches", "remat", "fields", "memory", "estimated_memory", "bound", "estimated_bound"}.

    Candidates that the compiler refuses do not count, up to as many again. Raises UserError where none fits, and where the
    machine's rates are not known.
    """
    if not target.chip.flops:
        raise UserError(f"{target.name}: nothing is known of its speed, so there is nothing to rank")
    model, found = _estimates(config, target, devices)
    limit = target.chip.hbm
    hopeful = [one for one in found if one.memory <= HOPELESS * limit]
    if not hopeful:
        least = min(found, key=lambda one: one.memory)
        raise UserError(
            f"{target.name}: does not fit: the smallest of {len(found)} candidates needs about {least.memory / GIB:.1f} of "
            f"{limit / GIB:.1f} GiB ({least.candidate}); take more devices or fewer rows"
        )
    hopeful.sort(key=lambda one: (one.memory > ROOM * limit, one.bound.step_s, one.memory))
    say(f"{len(found)} candidates, {len(hopeful)} may fit; compiling the best {min(finalists, len(hopeful))}")
    ranked = []
    for one in hopeful[: 2 * finalists]:
        if len(ranked) == finalists:
            break
        build = Build(one.candidate.apply(config), devices)
        try:
            compiled = compile_(build, limit)
        except DoesNotFit as error:
            say(f"  does not fit ({error}): {one.candidate}")
            continue
        memory = compiled.memory["needed"]
        whole, _ = step_bound(target.chip, compiled, build.mesh.size, model)
        say(f"  {memory / GIB:7.2f} GiB, {1e3 * whole.step_s:9.1f} ms: {one.candidate}")
        ranked.append(_row(config, one, memory, whole))
    if not ranked:
        raise UserError(f"{target.name}: none of the {2 * finalists} best candidates fits; take more devices or fewer rows")
    return sorted(ranked, key=lambda row: row["bound"]["step_s"])


def table(ranked: Sequence[dict]) -> str:
    """The ranking for people, and what to write into the config for its first."""
    lines = ["rank  mesh                                      micro  remat     GiB  (guess)   bound ms  (guess)    MFU  limit"]
    for place, row in enumerate(ranked, 1):
        bound_, guess = row["bound"], row["estimated_bound"]
        lines.append(
            f"{place:>4}  {mesh_text(row['mesh']):40}  {row['micro_batches']:>5}  {row['remat']:5}  {row['memory'] / GIB:6.2f}  "
            f"{row['estimated_memory'] / GIB:7.2f}  {1e3 * bound_['step_s']:9.1f}  {1e3 * guess['step_s']:7.1f}  "
            f"{100 * bound_['mfu']:5.1f}  {bound_['limit']}"
        )
    return "\n".join([*lines, "", "set in the config:", *(f"  config.{field}" for field in ranked[0]["fields"])])


def _estimates(config: ConfigDict, target: Target, devices: tuple) -> tuple[dict[str, float], list[Estimate]]:
    """(needed operations by tower, estimates of all candidates whose mesh divides the model)."""
    model, found, wrong = None, [], None
    for _, group in itertools.groupby(candidates(config, target), key=lambda one: one.mesh):
        group = list(group)
        build = Build(group[0].apply(config), devices)
        try:
            model = model or model_arithmetic(build)
            known = describe(build)
            found += [estimate(build, known, one, target.chip, model) for one in group]
        except (UserError, ValueError) as error:  # this mesh does not divide heads, rows or widths
            wrong = error
    if not found:
        raise UserError(f"{target.name}: no mesh of {target.count} devices suits this config; the last: {wrong}")
    return model, found


def _row(config: ConfigDict, one: Estimate, memory: int, whole: Bound) -> dict:
    return {
        "mesh": dict(one.candidate.mesh),
        "micro_batches": one.candidate.micro_batches,
        "remat": one.candidate.remat,
        "fields": one.candidate.fields(config),
        "memory": memory,
        "estimated_memory": one.memory,
        "bound": whole.as_dict() | {"limit": whole.limit},
        "estimated_bound": one.bound.as_dict() | {"limit": one.bound.limit},
    }


def _stacks(build: Build, candidate: Candidate) -> Iterator[tuple[object, float, int]]:
    """Towers of layers that the backward pass goes through, the tokens of a micro-batch that one device reads there, and how
    many of them look at each other.
    """
    mesh = dict(candidate.mesh)
    rows = build.shape.rows / (mesh["replica"] * mesh["fsdp"] * candidate.micro_batches)
    yield build.main[1], rows * build.length / mesh["context"], build.length
    denoiser = build.model.denoiser if build.sections.objective == "joint" else None
    if hasattr(denoiser, "patch"):
        yield denoiser, rows * build.shape.targets * build.patches / mesh["context"], build.patches
