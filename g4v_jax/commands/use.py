"""`g4v caption`, `g4v generate` and `g4v chat`: a trained run at work."""

import sys
from pathlib import Path

from absl import flags

from g4v_jax.commands.common import open_llm, open_run, parse, write_json
from g4v_jax.errors import UserError

DECLINED = 3  # exit status where the model does not do what it is asked
ANSWER = 256  # tokens of an answer of an LLM alone, at most
FPS = 4.0  # of written clips


def caption(arguments: list[str]) -> None:
    """Describe each video given."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("question", "What happens in this clip?", "What to ask of each clip.", flag_values=values)

    values, videos = parse("caption", arguments, extra=extra, config=False, workdir=True, json=True)
    if not videos:
        raise UserError("caption: name at least one video: g4v caption CLIP.mp4")
    if not values.question.strip():
        raise UserError("caption: --question is empty")
    from g4v_jax.data.text import Turn
    from g4v_jax.data.video import decode

    build, assistant = open_run(values.workdir)
    shape = build.shape
    clips = [decode(path, shape.clip_frames, shape.clip_size, path) for path in videos]
    replies = _answer(assistant, [[Turn("user", values.question, clips=[clip])] for clip in clips])
    for path, reply in zip(videos, replies):
        print(f"{path}: {reply.text}")
    write_json(values.json, {p: {"text": r.text, "hazard": r.hazard} for p, r in zip(videos, replies)})


def generate(arguments: list[str]) -> int:
    """Render a prompt into --out, unless the model declines."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", "clip.mp4", "Video to write.", flag_values=values)
        flags.DEFINE_integer("seed", 0, "Of the noise.", flag_values=values)
        flags.DEFINE_bool("verbatim", False, "Send the prompt as it is, without 'Show me this:'.", flag_values=values)

    values, words = parse("generate", arguments, extra=extra, config=False, workdir=True, json=True)
    prompt = " ".join(words).strip()
    if not prompt:
        raise UserError('generate: the prompt is empty: g4v generate "a small red star moves left" --out=clip.mp4')
    from g4v_jax.data.text import Turn

    _, assistant = open_run(values.workdir)
    request = [Turn("user", prompt if values.verbatim else f"Show me this: {prompt.rstrip('.')}.")]
    reply = _answer(assistant, [request])[0]
    outcome = {"prompt": prompt, "text": reply.text, "caption": reply.caption, "hazard": reply.hazard}
    blocked = reply.hazard > assistant.threshold
    if reply.caption is None or blocked:
        why = f"hazard score {reply.hazard:.2f}" if blocked else "the model renders nothing"
        print(f"declined ({why}): {reply.text or reply.caption}")
        write_json(values.json, outcome | {"declined": True})
        return DECLINED
    _write(assistant, request, reply, Path(values.out), values.seed)
    print(f"{values.out}: {reply.caption}")
    write_json(values.json, outcome | {"declined": False, "out": values.out})
    return 0


def chat(arguments: list[str]) -> None:
    """Talk with a run, several turns; clips in by /clip FILE, clips out into --out."""

    def extra(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", "chat", "Folder for rendered clips.", flag_values=values)

    values, _ = parse("chat", arguments, extra=extra, config=False, workdir=True)
    from g4v_jax.weights.folder import is_tower

    if is_tower(values.workdir):
        _talk(values.workdir)
        return
    from g4v_jax.data.text import Turn
    from g4v_jax.data.video import decode
    from g4v_jax.infer.assistant import to_render

    build, assistant = open_run(values.workdir)
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
                clips.append(decode(rest.strip(), build.shape.clip_frames, build.shape.clip_size, rest.strip()))
                print(f"(clip {len(clips)} goes with your next words)")
            elif word.startswith("/"):
                print("known: /clip FILE, /new, /quit")
            else:
                asked = [*turns, Turn("user", line, clips=clips)]
                reply = _answer(assistant, [asked])[0]
                blocked = reply.hazard > assistant.threshold
                if reply.caption is not None and not blocked:
                    rendered += 1
                    path = Path(values.out) / f"{rendered:03}.mp4"
                    _write(assistant, asked, reply, path, seed=rendered)
                    print(f"{reply.text} [{path}: {reply.caption}]".strip())
                elif blocked and reply.caption is not None:
                    print(f"I can't render that. (hazard score {reply.hazard:.2f})")
                else:
                    print(reply.text)
                answer = to_render(asked, reply)[-1] if reply.caption is not None else Turn("assistant", reply.text)
                turns, clips = [*asked, answer], []
        except UserError as error:  # a bad file or too long a talk does not end it
            print(f"error: {error}")


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


def _answer(assistant, dialogues) -> list:
    """Replies of the model; says what they were made without."""
    replies = assistant.answer(dialogues)
    cut = sum(reply.cut for reply in replies)
    if cut:
        print(f"too long for a row of {assistant.shape.tokens} tokens: {cut} were cut from its middle", file=sys.stderr)
    return replies


def _write(assistant, request, reply, path: Path, seed: int) -> None:
    from g4v_jax.data import video
    from g4v_jax.infer.assistant import to_render

    clips, _ = assistant.render([to_render(request, reply)], seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, clips[0], FPS)
