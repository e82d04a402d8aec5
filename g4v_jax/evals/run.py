"""The whole evaluation of a run: captioning, generation and safety on a held-out split, one report; and attacks.

May hold what is measured, in which order, on which samples.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from g4v_jax.data import records, video
from g4v_jax.data.pack import RowShape
from g4v_jax.data.pipeline import FrameCache
from g4v_jax.data.questions import world_questions
from g4v_jax.data.records import Record
from g4v_jax.data.text import Turn
from g4v_jax.data.world.phrases import QUESTIONS, REQUESTS
from g4v_jax.errors import UserError, nearest
from g4v_jax.evals import attacks, captions, fidelity, motion, noise, pictures, question_sets, questions
from g4v_jax.evals import report, safety, talk, videos, words
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.evals.report import Report
from g4v_jax.evals.spec import EvalSpec
from g4v_jax.infer.assistant import Assistant
from g4v_jax.safety.gate import choose_threshold

CACHE_BYTES = 512 * 2**20
PICTURED = 16  # strips a sheet
LIVE = ("caption/rouge_l", "caption/attributes", "generation/answered", "generation/attributes", "denoising/t0.5",
        "denoising_bare/t0.5", "safety/f1", "safety/false_refusals")  # fmt: skip


def evaluate(
    assistant: Assistant, directory: str, spec: EvalSpec, out: Path, say: Callable[[str], None] = print
) -> Report:
    """Measure a model on records of the held-out split -> the report, not written yet; its picture sheets are in `out`.

    Where the split has harmful turns, the hazard threshold is chosen on the validation split first and left in the
    assistant. Groups that the data set lacks give no figures. Raises UserError where the split has no clips, and before
    anything is measured for weights that are not there.
    """
    found = Report(out, spec.split, records.summary(directory)["source"])
    found.counts = {part: str(count) for part, count in (
        ("caption", spec.captions), ("generation", spec.generations), ("qa", spec.questions),
        ("safety", (spec.safety, spec.per_kind, spec.hazards)))}  # fmt: skip
    found.asked = {"decoding": "greedy", "seed": assistant.spec.seed, "caption": list(QUESTIONS[spec.split]),
                   "generation": list(REQUESTS[spec.split])}  # fmt: skip
    encoders = _encoders(assistant, spec, found.notes)
    footage = _Footage(assistant.shape)
    held_out = safety.cases(directory, spec.split, spec.safety, footage.watched, spec.per_kind)
    if held_out:
        found.figures |= _tune(assistant, directory, spec, footage, found.notes, say)
        if spec.split == "validation":
            found.notes["safety"] = "flattered: the threshold was chosen on this very split"
    clips = list(records.read(directory, spec.split, "clips"))
    _captioning(assistant, directory, clips, spec, footage, found, say)
    if spec.questions:
        _asking(assistant, clips, spec, footage, found, say)
    _generation(assistant, clips, spec, encoders, footage, found, say)
    found.figures |= talk.measure(assistant, directory, spec.split)
    if held_out:
        _safety(assistant, directory, clips, held_out, spec, footage, found, say)
    return found


def live(directory: str, spec: EvalSpec, shape: RowShape) -> Callable[[Assistant], dict[str, float]]:
    """What is measured again and again while a run trains: a few samples of the validation split, values alone.

    The samples are read once, here.
    """
    footage = _Footage(shape)
    clips = captions.spread(records.read(directory, "validation", "clips"), spec.live)
    watched = [footage.watched(record, 0) for record in clips]
    cases = safety.cases(directory, "validation", spec.live, footage.watched)

    def measure(assistant: Assistant) -> dict[str, float]:
        figures, _ = captions.measure(assistant, clips, watched, "validation", meteor=False)
        figures |= videos.measure(assistant, clips, "validation")[0]
        figures |= noise.measure(assistant, clips, footage.rendered, "validation")
        if cases:
            figures |= safety.measure(assistant, cases)[0]
        return {f"live/{name}": figures[name].value for name in LIVE if name in figures}

    return measure


def attack(
    assistant: Assistant, directory: str, spec: EvalSpec, out: Path, say: Callable[[str], None] = print
) -> dict[str, Figure]:
    """Disguise harmful requests of the held-out split and count what each control stops; writes attack.json into `out`.

    Beside them, what the same controls stop of as many harmless dialogues without clips. Chooses the hazard threshold
    first, as `evaluate` does. Raises UserError where the split has no harmful request in words alone.
    """
    footage = _Footage(assistant.shape)
    notes: dict[str, str] = {}
    figures = _tune(assistant, directory, spec, footage, notes, say)
    harmful = safety.harmful_requests(directory, spec.split, spec.attacked)
    if not harmful:
        of = f" of kind {' or '.join(spec.attacked)}" if spec.attacked else ""
        raise UserError(f"{directory}: {spec.split} has no harmful requests{of} to disguise; build records with a safety set")
    chosen = captions.spread(harmful, spec.attacks)
    say(f"attacking with {len(chosen)} harmful requests in {len(attacks.ATTACKS)} disguises")
    asked = safety.cases(directory, spec.split, spec.attacks, footage.watched, spec.per_kind)
    harmless = [case.turns for case in asked if not case.hazard and case.carrier == "requests"]
    figures |= attacks.measure(assistant, chosen, captions.spread(harmless, spec.attacks))
    report.write(out / "attack.json", figures, spec.split, {"decoding": "greedy", "seed": assistant.spec.seed, "notes": notes})
    return figures


def judge_predictions(file: str, directory: str, split: str, out: Path) -> Report:
    """Judge captions from anywhere, lines {"id", "text"} for every clip of a split -> the report, not written yet.

    Raises UserError as `words.read_predictions` does, and where the split has no clips.
    """
    clips = list(records.read(directory, split, "clips"))
    found = Report(out, split, records.summary(directory)["source"], asked={"predictions": file})
    texts = words.read_predictions(file, [record.id for record in clips])
    found.figures, judged = captions.judged_texts(texts, clips, found.notes)
    found.score(judged)
    found.counts = {"caption": "predictions"}
    return found


def ask_public(
    assistant: Assistant, layout: str, files: Sequence[str], folder: str, out: Path, say: Callable[[str], None] = print
) -> dict[str, Figure]:
    """Ask the questions of a public set, `layout` of `question_sets.LAYOUTS` in its `files`; writes qa.json into `out`.

    Questions whose video is not in `folder` are left out and counted. Raises UserError for an unknown layout, another
    number of files than it has, malformed ones, a folder with no video of the set, and a video that cannot be read.
    """
    if layout not in question_sets.LAYOUTS:
        raise UserError(f"eval: --set: unknown {layout!r}{nearest(layout, question_sets.LAYOUTS)}")
    wanted = list(inspect.signature(question_sets.LAYOUTS[layout]).parameters)
    if len(files) != len(wanted):
        raise UserError(f"eval: --questions: {layout} has {len(wanted)} files ({', '.join(wanted)}), not {len(files)}")
    asked = question_sets.LAYOUTS[layout](*files)
    present = {path.stem: path for path in sorted(Path(folder).iterdir()) if path.is_file()} if Path(folder).is_dir() else {}
    here = [one for one in asked if one.video in present]
    if not here:
        raise UserError(f"{folder}: none of the {len(asked)} questions' videos is here, such as {asked[0].video}.mp4")
    say(f"asking {len(here)} questions; {len(asked) - len(here)} are about videos that are not in {folder}")
    shape = assistant.shape

    def clip(name: str):
        return video.decode(present[name], *shape.clip_shape, str(present[name]))

    measured = questions.measure(_answer(assistant), here, clip)
    figures = measured.figures | {"qa/left_out": Figure.exact(len(asked) - len(here), len(asked))}
    report.write(out / "qa.json", figures, layout, {"decoding": "greedy", **measured.prompts})
    return figures


def _answer(assistant: Assistant) -> Callable:
    """Answers to (clip, text) pairs, as `questions.measure` asks for them."""

    def answer(pairs):
        return [reply.text for reply in assistant.answer([[Turn("user", text, clips=[clip])] for clip, text in pairs])]

    return answer


class _Footage:
    """Clips of records as a model watches them, and as it is to render them; each is decoded once."""

    def __init__(self, shape: RowShape):
        self._cache, self._shape = FrameCache(CACHE_BYTES, records.footage), shape

    def watched(self, record: Record, video: int):
        return self._cache.footage(record, video, *self._shape.clip_shape)

    def rendered(self, record: Record) -> np.ndarray:
        return self._cache.footage(record, 0, *self._shape.target_shape)[0]


def _captioning(assistant, directory, clips, spec, footage, found, say) -> None:
    chosen = captions.spread(clips, spec.captions)
    say(f"captioning {len(chosen)} clips")
    watched = [footage.watched(record, 0) for record in chosen]
    figures, judged = captions.measure(assistant, chosen, watched, spec.split, spec.meteor, found.notes)
    found.figures |= figures
    if not spec.meteor:
        found.notes["caption/meteor"] = "not measured: evaluate.meteor is off"
    if any("group" in record.attributes for record in chosen):  # a large data set is not read whole without need
        known = [one for split in records.SPLITS for one in records.listed(directory, split, "clips")]
        found.figures |= captions.group_accuracy(judged, known)
    if "train_clips" in records.splits(directory):
        found.figures |= captions.copied(chosen, records.read(directory, "train", "clips"))
    found.score(judged)
    if spec.phrasings:
        figures, scores = captions.rephrased(assistant, judged, spec.split)
        found.figures |= figures
        found.scores |= scores
    found.show("captions", "Clips watched, and what the model says", [_captioned(one) for one in judged[:PICTURED]])


def _asking(assistant, clips, spec, footage, found, say) -> None:
    """Questions about clips of worlds whose attributes are known."""
    chosen = {record.id: record for record in captions.spread(clips, spec.questions)}
    asked = [one for record in chosen.values() for one in world_questions(record, spec.split)]
    if not asked:
        return
    say(f"asking {len(asked)} questions about {len(chosen)} clips")

    measured = questions.measure(_answer(assistant), asked, lambda name: footage.watched(chosen[name], 0))
    found.figures |= measured.figures
    found.scores |= measured.each
    found.clips |= measured.videos
    found.asked["questions"] = measured.prompts


def _encoders(assistant, spec, notes: dict[str, str]) -> list[fidelity.Encoder]:
    """What looks at renderings. Notes which weights are not given; those that are are read here, before hours of work."""
    encoders = [fidelity.Encoder("own", assistant.model.vision, assistant.params["vision"], assistant.mesh)]
    if spec.encoder:
        encoders.append(fidelity.Encoder.imported(spec.encoder))
    else:
        notes["generation/agreement_encoder"] = "not measured: evaluate.encoder names no imported vision tower (g4v import)"
    if spec.i3d:
        fidelity.check_i3d(spec.i3d, assistant.shape.target_frames)
    else:
        notes["generation/i3d_kernel (KVD), i3d_frechet (FVD)"] = (
            "not measured: evaluate.i3d names no weights; bring them with g4v data fetch i3d --out=DIR")
    if spec.clip:
        fidelity.check_clip(spec.clip)
    else:
        notes["generation/clipsim"] = "not measured: evaluate.clip names no folder of CLIP's weights"
    return encoders


def _generation(assistant, clips, spec, encoders, footage, found, say) -> None:
    chosen = captions.spread(clips, spec.generations)
    say(f"rendering {len(chosen)} clips")
    figures, judged = videos.measure(assistant, chosen, spec.split)
    real = np.stack([footage.rendered(record) for record in chosen])
    ours = np.stack([one.video for one in judged])
    found.figures |= figures | videos.own_captioner(assistant, judged)
    found.figures |= attribute_figures("reader", [videos.judge_video(*one) for one in zip(chosen, real)])
    found.figures |= noise.measure(assistant, chosen, footage.rendered, spec.split)
    found.score(judged)
    found.show("generations", "Requests, and what the model renders", [_rendered(one) for one in judged[:PICTURED]])

    sets = {"generation": (ours, real, chosen)}
    if spec.baselines:
        few = captions.spread(chosen, spec.baselines)
        say(f"rendering {len(few)} of them without a condition, and from copied captions")
        places = {record.id: place for place, record in enumerate(chosen)}
        for prefix, render in (("generation_bare", videos.bare), ("generation_copy", videos.copied)):
            one = render(assistant, few, spec.split)
            found.figures |= attribute_figures(prefix, [j.right for j in one])
            found.figures |= videos.own_captioner(assistant, one, prefix)
            sets[prefix] = np.stack([j.video for j in one]), real[[places[record.id] for record in few]], few
    answered = np.array([one.caption is not None for one in judged])
    if answered.any():  # the others are black
        found.figures |= motion.figures(ours[answered], real[answered], "generation/pixels")
    else:
        found.notes["generation/pixels"] = "not measured: no request was answered with a clip"
    if min(len(of) for _, _, of in sets.values()) < fidelity.MIN_CLIPS:
        found.notes["generation/*_kernel, *_frechet"] = f"not measured on fewer than {fidelity.MIN_CLIPS} clips"
    for prefix, (rendered, beside, of) in sets.items():
        whole = prefix == "generation"  # baselines are fewer clips
        for encoder in encoders:
            found.figures |= fidelity.agreement(encoder, rendered, beside, prefix, whole)
        if spec.i3d:
            found.figures |= fidelity.video_distances(spec.i3d, rendered, beside, prefix, whole)
        if spec.clip:
            found.figures |= fidelity.clipsim(spec.clip, rendered, [record.caption for record in of], prefix)


def _safety(assistant, directory, clips, held_out, spec, footage, found, say) -> None:
    say(f"asking {len(held_out)} harmful and harmless things")
    figures, asked = safety.measure(assistant, held_out)
    found.figures |= figures
    found.scores["safety/right"] = {case.id: float(blocked == case.hazard) for case, _, blocked in asked}
    found.clips |= {case.id: case.record for case, _, _ in asked}
    found.talks += [_talk(*one) for one in captions.spread(asked, 3 * PICTURED)]
    dangerous = records.listed(directory, spec.split, "hazards")
    checked = [*captions.spread(clips, spec.safety), *captions.spread(dangerous, spec.safety)]
    found.figures |= safety.outputs(assistant, checked, footage.rendered)
    if dangerous and spec.hazards:
        dangerous = [dangerous[i % len(dangerous)] for i in range(spec.hazards)]
        say(f"forcing {len(dangerous)} hazardous captions on the generator")
        figures, judged = videos.hazardous(assistant, dangerous, spec.split)
        found.figures |= figures
        name = "safety/gate_off"  # a record may have been forced several times
        found.scores[name] = {str(i): one.scores[name] for i, one in enumerate(judged)}
        strips = [_rendered(one) for one in judged[:PICTURED]]
        found.show("hazards", "Hazardous captions forced on the generator, gate off", strips)


def _tune(assistant, directory, spec, footage, notes, say) -> dict[str, Figure]:
    """Choose the hazard threshold on the validation split and leave it in the assistant; notes it where that cannot be."""
    cases = safety.cases(directory, "validation", spec.safety, footage.watched, spec.per_kind)
    if not cases:
        notes["safety/threshold"] = f"{assistant.threshold} was used: the validation split has no harmful turns to choose it by"
        return {}
    say("choosing the hazard threshold on the validation split")
    scores = assistant.hazards([case.turns for case in cases])
    labels = np.array([case.hazard for case in cases])
    if labels.all() or not labels.any():
        kind = "harmful" if labels.all() else "harmless"
        raise UserError(f"{directory}: all {len(cases)} validation turns that would be asked are {kind}, and a threshold lies "
                        "between both; label more of the others, or raise evaluate.safety")  # fmt: skip
    assistant.threshold = choose_threshold(scores, labels, assistant.spec.false_refusals)
    return {"safety/threshold": Figure.exact(assistant.threshold, len(cases))}


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
