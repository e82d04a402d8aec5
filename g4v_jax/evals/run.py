"""The whole evaluation of a run: captioning, generation and safety on a held-out split, one JSON and one page; attacks."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from g4v_jax.data import records
from g4v_jax.data.pipeline import FrameCache
from g4v_jax.errors import UserError
from g4v_jax.evals import attacks, captions, pictures, safety, talk, videos
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.infer.assistant import Assistant
from g4v_jax.safety.gate import choose_threshold

PICTURED = 16  # strips a sheet
CACHE_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """What is measured, on how many samples."""

    split: str = "test"
    captions: int = 200
    meteor: bool = True  # beside the other metrics of captions: some 15 seconds, 2 GB and Java
    generations: int = 200
    hazards: int = 64
    safety: int = 60  # clips with and without hazards, each watched and asked for; of dialogues twice as many
    per_kind: int = 0  # dialogues of each kind in place of that
    attacks: int = 60  # harmful requests that are disguised in every way of `attacks.ATTACKS`


def evaluate(
    assistant: Assistant, directory: str, spec: EvalSpec, out: Path, say: Callable[[str], None] = print
) -> dict[str, Figure]:
    """Measure a model on records of the held-out split; write sheets and page into `out` -> figures by name.

    Where the split has harmful turns, the hazard threshold is chosen on the validation split first and left in the
    assistant. Groups that the data set lacks give no figures. Raises UserError where the split has no clips.
    """
    cache = FrameCache(CACHE_BYTES, records.footage)
    shape = assistant.shape

    def watched(record, video):
        return cache.footage(record, video, shape.clip_frames, shape.clip_size)

    def rendered(record):
        return cache.footage(record, 0, shape.target_frames, shape.target_size)[0]

    figures: dict[str, Figure] = {}
    sheets: dict[str, str] = {}
    talks: list[tuple] = []

    def show(name: str, title: str, strips: list) -> None:
        if strips:
            pictures.sheet(strips, out / f"{name}.png")
            sheets[title] = f"{name}.png"

    held_out = safety.cases(directory, spec.split, spec.safety, watched, spec.per_kind)
    if held_out:
        figures |= _tune(assistant, directory, spec, watched, say)

    clips = list(records.read(directory, spec.split, "clips"))
    chosen = captions.spread(clips, spec.captions)
    say(f"captioning {len(chosen)} clips")
    found, judged = captions.measure(assistant, chosen, [watched(r, 0) for r in chosen], spec.split, spec.meteor)
    figures |= found | captions.group_accuracy(judged, [one for split in records.SPLITS for one in records.listed(directory, split, "clips")])
    show("captions", "Clips watched, and what the model says", [_captioned(one) for one in judged[:PICTURED]])

    chosen = captions.spread(clips, spec.generations)
    say(f"rendering {len(chosen)} clips")
    found, judged = videos.measure(assistant, chosen, spec.split)
    figures |= found | videos.own_captioner(assistant, judged)
    show("generations", "Requests, and what the model renders", [_rendered(one) for one in judged[:PICTURED]])

    figures |= attribute_figures("reader", [videos.judge_video(record, rendered(record)) for record in chosen])

    figures |= talk.measure(assistant, directory, spec.split)

    if held_out:
        say(f"asking {len(held_out)} harmful and harmless things")
        found, asked = safety.measure(assistant, held_out)
        figures |= found
        dangerous = records.listed(directory, spec.split, "hazards")
        checked = [*captions.spread(clips, spec.safety), *captions.spread(dangerous, spec.safety)]
        figures |= safety.outputs(assistant, checked, rendered)
        talks = [_talk(*one) for one in captions.spread(asked, 3 * PICTURED)]
        dangerous = [dangerous[i % len(dangerous)] for i in range(spec.hazards)]
        say(f"forcing {len(dangerous)} hazardous captions on the generator")
        found, judged = videos.hazardous(assistant, dangerous, spec.split)
        figures |= found
        show("hazards", "Hazardous captions forced on the generator, gate off", [_rendered(j) for j in judged[:PICTURED]])

    write(out / "report.json", figures)
    as_dicts = {name: dataclasses.asdict(figure) for name, figure in figures.items()}
    pictures.page(out / "index.html", f"Evaluation of {out}", as_dicts, sheets, talks)
    return figures


def attack(
    assistant: Assistant, directory: str, spec: EvalSpec, out: Path, say: Callable[[str], None] = print
) -> dict[str, Figure]:
    """Disguise harmful requests of the held-out split and count what each control stops; writes attack.json into `out`.

    Chooses the hazard threshold first, as `evaluate` does. Raises UserError where the split has no harmful request in
    words alone.
    """
    cache = FrameCache(CACHE_BYTES, records.footage)
    shape = assistant.shape
    figures = _tune(assistant, directory, spec, lambda r, v: cache.footage(r, v, shape.clip_frames, shape.clip_size), say)
    harmful = safety.harmful_requests(directory, spec.split)
    if not harmful:
        raise UserError(f"{directory}: {spec.split} has no harmful requests to disguise; build records with a safety set")
    chosen = captions.spread(harmful, spec.attacks)
    say(f"attacking with {len(chosen)} harmful requests in {len(attacks.ATTACKS)} disguises")
    figures |= attacks.measure(assistant, chosen)
    write(out / "attack.json", figures)
    return figures


def _tune(assistant: Assistant, directory: str, spec: EvalSpec, watched, say) -> dict[str, Figure]:
    """Choose the hazard threshold on the validation split and leave it in the assistant."""
    cases = safety.cases(directory, "validation", spec.safety, watched, spec.per_kind)
    if not cases:
        return {}
    say("choosing the hazard threshold on the validation split")
    scores = safety.scores(assistant.answer([case.turns for case in cases]))
    labels = np.array([case.hazard for case in cases])
    assistant.threshold = choose_threshold(scores, labels, assistant.spec.false_refusals)
    return {"safety/threshold": Figure.exact(assistant.threshold, len(cases))}


def write(path: Path, figures: dict[str, Figure]) -> None:
    """A report as flat JSON: name -> {"value", "low", "high", "n"}; whole or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps({k: dataclasses.asdict(f) for k, f in sorted(figures.items())}, indent=1))
    temporary.rename(path)


def table(figures: dict[str, Figure]) -> str:
    """The report as aligned text."""
    width = max(map(len, figures))
    head = f"{'figure':{width}}   value   95 % interval        n"
    lines = [f"{k:{width}} {f.value:7.3f}  {f.low:7.3f} – {f.high:7.3f}  {f.n:5d}" for k, f in sorted(figures.items())]
    return "\n".join([head, *lines])


def _mark(right: dict[str, bool]) -> str:
    wrong = [name for name, ok in right.items() if not ok]
    return "" if not right else "  [right]" if not wrong else f"  [wrong: {', '.join(wrong)}]"


def _captioned(one: captions.Captioned):
    return pictures.strip(one.clip[0], [one.text + _mark(one.right), f"({one.record.caption})"])


def _rendered(one: videos.Rendered):
    return pictures.strip(one.video, [one.request, f"writes: {one.caption}{_mark(one.right)}"])


def _talk(case: safety.Case, reply, blocked: bool) -> tuple[str, str, str]:
    said = " / ".join(("[clip] " if turn.clips else "") + turn.text for turn in case.turns)
    answer = reply.text + (f" <video>{reply.caption}</video>" if reply.caption else "")
    verdict = ("blocked" if blocked else "answered") + (" (hazardous)" if case.hazard else " (safe)")
    return said, answer, f"{verdict}, hazard score {reply.hazard:.2f}"
