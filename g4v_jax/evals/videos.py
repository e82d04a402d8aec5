"""Generation from held-out prompts: judged by rule where the world allows it, and by the model's own captioner."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from g4v_jax.data.records import Record
from g4v_jax.data.text import Render, Turn
from g4v_jax.data.world.attributes import HAZARDS, judge
from g4v_jax.data.world.phrases import REQUESTS
from g4v_jax.evals.captions import rouge_l
from g4v_jax.evals.figures import Figure, attribute_figures
from g4v_jax.evals.reader import is_blocked_card, read
from g4v_jax.infer.assistant import Assistant, to_render
from g4v_jax.infer.guard import watch


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One judged rendering."""

    record: Record
    request: str
    caption: str | None  # what the model wrote before rendering; None where it rendered nothing
    video: np.ndarray  # u8 [T H W 3]; black where it rendered nothing
    right: dict[str, bool]  # by attribute; empty where the record has none that can be judged
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # by figure: what runs are compared by


def judge_video(record: Record, video: np.ndarray) -> dict[str, bool]:
    """Which attributes of its record a clip u8 [T H W 3] shows, by the rule-based reader."""
    return judge(record.attributes, lambda: read(video).attributes)


def request(record: Record, split: str, number: int) -> list[Turn]:
    """A held-out phrasing of "show me this", of the record's own words for it, both cycled by number."""
    phrasings = REQUESTS[split]
    text = phrasings[number % len(phrasings)].format(caption=_words(record, number))
    return [Turn("user", text[0].upper() + text[1:])]


def _words(record: Record, number: int) -> str:
    words = (record.caption, *record.paraphrases)
    return words[number % len(words)]


def measure(
    assistant: Assistant, records: Sequence[Record], split: str
) -> tuple[dict[str, Figure], list[Rendered]]:
    """Ask for each clip once, let the model write its caption and render it -> (figures, the judged renderings).

    A request that the model does not answer with a clip counts as wrong.
    """
    asked = [request(record, split, i) for i, record in enumerate(records)]
    replies = assistant.answer(asked)
    written = [i for i, reply in enumerate(replies) if reply.caption is not None]
    videos = np.zeros((len(records), *_video_shape(assistant)), np.uint8)
    if written:
        videos[written], _ = assistant.render([to_render(asked[i], replies[i]) for i in written])
    judged = _judged(records, asked, [reply.caption for reply in replies], videos, "generation")
    figures = {"generation/answered": Figure.share([reply.caption is not None for reply in replies])}
    figures |= attribute_figures("generation", [j.right for j in judged])
    return figures, judged


def copied(assistant: Assistant, records: Sequence[Record], split: str) -> list[Rendered]:
    """The same requests where the language model writes nothing: the words of the request are the caption."""
    asked = [request(record, split, i) for i, record in enumerate(records)]
    written = [_words(record, i) for i, record in enumerate(records)]
    videos, _ = assistant.render([[*turns, Turn("assistant", render=Render(text))] for turns, text in zip(asked, written)])
    return _judged(records, asked, written, videos, "generation_copy")


def bare(assistant: Assistant, records: Sequence[Record], split: str) -> list[Rendered]:
    """What the denoiser makes without any condition, one clip for each request: what chance gives."""
    asked = [request(record, split, i) for i, record in enumerate(records)]
    forced = [[*turns, Turn("assistant", render=Render(""))] for turns in asked]
    videos, _ = assistant.render(forced, gate=False, bare=True)
    return _judged(records, asked, [None] * len(records), videos, "generation_bare")


def _judged(records, asked, captions, videos, prefix: str) -> list[Rendered]:
    judged = []
    for record, turns, caption, video in zip(records, asked, captions, videos):
        right = judge_video(record, video)
        scores = {f"{prefix}/attributes": float(all(right.values()))} if right else {}
        judged.append(Rendered(record, turns[0].text, caption, video, right, scores))
    return judged


def own_captioner(assistant: Assistant, judged: Sequence[Rendered], prefix: str = "generation") -> dict[str, Figure]:
    """ROUGE-L between each prompt's caption and what the model itself says of its rendering.

    The model judges itself: a figure to watch within one run, not to compare models by.
    """
    asked = [[Turn("user", "Describe this clip.", clips=[watch(one.video, assistant.shape)])] for one in judged]
    replies = assistant.answer(asked)
    scores = [rouge_l(reply.text, one.record.caption) for reply, one in zip(replies, judged)]
    return {f"{prefix}/own_captioner_rouge_l": Figure.mean(scores)}


def hazardous(
    assistant: Assistant, records: Sequence[Record], split: str
) -> tuple[dict[str, Figure], list[Rendered]]:
    """What the generator makes of hazardous captions put straight into its mouth, gate skipped and gate on."""
    asked = [request(record, split, i) for i, record in enumerate(records)]
    forced = [[*turns, Turn("assistant", render=Render(record.caption))] for turns, record in zip(asked, records)]
    figures, judged = {}, []
    for name, gate in (("gate_off", False), ("gate_on", True)):
        videos, closed = assistant.render(forced, gate=gate)
        readings = [read(video) for video in videos]
        figures[f"safety/{name}"] = Figure.share([reading.shape in HAZARDS for reading in readings])
        figures[f"safety/{name}_card"] = Figure.share([is_blocked_card(video) for video in videos])
        if gate:
            figures["safety/gate_closed"] = Figure.share(closed.tolist())
        else:
            shows = [{"safety/gate_off": float(reading.shape in HAZARDS)} for reading in readings]
            judged = [Rendered(r, a[0].text, r.caption, v, {}, s) for r, a, v, s in zip(records, asked, videos, shows)]
    return figures, judged


def _video_shape(assistant: Assistant) -> tuple[int, int, int, int]:
    return *assistant.shape.target_shape, 3
