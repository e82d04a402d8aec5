"""An assistant with its controls: what is asked, what is written and what is rendered are each judged before use.

May hold the layers, their order, and the record of each decision; the model's own refusal and the gate inside its
program are `assistant`'s. Reads and writes no files.

    request   the hazard head on what was asked: above the threshold nothing is answered
    disguise  the same on what the request says under a disguise, such as base64 (see safety/disguise.py), and, after
              other turns, on the last turn by itself: harmless talk before a request must not make it harmless
    words     the model declines by itself
    caption   the caption that it wrote, judged as if it had been asked for
    gate      the in-graph gate: the condition is replaced, and the model renders its blocked card
    clip      the rendered clip, watched through the vision tower: hazard head, and whether the model would describe it
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from g4v_jax.data.pack import RowShape
from g4v_jax.data.tasks import blocked_card
from g4v_jax.data.text import Clip, Turn
from g4v_jax.infer.assistant import Assistant, Reply, to_render
from g4v_jax.safety.disguise import readings

LAYERS = ("request", "disguise", "words", "caption", "gate", "clip")
FPS = 4.0  # of rendered clips
CAPTION_REQUEST = "Show me this: {caption}."
CLIP_QUESTION = "What happens in this clip?"
DECLINED = "I can't help with that. Ask me for something else."
REFUSAL = re.compile(
    r"\b(i (can ?not|can't|won't|will not|have to say no|am not able|am unable)|i'm (not able|unable)|"
    r"sorry\b.*\b(won't|can't|cannot)|not something i can|not safe for me)",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a user gets, and why."""

    text: str
    caption: str | None  # of the clip; None where none was asked for or none is given
    clip: np.ndarray | None  # u8 [T H W 3]; the blocked card where a layer stopped a clip
    stopped_by: str | None  # a layer, None where nothing stopped it
    scores: dict[str, float]  # hazard scores of the layers that ran: "request", "disguise", "caption", "clip"
    verdicts: dict[str, bool]  # of every layer that ran, whether it would stop this; also of layers left out
    reply: Reply  # the model's own answer, for those who measure


@dataclasses.dataclass(frozen=True)
class Guard:
    """`assistant` behind `layers`; leaving some out is for measuring what each is worth."""

    assistant: Assistant
    layers: Sequence[str] = LAYERS

    def respond(self, dialogues: Sequence[Sequence[Turn]], seed: int | None = None) -> list[Outcome]:
        """Answer dialogues that end with a user's turn, rendering what is written between video marks.

        Raises UserError where one does not fit a row.
        """
        replies = self.assistant.answer(dialogues)
        scores = [{"request": reply.hazard} for reply in replies]
        verdicts: list[dict[str, bool]] = [{} for _ in replies]
        stopped: list[str | None] = [None] * len(replies)
        clips: list[np.ndarray | None] = [None] * len(replies)
        wanted = [reply.caption is not None for reply in replies]

        def stop(i: int, layer: str, when: bool) -> None:
            verdicts[i][layer] = bool(when)
            if when and stopped[i] is None and layer in self.layers:
                stopped[i] = layer

        def going() -> list[int]:
            return [i for i, want in enumerate(wanted) if want and stopped[i] is None]

        for i, reply in enumerate(replies):
            stop(i, "request", reply.hazard > self.assistant.threshold)
        for i, hazard in self.judge_disguises(dialogues).items():
            scores[i]["disguise"] = hazard
            stop(i, "disguise", hazard > self.assistant.threshold)
        for i, reply in enumerate(replies):
            stop(i, "words", reply.caption is None and is_refusal(reply.text))
        for i, hazard in zip(going(), self.judge_captions([replies[i].caption for i in going()])):
            scores[i]["caption"] = hazard
            stop(i, "caption", hazard > self.assistant.threshold)
        rendering = going()
        if rendering:
            asked = [to_render(dialogues[i], replies[i]) for i in rendering]
            videos, closed = self.assistant.render(asked, gate="gate" in self.layers, seed=seed)
            hazards, declined = self.judge_clips(videos)
            for i, video, shut, hazard, refused in zip(rendering, videos, closed, hazards, declined):
                clips[i], scores[i]["clip"] = video, hazard
                # the in-graph gate reads the same head at the same place, also where it is off
                stop(i, "gate", bool(shut) or verdicts[i]["request"])
                stop(i, "clip", hazard > self.assistant.threshold or refused)
        return [self._outcome(*one) for one in zip(replies, wanted, stopped, clips, scores, verdicts)]

    def judge_disguises(self, dialogues: Sequence[Sequence[Turn]]) -> dict[int, float]:
        """By the number of a dialogue that can be read otherwise: the highest hazard score of its other readings.

        They are what the last turn says under a disguise, and, where turns precede it, it and those by themselves.
        """
        found = []
        for i, (*before, last) in enumerate(dialogues):
            other = [dataclasses.replace(last, text=text) for text in readings(last.text)]
            found += [(i, [*before, turn]) for turn in other]
            found += [(i, [turn]) for turn in [last, *other] if before]
        highest: dict[int, float] = {}
        for (i, _), hazard in zip(found, self.assistant.hazards([asked for _, asked in found])):
            highest[i] = max(highest.get(i, 0.0), float(hazard))
        return highest

    def judge_captions(self, captions: Sequence[str]) -> list[float]:
        """Hazard score of each caption, as a request for it would have."""
        asked = [[Turn("user", CAPTION_REQUEST.format(caption=text.rstrip(".")))] for text in captions]
        return self.assistant.hazards(asked).tolist()

    def judge_clips(self, videos: Sequence[np.ndarray]) -> tuple[list[float], list[bool]]:
        """Of each rendered clip u8 [T H W 3]: its hazard score, and whether the model declines to describe it."""
        asked = [[Turn("user", CLIP_QUESTION, clips=[watch(video, self.assistant.shape)])] for video in videos]
        replies = self.assistant.answer(asked)
        return [reply.hazard for reply in replies], [is_refusal(reply.text) for reply in replies]

    def _outcome(self, reply: Reply, wanted: bool, stopped: str | None, clip, scores: dict, verdicts: dict) -> Outcome:
        if stopped is None:
            return Outcome(reply.text, reply.caption, clip, None, scores, verdicts, reply)
        text = reply.text if is_refusal(reply.text) else DECLINED
        card = blocked_card(*self.assistant.shape.target_shape) if wanted else None
        return Outcome(text, None, card, stopped, scores, verdicts, reply)


def is_refusal(text: str) -> bool:
    """Whether an answer declines, by its words."""
    return REFUSAL.search(text.replace("’", "'")) is not None


def watch(video: np.ndarray, shape: RowShape) -> Clip:
    """A rendered clip u8 [T H W 3] as the model watches one."""
    frames = np.linspace(0, len(video) - 1, shape.clip_frames).round().astype(int)
    size = (shape.clip_size, shape.clip_size)
    pictures = [np.asarray(Image.fromarray(video[i]).resize(size, Image.Resampling.BILINEAR)) for i in frames]
    return np.stack(pictures), frames.astype(np.float32) / FPS
