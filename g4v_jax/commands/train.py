"""`g4v train` and `g4v average`."""

import json
from pathlib import Path

from absl import flags

from g4v_jax import config as configs
from g4v_jax.commands.common import parse, write_json
from g4v_jax.errors import UserError


def train(arguments: list[str]) -> None:
    """Train a config in --workdir, going on from its newest checkpoint; alone, or as one of several processes."""
    from g4v_jax.train import processes

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("stop_after", None, "End this call after so many steps.", lower_bound=1, flag_values=values)
        processes.define_flags(values)

    values, _ = parse("train", arguments, extra=extra, workdir=True, json=True)
    processes.join(values)
    import jax

    workdir, leads = Path(values.workdir), jax.process_index() == 0
    from g4v_jax.build import Build

    build = Build(values.config)
    steps = build.loop.steps
    build.objective, build.optimizer, build.step, build.pipeline  # every section is read before anything is written
    configs.save(values.config, workdir, write=leads)
    summary = workdir / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["steps"] >= steps:
        if leads:
            print(f"{workdir}: already trained for {steps} steps: nothing to do")
    else:
        _run(build, workdir, values.stop_after, leads)
    if leads and summary.exists():
        write_json(values.json, json.loads(summary.read_text()))


def _run(build, workdir: Path, stop_after: int | None, leads: bool) -> None:
    """`leads`: whether this is process 0; the others write nothing but their part of the arrays."""
    import jax

    from g4v_jax import rng
    from g4v_jax.data.corpus import load_tokenizer
    from g4v_jax.sharding import row_share
    from g4v_jax.train import loop
    from g4v_jax.train.checkpoint import Checkpoints
    from g4v_jax.train.metrics import Logger
    from g4v_jax.train.start import first_state, frozen_tree, laid_out, versions
    from g4v_jax.train.step import jit_step, make_gradient_cosines, make_step

    tokenizer = load_tokenizer(build.pipeline.records, build.tokenizer, workdir, keep=leads)
    blueprint, optimizer, spec, seed = build.blueprint, build.optimizer, build.loop, build.sections.seed
    sources = build.sources()
    checkpoints = Checkpoints(workdir, spec.checkpoint_every, spec.keep)
    frozen = laid_out(frozen_tree(blueprint, checkpoints, sources), build.towers, build.mesh)
    batches = build.pipeline.open(tokenizer, build.shape, *row_share(build.mesh, build.shape.rows))
    shapes = blueprint.state_shapes(optimizer)
    step = make_step(build.objective, optimizer, build.step, seed)
    loop.run(
        step=jit_step(step, shapes),
        shapes=shapes,
        create=lambda: first_state(blueprint, optimizer, rng.stream(seed, "init"), sources),
        frozen=frozen,
        batches=batches,
        mesh=build.mesh,
        checkpoints=checkpoints,
        logger=Logger(workdir, spec.steps, spec.log_every),
        spec=spec,
        meta={"versions": versions(), "config": build.config.to_json_best_effort()},
        evaluate=_live(build, tokenizer) if spec.eval_every else None,
        cosines=jax.jit(make_gradient_cosines(build.objective, seed)) if spec.cosine_every else None,
        stop_after=stop_after,
    )
    if leads and batches.counts:
        print("data: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(batches.counts.items())))


def _live(build, tokenizer):
    """What the loop measures every `train.eval_every` steps: evaluate(state, frozen) -> values by name."""
    from g4v_jax import trees
    from g4v_jax.evals import run
    from g4v_jax.infer.assistant import Assistant
    from g4v_jax.losses.joint import Joint
    from g4v_jax.nn.stack import stacked

    if not isinstance(build.objective, Joint):
        raise UserError(f"config: train.eval_every: objective {build.sections.objective!r} makes no answers; set it to 0")
    measure = run.live(build.pipeline.records, build.evaluation, build.shape)  # read before anything is trained

    def evaluate(state, frozen):
        averaged = trees.flatten(state.trainable) | trees.flatten(state.ema)
        params = trees.merge(trees.unflatten(averaged), stacked(frozen))
        return measure(Assistant(build.model, params, tokenizer, build.shape, build.sample, build.mesh))

    return evaluate


def average(arguments: list[str]) -> None:
    """Write the run that lies between two: a safety stage's abilities kept, say, and most of what it learned."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_float("weight", 0.5, "Of the second run; 1 less this is the first's.", 0.0, 1.0, flag_values=values)
        flags.DEFINE_list("whole", [], "Towers to take from the second run as they are.", flag_values=values)
        flags.DEFINE_string("out", None, "Folder of the new run.", flag_values=values)

    values, runs = parse("average", arguments, extra=extra, config=False)
    if len(runs) != 2 or not values.out:
        raise UserError("average: give two runs and --out: g4v average runs/before runs/after --weight=0.8 --out=runs/between")
    from g4v_jax.build import Build
    from g4v_jax.data.text import Tokenizer
    from g4v_jax.train.average import average_runs

    first, second, out = Path(runs[0]), Path(runs[1]), Path(values.out)
    config = configs.load(second)
    files = [run / "tokenizer.json" for run in (first, second)]
    tokenizers = [Tokenizer.load(file) for file in files]
    if files[0].read_bytes() != files[1].read_bytes() or tokenizers[0].format != tokenizers[1].format:
        raise UserError(f"average: {first} and {second} have different tokenizers or chat formats")
    step = average_runs(first, second, values.weight, out, Build(config).blueprint, values.whole)
    tokenizers[1].save(out / "tokenizer.json")
    configs.save(config, out)
    print(f"{values.out}: {values.weight:g} of the way from {first} to step {step} of {second}; measure it with g4v eval --workdir={values.out}")
