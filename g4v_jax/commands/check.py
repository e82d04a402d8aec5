"""`g4v check`."""

import math

from absl import flags

from g4v_jax.commands.common import parse, write_json


def check(arguments: list[str]) -> None:
    """Build a config on virtual devices: every field, shape and pattern, parameters by tower, bytes a device."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("devices", 4, "Virtual CPU devices.", lower_bound=1, flag_values=values)
        flags.DEFINE_bool("flops", False, "Also count the arithmetic of a step, by tower.", flag_values=values)
        flags.DEFINE_bool("table", False, "Also print the sharding of every parameter.", flag_values=values)

    values, _ = parse("check", arguments, extra=extra, json=True)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", values.devices)
    from g4v_jax.build import Build

    build = Build(values.config)
    report = describe(build) | ({"flops": arithmetic(build)} if values.flops else {})
    print(f"mesh                 {report['mesh']}")
    for tower, count in report["parameters"].items():
        print(f"{tower:20} {count['trainable']:>14,} trainable {count['frozen']:>14,} frozen")
    for name, size in report["bytes_per_device"].items():
        print(f"{name:20} {size / 2**20:14,.1f} MiB a device")
    for tower, count in report.get("flops", {}).items():
        print(f"{tower:20} {count / 1e9:14,.1f} GFLOP a step")
    if values.table:
        print(sharding_table(build))
    write_json(values.json, report)


def describe(build) -> dict:
    """{"mesh", "parameters" by tower, "bytes_per_device" of what a step is given}. Raises UserError as `Build` does."""
    import jax

    from g4v_jax import trees

    build.objective, build.step, build.pipeline, build.sample, build.evaluation
    blueprint = build.blueprint
    trainable, frozen = trees.split(blueprint.shapes, blueprint.trainable)
    state = blueprint.state_shapes(build.optimizer)

    def size(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {
        "mesh": dict(build.mesh.shape),
        "parameters": {
            tower: {"trainable": trees.count(trainable.get(tower, {})), "frozen": trees.count(frozen.get(tower, {}))}
            for tower in sorted(blueprint.shapes)
        },
        "bytes_per_device": {
            "trainable": size(state.trainable),
            "optimizer": size(state.opt_state),
            "ema": size(state.ema),
            "frozen": size(blueprint.frozen_shapes),
            "batch": size(build.batch_shapes()),
        },
    }


def arithmetic(build) -> dict[str, int]:
    """Floating-point operations of one train step over the whole mesh, by tower and of the optimizer."""
    import jax

    from g4v_jax.build import TOWERS
    from g4v_jax.plan import flops
    from g4v_jax.train.step import make_step

    step = make_step(build.objective, build.optimizer, build.step, seed=0)
    state = build.blueprint.state_shapes(build.optimizer)
    with jax.set_mesh(build.mesh):
        traced = jax.make_jaxpr(step)(state, build.blueprint.frozen_shapes, build.batch_shapes())
    return dict(sorted(flops.count(traced, (*TOWERS, "optimizer")).items()))


def sharding_table(build) -> str:
    """One line a parameter: path, shape, mesh axes of each dim, trainable or frozen. The golden files hold this."""
    from g4v_jax import trees

    lines = []
    for path, leaf in sorted(trees.flatten(build.blueprint.shapes).items()):
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        kind = "trainable" if path in build.blueprint.trainable else "frozen"
        lines.append(f"{path} {list(leaf.shape)} {[axis or '-' for axis in spec]} {kind}".replace("'", ""))
    return "\n".join(lines) + "\n"
