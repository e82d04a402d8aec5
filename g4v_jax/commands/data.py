"""`g4v data make | fetch | talk | said | build safety | build | inspect`."""

from absl import flags

from g4v_jax.commands.common import open_llm, open_run, parse, write_json
from g4v_jax.errors import UserError


def make(arguments: list[str]) -> None:
    """Write the built-in world into the config's `source` folder."""
    values, _ = parse("data make", arguments, json=True)
    from g4v_jax.build import Build
    from g4v_jax.data.world.make import make as make_world

    build = Build(values.config)
    if not build.sections.world:
        raise UserError("data make: this config has no world section: its clips come from elsewhere (data fetch)")
    world = build.world
    summary = make_world(build.sections.source, world.clips, world.hazards, world.dialogues, world.seed)
    verb = "made" if summary["made"] else "already there"
    print(f"{build.sections.source}: {verb}: {summary['clips']} clips, {summary['dialogues']} dialogues")
    write_json(values.json, summary)


def fetch(arguments: list[str]) -> None:
    """Bring a named source into --out."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "Folder for clips and captions.", flag_values=values)
        flags.DEFINE_integer("packs", 1, "How many packs of clips.", lower_bound=1, flag_values=values)

    values, names = parse("data fetch", arguments, extra=extra, config=False, json=True)
    from g4v_jax.data.fetch import fetch as bring

    if len(names) != 1 or not values.out:
        raise UserError("data fetch: say what and where: g4v data fetch emoji --out=data/emoji")
    summary = bring(names[0], values.out, packs=values.packs)
    print(f"{values.out}: {summary}")
    write_json(values.json, summary)


def talk(arguments: list[str]) -> None:
    """Write ordinary talk into --out: people's conversations, to train on and held out."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "Folder for dialogues.", flag_values=values)

    values, _ = parse("data talk", arguments, extra=extra, config=False, json=True)
    if not values.out:
        raise UserError("data talk: say where: g4v data talk --out=data/talk")
    from g4v_jax.data import talk

    summary = talk.write(values.out)
    print(f"{values.out}: {summary}")
    write_json(values.json, summary)


def said(arguments: list[str]) -> None:
    """Write what the run --workdir says of the training clips of --records into --out."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "Folder for clips and dialogues.", flag_values=values)
        flags.DEFINE_string("records", None, "Other records than the run's own.", flag_values=values)
        flags.DEFINE_integer("seed", 0, "Of the phrasings of the question.", flag_values=values)

    values, _ = parse("data said", arguments, extra=extra, config=False, workdir=True, json=True)
    if not values.out:
        raise UserError("data said: say where: g4v data said --workdir=runs/smol --out=data/said")
    from g4v_jax.infer import rehearsal

    build, assistant, _ = open_run(values.workdir)
    summary = rehearsal.write(assistant, values.records or build.pipeline.records, values.out, values.seed)
    print(f"{values.out}: {summary}")
    write_json(values.json, summary)


def safety(arguments: list[str]) -> None:
    """Write the safety set into --out; harmless requests are answered by the imported LLM --llm where one is given."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "Folder for clips and dialogues.", flag_values=values)
        flags.DEFINE_string("llm", None, "Folder of the imported LLM that answers.", flag_values=values)
        flags.DEFINE_integer("seed", 0, "Of all choices.", flag_values=values)

    values, _ = parse("data build safety", arguments, extra=extra, config=False, json=True)
    if not values.out:
        raise UserError("data build safety: say where: g4v data build safety --out=data/safety")
    from g4v_jax.data.safety import build as safety_set
    from g4v_jax.infer.guard import is_refusal

    answers = _answerer(values.llm) if values.llm else None

    def answer(asked) -> list[str]:
        whole = [text if ended else text[: text.rfind(". ") + 1] for text, ended in answers(asked)]
        return ["" if is_refusal(text) else text for text in whole]

    summary = safety_set.write(values.out, answer if answers else None, values.seed)
    print(f"{values.out}: {summary['harmful']} harmful, {summary['harmless']} harmless; see card.json and README.md there")
    write_json(values.json, summary)


ANSWER = 64  # tokens of an answer to learn from, at most
TOGETHER = 16  # questions answered at a time


def _answerer(llm: str):
    """A function from questions to (answer, whether it ended by itself) of an imported LLM."""
    from tqdm import tqdm

    from g4v_jax.data.text import Turn
    from g4v_jax.infer.decode import conversation

    decoder, tokenizer = open_llm(llm)

    def answer(questions) -> list[tuple[str, bool]]:
        prompts = [conversation([Turn("user", text)], tokenizer) for text in questions]
        made = []
        for start in tqdm(range(0, len(prompts), TOGETHER), "answering", unit=" batches", disable=None):
            made += decoder.greedy(prompts[start : start + TOGETHER], ANSWER, [tokenizer.stop])
        return [(tokenizer.decode(ids).strip(), len(ids) < ANSWER) for ids in made]

    return answer


def build(arguments: list[str]) -> None:
    """Records of the config's `source`, a folder or several, and the tokenizer."""
    values, _ = parse("data build", arguments, json=True)
    from g4v_jax.build import Build
    from g4v_jax.data import records
    from g4v_jax.data.corpus import make_tokenizer

    parts = Build(values.config)
    summary = records.build(parts.sections.source.split(","), parts.pipeline.records)
    size = make_tokenizer(parts.pipeline.records, parts.tokenizer)
    verb = "already there" if summary["reused"] else "built"
    print(f"{parts.pipeline.records}: {verb}: {summary['records']}, skipped {summary['skipped']}; {size} tokens known")
    write_json(values.json, summary)


def inspect(arguments: list[str]) -> None:
    """Counts, padding and a sheet of what the model will see."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("batches", 8, "Batches to read.", lower_bound=1, flag_values=values)
        flags.DEFINE_string("out", None, "PNG of clips and targets of the first batch.", flag_values=values)

    values, _ = parse("data inspect", arguments, extra=extra, json=True)
    from g4v_jax.build import Build
    from g4v_jax.data import records
    from g4v_jax.data.corpus import load_tokenizer
    from g4v_jax.evals.inspect import measure, sheet

    parts = Build(values.config)
    tokenizer = load_tokenizer(parts.pipeline.records, parts.tokenizer)
    batches = parts.pipeline.open(tokenizer, parts.shape)
    try:
        taken = [next(batches) for _ in range(values.batches)]
        summary = {"records": records.splits(parts.pipeline.records), **measure(taken), **dict(batches.counts)}
    finally:
        batches.close()
    for name, value in summary.items():
        print(f"{name:16} {value}")
    if values.out:
        sheet(taken[0], tokenizer, values.out)
        print(f"sheet            {values.out}")
    write_json(values.json, summary)
