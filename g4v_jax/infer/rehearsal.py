"""What a run says of clips today, as dialogues to learn from tomorrow, so that further training does not unlearn it.

Rehearsing a model's own answers keeps an ability where learning the data's again would change it (pseudorehearsal, Robins
1995; its words in place of its probabilities: sequence-level distillation, Kim & Rush 2016, section 3.2). May hold the
asking and the writing of that folder; how much of it is mixed in is a config's `data.mixture`, as "dialogue/said".
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from g4v_jax.data import records
from g4v_jax.data.folder import write_lines
from g4v_jax.data.text import Turn
from g4v_jax.data.world.phrases import QUESTIONS, pick
from g4v_jax.errors import UserError
from g4v_jax.infer.assistant import Assistant
from g4v_jax.infer.guard import is_refusal

KIND = "said"
TOGETHER = 64  # clips that are held decoded


def write(assistant: Assistant, directory: str, out: str | os.PathLike, seed: int = 0) -> dict[str, int]:
    """Ask about every training clip of the records in `directory` once, greedily -> {"said": dialogues, "left_out": clips}.

    Makes `out`/dialogues.jsonl and the clips it names. Left out are clips that the model refuses, has no words for, or
    answers with a clip. Raises UserError where `out` holds dialogues already, or the records no training clips.
    """
    out = Path(out)
    lines = out / "dialogues.jsonl"
    if lines.exists():
        raise UserError(f"{lines} is there already; choose another --out")
    clips = records.read(directory, "train", "clips")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rows = list(_rows(assistant, clips, out, np.random.default_rng(seed)))
    write_lines(lines, rows)
    return {"said": len(rows), "left_out": len(clips) - len(rows)}


def _rows(assistant, clips: records.Split, out: Path, rng: np.random.Generator) -> Iterator[dict]:
    with tqdm(total=len(clips), desc="asking", unit=" clips", disable=None) as progress:
        rest = iter(clips)
        while some := list(islice(rest, TOGETHER)):
            questions = [pick(rng, QUESTIONS["train"]) for _ in some]
            watched = [records.footage(record, 0, *assistant.shape.clip_shape) for record in some]
            replies = assistant.answer([[Turn("user", text, clips=[clip])] for text, clip in zip(questions, watched)])
            for record, question, reply in zip(some, questions, replies):
                if reply.text and reply.caption is None and not is_refusal(reply.text):
                    name = f"clips/{record.sha256[0]}.mp4"
                    (out / name).write_bytes(record.videos[0])
                    asked = {"role": "user", "text": question, "video": name}
                    yield {"turns": [asked, {"role": "assistant", "text": reply.text}], "split": "train", "kind": KIND}
            progress.update(len(some))
