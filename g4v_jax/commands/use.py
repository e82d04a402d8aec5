"""`g4v caption`, `g4v generate` and `g4v chat`: a trained run at work."""

import sys
from pathlib import Path

from absl import flags

from g4v_jax.commands.common import open_llm, open_run, parse, threshold_file, write_json
from g4v_jax.errors import UserError

DECLINED = 3  # exit status where the model does not do what it is asked
ANSWER = 256  # tokens of an answer of an LLM alone, at most


def caption(arguments: list[str]) -> int:
    """Describe each video given, but for those that a control stops."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("question", "What happens in this clip?", "What to ask of each clip.", flag_values=values)
        _audit(values)

    values, videos = parse("caption", arguments, extra=extra, config=False, workdir=True, json=True)
    if not videos:
        raise UserError("caption: name at least one video: g4v caption CLIP.mp4")
    if not values.question.strip():
        raise UserError("caption: --question is empty")
    from g4v_jax.data.text import Turn
    from g4v_jax.data.video import decode

    desk = _Desk(values)
    clips = [decode(path, *desk.shape.clip_shape, path) for path in videos]
    outcomes = desk.respond([[Turn("user", values.question, clips=[clip])] for clip in clips], [values.question] * len(clips))
    for path, outcome in zip(videos, outcomes):
        print(f"{path}: declined ({outcome.stopped_by}): {outcome.text}" if outcome.stopped_by else f"{path}: {outcome.text}")
    told = [{"text": o.text, "hazard": o.reply.hazard, "stopped_by": o.stopped_by, "scores": o.scores} for o in outcomes]
    write_json(values.json, dict(zip(videos, told)))
    return DECLINED if any(outcome.stopped_by for outcome in outcomes) else 0


def generate(arguments: list[str]) -> int:
    """Render a prompt into --out, marked and signed; where a control stops it, the blocked card is written there."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", "clip.mp4", "Video to write.", flag_values=values)
        flags.DEFINE_integer("seed", 0, "Of the noise.", flag_values=values)
        flags.DEFINE_bool("verbatim", False, "Send the prompt as it is, without 'Show me this:'.", flag_values=values)
        _controls(values)

    values, words = parse("generate", arguments, extra=extra, config=False, workdir=True, json=True)
    prompt = " ".join(words).strip()
    if not prompt:
        raise UserError('generate: the prompt is empty: g4v generate "a small red star moves left" --out=clip.mp4')
    from g4v_jax.data.text import Turn

    desk = _Desk(values)
    request = [Turn("user", prompt if values.verbatim else f"Show me this: {prompt.rstrip('.')}.")]
    (outcome,) = desk.respond([request], [prompt], values.seed)
    told = {"prompt": prompt, "text": outcome.text, "caption": outcome.caption, "scores": outcome.scores}
    told |= {"stopped_by": outcome.stopped_by}
    if outcome.clip is None:
        print(f"declined ({outcome.stopped_by or 'the model renders nothing'}): {outcome.text}")
        write_json(values.json, told | {"declined": True})
        return DECLINED
    desk.write(Path(values.out), outcome, prompt)
    declined = outcome.stopped_by is not None
    write_json(values.json, told | {"declined": declined, "out": values.out})
    if declined:
        print(f"{values.out}: the blocked card; declined ({outcome.stopped_by}): {outcome.text}")
        return DECLINED
    print(f"{values.out}: {outcome.caption}")
    return 0


def chat(arguments: list[str]) -> None:
    """Talk with a run, several turns; clips in by /clip FILE, clips out into --out."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", "chat", "Folder for rendered clips.", flag_values=values)
        _controls(values)

    values, _ = parse("chat", arguments, extra=extra, config=False, workdir=True)
    from g4v_jax.weights.folder import is_tower

    if is_tower(values.workdir):
        _talk(values.workdir)
        return
    from g4v_jax.data.text import Turn
    from g4v_jax.data.video import decode
    from g4v_jax.infer.assistant import to_render

    desk = _Desk(values)
    shape = desk.shape
    print("/clip FILE shows a clip with your next words, /new starts over, /quit ends.")
    turns: list = []
    clips: list = []
    rendered = 0
    for line in _lines():
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/new":
                turns, clips = [], []
            elif word == "/clip":
                clips.append(decode(rest.strip(), *shape.clip_shape, rest.strip()))
                print(f"(clip {len(clips)} goes with your next words)")
            elif word.startswith("/"):
                print("known: /clip FILE, /new, /quit")
            else:
                asked = [*turns, Turn("user", line, clips=clips)]
                (outcome,) = desk.respond([asked], [line], rendered + 1)
                if outcome.clip is not None:
                    rendered += 1
                    path = Path(values.out) / f"{rendered:03}.mp4"
                    desk.write(path, outcome, line)
                    print(f"{outcome.text} [{path}: {outcome.caption or 'blocked'}]".strip())
                else:
                    print(outcome.text)
                kept = outcome.stopped_by is None and outcome.caption is not None
                answer = to_render(asked, outcome.reply)[-1] if kept else Turn("assistant", outcome.text)
                turns, clips = [*asked, answer], []
        except UserError as error:  # a bad file or too long a talk does not end it
            print(f"error: {error}")


def _controls(values: flags.FlagValues) -> None:
    flags.DEFINE_string("secrets", None, "Folder of signing keys (default: WORKDIR/secrets).", flag_values=values)
    _audit(values)


def _audit(values: flags.FlagValues) -> None:
    flags.DEFINE_string("audit", None, "File of decisions (default: WORKDIR/audit.jsonl).", flag_values=values)


class _Desk:
    """A run behind its controls: it answers, records every decision, and hands out marked and signed clips, where the
    command has --secrets.
    """

    def __init__(self, values: flags.FlagValues):
        from g4v_jax.infer.guard import Guard
        from g4v_jax.provenance.delivery import open_secrets

        _, assistant, step = open_run(values.workdir)
        if not threshold_file(values.workdir).exists():
            print(f"{values.workdir}: has no hazard threshold of its own yet, {assistant.threshold} is used; g4v eval chooses "
                  "one where the data has hazards", file=sys.stderr)  # fmt: skip
        self.guard, self.shape = Guard(assistant), assistant.shape
        self.audit = Path(values.audit or Path(values.workdir) / "audit.jsonl")
        self.run = {"workdir": str(values.workdir), "step": step}
        self.name = f"{Path(values.workdir).name}@{step}"
        if "secrets" in values:
            self.secrets = open_secrets(values.secrets or Path(values.workdir) / "secrets")

    def respond(self, dialogues, prompts: list[str], seed: int | None = None) -> list:
        """Answer dialogues; each decision, and what a clip for its prompt will be marked with, is recorded first."""
        from g4v_jax.provenance.delivery import payload
        from g4v_jax.safety import audit

        outcomes = self.guard.respond(dialogues, seed)
        if cut := sum(outcome.reply.cut for outcome in outcomes):
            print(f"too long for a row of {self.shape.tokens} tokens: {cut} were cut from its middle", file=sys.stderr)
        for dialogue, prompt, outcome in zip(dialogues, prompts, outcomes):
            mark = None if outcome.clip is None else payload(outcome.clip, prompt, self.name)
            of = outcome, self.guard.assistant.threshold, self.guard.layers, self.run, mark
            audit.append(self.audit, audit.entry(dialogue[-1].text, *of))
        return outcomes

    def write(self, path: Path, outcome, prompt: str) -> None:
        """Write the clip of an outcome, marked and signed, for the prompt that was recorded with it."""
        from g4v_jax.infer.guard import FPS
        from g4v_jax.provenance.delivery import deliver

        deliver(path, outcome.clip, FPS, prompt, self.name, self.secrets)


def _talk(folder: str) -> None:
    """Talk with an imported LLM alone."""
    from g4v_jax.data.text import Turn
    from g4v_jax.infer.decode import conversation
    from g4v_jax.weights.folder import TowerFolder

    decoder, tokenizer = open_llm(folder)
    room = TowerFolder(Path(folder)).about["config"].get("max_position_embeddings", 2048)
    print("/new starts over, /quit ends.")
    turns: list = []
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            turns = []
            continue
        asked = [*turns, Turn("user", line)]
        prompt = conversation(asked, tokenizer)
        if len(prompt) + ANSWER > room:
            print(f"error: the talk has {len(prompt)} tokens, the model reads {room}: /new starts over")
            continue
        answer = tokenizer.decode(decoder.greedy([prompt], ANSWER, [tokenizer.stop])[0]).strip()
        print(answer)
        turns = [*asked, Turn("assistant", answer)]


def _lines():
    """Non-empty lines of the terminal or the standard input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

