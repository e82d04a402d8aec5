"""`g4v check`."""

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
    from g4v_jax.plan.account import arithmetic, describe, sharding_table

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
