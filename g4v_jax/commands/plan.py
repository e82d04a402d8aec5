"""`g4v plan`: a config on machines that are not here."""

from pathlib import Path

from absl import flags

from g4v_jax.commands.common import parse, write_json
from g4v_jax.errors import UserError


def plan(arguments: list[str]) -> None:
    """Compile a config's train step for --topology, with no such machine at hand: memory, traffic, bound on its speed."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("topology", None, "Such as v5p:4x4x8, h100:8, cpu:8.", flag_values=values)
        flags.DEFINE_integer("slices", 1, "Of TPUs, joined by the slow network.", flag_values=values)
        flags.DEFINE_string("hlo", None, "Also write the compiled program's text to this file.", flag_values=values)
        flags.DEFINE_bool("fresh", False, "Compile, also where the same plan was made before.", flag_values=values)
        flags.DEFINE_bool("search", False, "Try meshes, micro-batches and policies of remat; rank the best.", flag_values=values)
        flags.DEFINE_integer("finalists", 3, "Of a search: how many are compiled.", lower_bound=1, flag_values=values)

    values, _ = parse("plan", arguments, extra=extra, json=True)
    from g4v_jax.plan import topology

    if not values.topology:
        raise UserError(f"plan: name a machine: g4v plan --config=configs/g4v_8b.py --topology=v5p:4x4x8; such as {topology.EXAMPLES}")
    target = topology.parse(values.topology, values.slices)
    if values.search:
        return _search(values, target)
    from g4v_jax.plan import cache
    from g4v_jax.plan.table import table

    name = cache.key(values.config, target)
    found = None if values.fresh or values.hlo else cache.load(name)
    if found is None:
        found = _make(values.config, target, values.hlo)
        cache.save(name, found)
    else:
        print("the same plan was made before; --fresh makes it again\n")
    print(table(found))
    write_json(values.json, found)


def _devices(target) -> tuple:
    """The devices to build for; called before JAX is used for anything."""
    from g4v_jax.plan import topology

    topology.prepare(target)
    return tuple(topology.devices(target))


def _search(values, target) -> None:
    devices = _devices(target)
    from g4v_jax.plan.search import search, table

    ranked = search(values.config, target, devices, values.finalists)
    print(f"\n{table(ranked)}")
    write_json(values.json, {"topology": target.name, "slices": target.slices, "ranking": ranked})


def _make(config, target, hlo: str | None) -> dict:
    devices = _devices(target)
    from g4v_jax.build import Build
    from g4v_jax.plan.advice import advise
    from g4v_jax.plan.compiled import DoesNotFit, compile_step
    from g4v_jax.plan.report import report

    build = Build(config, devices)
    try:
        compiled = compile_step(build, target.chip.hbm)
    except DoesNotFit as error:
        raise UserError(f"{target.name}: does not fit: {error}; {advise(build)}") from error
    if hlo:
        Path(hlo).parent.mkdir(parents=True, exist_ok=True)
        Path(hlo).write_text(compiled.text)
    return report(target, build, compiled)
