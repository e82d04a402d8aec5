"""A small folder of clips, captions and dialogues for the data tests: each clip is one flat colour that brightens."""

import json
from pathlib import Path

import numpy as np

from g4v_jax.data import video

TEXTS = ("a red wall brightens", "a green wall brightens", "a blue wall brightens", "what is this", "show me, please")


def frames(level: int, count: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """u8 [count height width 3]: frame k is grey of `level + 5 k`."""
    values = np.arange(level, level + 5 * count, 5, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(path: Path, clips: int = 12, hazards: int = 4, dialogues: int = 6) -> Path:
    """Write the folder; every split has clips, only `train` has hazards and dialogues."""
    rows = []
    for number in range(clips + hazards):
        video.write(path / f"clips/{number}.mp4", frames(10 * number), 8)
        rows.append(
            {
                "video": f"clips/{number}.mp4",
                "caption": f"{TEXTS[number % 3]} at level {number}",
                "paraphrases": [f"level {number}", f"a wall number {number}"],
                "split": "train" if number >= clips else ("train", "train", "validation", "test")[number % 4],
                "hazard": number >= clips,
            }
        )
    write_lines(path / "captions.jsonl", rows)
    talks, train = [], [row["video"] for row in rows if row["split"] == "train" and not row["hazard"]]
    for number in range(dialogues):
        answer = {"role": "assistant", "text": "", "render": {"caption": "a wall", "video": train[number % len(train)]}}
        turns = [
            {"role": "user", "text": f"what is in clip {number}?", "video": train[(number + 1) % len(train)]},
            {"role": "assistant", "text": "a wall"},
            {"role": "user", "text": "show me another"},
            answer if number % 2 else {"role": "assistant", "text": "no, sorry"},
        ]
        kind = "short" if number % 3 == 2 else "talk"
        talks.append({"turns": turns, "split": "train", "hazard": number % 2 == 0, "kind": kind})
    write_lines(path / "dialogues.jsonl", talks)
    return path
