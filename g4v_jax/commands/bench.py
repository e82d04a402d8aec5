"""`g4v bench`: what this machine does in a second."""

import sys

from absl import flags

from g4v_jax.commands.common import parse, write_json
from g4v_jax.errors import UserError, nearest


def step(arguments: list[str]) -> None:
    """Time a config's train step, by tower, and the loop around it; or --against the same step of another library."""
    values = _flags("bench step", arguments, steps=5)
    if values.against:
        return _against(values, "step", {})
    from g4v_jax.bench import report
    from g4v_jax.bench.step import Step
    from g4v_jax.build import Build

    figures = report.of_step(Step(Build(values.config)), values.pairs, values.steps)
    print(report.step_table(figures))
    write_json(values.json, figures)


def decode(arguments: list[str]) -> None:
    """Time greedy decoding of a config's language model; or --against the same by another library."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("batch", 1, "Prompts at a time.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("new", 64, "Tokens of an answer.", lower_bound=1, flag_values=values)

    values = _flags("bench decode", arguments, steps=3, extra=extra)
    sizes = {"batch": values.batch, "prompt": values.prompt, "new": values.new}
    if values.against:
        return _against(values, "decode", sizes)
    from g4v_jax.bench import report
    from g4v_jax.bench.decode import Decoding
    from g4v_jax.build import Build

    figures = report.of_decoding(Decoding(Build(values.config), **sizes), values.pairs * values.steps, sizes)
    print(report.decode_table(figures))
    write_json(values.json, figures)


def _flags(command: str, arguments: list[str], steps: int, extra=None):
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("against", None, "Take turns with transformers, peft or diffusers.", flag_values=values)
        flags.DEFINE_integer("steps", steps, "Of a turn.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("pairs", 3, "Turns of each side.", lower_bound=1, flag_values=values)
        if extra:
            extra(values)

    return parse(command, arguments, extra=define, json=True)[0]


def _against(values, work: str, sizes: dict) -> None:
    from g4v_jax.bench import peers, report, turns
    from g4v_jax.build import Build

    known = peers.WORK[work]
    if values.against not in known:
        raise UserError(f"bench {work}: --against={values.against!r} is not known{nearest(values.against, known)}")
    build = Build(values.config)
    peers.check(values.against, work, build)
    about = {"config": values.config.to_dict(), "work": work, **sizes}
    ours, theirs = ({"side": side, **about} for side in ("ours", values.against))
    print(f"{work}: ours and {values.against} in turn", file=sys.stderr)
    figures = turns.compare(ours, theirs, values.pairs, values.steps)
    print(report.comparison(figures, values.against))
    write_json(values.json, {"against": values.against, "work": work, **sizes, **figures})
