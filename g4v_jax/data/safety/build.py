"""The safety set as a folder: `captions.jsonl`, `dialogues.jsonl`, clips, and a card that tells what is in it.

May hold how the parts are put together. Anyone can make it again: texts come from public packages (`harmful`) and from
`harmless` and `answers`, hazardous clips are drawn by the built-in world, and all choices follow from one seed.

Kinds of dialogues (the field `kind`), each in every split unless said:

    advbench          a harmful request, refused
    built-in          the same, made of `harmful_doing` and of the frames of lookalikes
    harmbench, do-not-answer      the same from sets that are never learned from; test split alone
    lookalike         a harmless request in like words, answered; the test split's are about other matters than the others
    harmful-about-clip            a harmful request while a harmless clip is shown, refused
    harmless-about-clip           a harmless question about a harmless clip that looks like a hazard, answered
    harmless-about-hazard         a harmless question about a hazardous clip, refused
    advbench-reworded, built-in-reworded, lookalike-reworded      the same in other words; training and validation
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from g4v_jax.data.folder import write_lines
from g4v_jax.data.safety import answers, card, harmful, harmful_doing, harmless, rewordings
from g4v_jax.data.world.attributes import LOOKALIKES
from g4v_jax.data.world.make import make as make_world
from g4v_jax.data.world.phrases import QUESTIONS, REFUSALS, pick, sentence
from g4v_jax.errors import UserError

SPLITS = ("train", "validation", "test")
ABOUT_CLIP = {"train": 160, "validation": 40, "test": 60}  # dialogues of each kind about clips
FRAMES_EACH = 2  # of a built-in harmful request
OURS = re.compile("built-in|.*-reworded")  # kinds of harmful requests that may be left out
HARMLESS_SHARE = 1.05  # harmless dialogues of training and validation for each harmful one there
WORLD = dict(clips=400, hazards=200, dialogues=0)

Answer = Callable[[Sequence[str]], Sequence[str]]


def write(directory: str | os.PathLike, answer: Answer | None = None, seed: int = 0, processes: int = 2) -> dict:
    """Make the folder -> {"dialogues": {split: {kind: count}}, "clips": {split: count}, ...} as in card.json.

    `answer` gives a text for each harmless request of training, "" where it has none; without it a short general one
    is written. Raises UserError where the folder holds a set already, and what `harmful.read` and `world.make` raise.
    """
    directory = Path(directory)
    if (directory / "dialogues.jsonl").exists():
        raise UserError(f"{directory} holds a safety set already; choose another --out")
    requests = harmful.read(directory / "archives")
    make_world(directory / "world", **WORLD, seed=seed, processes=processes)
    clips = [json.loads(line) for line in (directory / "world/captions.jsonl").read_text().splitlines()]
    for row in clips:
        row["video"] = f"world/{row['video']}"
    rng = np.random.default_rng(seed)
    rows = []
    doing = _built_in(rng)
    for one in [*requests, *doing]:
        rows.append(_exchange(one.text, answers.refusal(one.text, rng), answers.compliance(one.text, rng), one.split, True, one.origin))
        if one.split != "test":
            known = rewordings.INFINITIVE.search(one.text)
            rows.append(_reworded(rows[-1], doing.get(one) or (known and known[1]), rng))
    rows = _apart(rows)
    for split in SPLITS:
        rows += _about_clips(split, [row for row in clips if row["split"] == split], requests, rng)
    rows += _lookalikes(rows, answer, rng)
    hazards = [row for row in clips if row["hazard"]]
    shown = {row["turns"][0].get("video") for row in rows} | {row["video"] for row in hazards}
    for row in clips:  # clips that nothing shows are not kept
        if row["video"] not in shown:
            (directory / row["video"]).unlink()
    summary = card.write(directory, rows, hazards)
    write_lines(directory / "captions.jsonl", hazards)
    write_lines(directory / "dialogues.jsonl", rows)
    for name in ("captions.jsonl", "dialogues.jsonl", "world.json"):
        (directory / "world" / name).unlink()
    shutil.rmtree(directory / "archives")
    return summary


def _built_in(rng: np.random.Generator) -> dict[harmful.Request, str]:
    """Requests for what `harmful_doing` lists, each in several frames, and what each asks to do in the infinitive."""
    made = {}
    for place, what in enumerate(rng.permutation(harmful_doing.DOING).tolist()):
        split = {8: "validation", 9: "test"}.get(place % 10, "train")
        frames = harmless.FRAMES["train" if split == "train" else "validation"]
        for i in rng.permutation(len(frames))[:FRAMES_EACH]:
            text = frames[i].format(doing=what)
            made[harmful.Request(text, "built-in", split)] = rewordings.infinitive(what)
    return made


def _lookalikes(rows: list[dict], answer: Answer | None, rng: np.random.Generator) -> list[dict]:
    """Harmless requests: enough to outnumber what is harmful in training and validation; of the test, all there are."""
    missing = Counter()
    for row in rows:
        missing[row["split"]] += HARMLESS_SHARE if row["hazard"] else -1
    order = list(rng.permutation(len(harmless.DOING)))
    held = {"train": order[: len(order) * 4 // 5], "validation": order[len(order) * 4 // 5 :]}
    made = []
    for split, doing in held.items():
        every = [(frame.format(doing=harmless.DOING[i]), harmless.DOING[i]) for i in doing for frame in harmless.FRAMES[split]]
        few = rng.permutation(len(every))[: math.ceil(missing[split] / 2)]  # each comes in other words too
        texts = dict(every[i] for i in few)  # -> what is done
        asked = list(texts)
        said = answer(asked) if answer and split == "train" else [pick(rng, answers.HELPFUL) for _ in asked]
        for text, reply in zip(asked, said):
            reply = reply or pick(rng, answers.HELPFUL)
            made.append(_exchange(text, reply, answers.refusal(text, rng), split, False, "lookalike"))
            made.append(_reworded(made[-1], rewordings.infinitive(texts[text]), rng))
    for text in harmless.TEST:
        made.append(_exchange(text, pick(rng, answers.HELPFUL), answers.refusal(text, rng), "test", False, "lookalike"))
    return made


def _reworded(row: dict, do: str | None, rng: np.random.Generator) -> dict:
    """An exchange once more, its request in other words. A refusal is another, a helpful answer stays."""
    user, last = row["turns"]
    text, lead_in = rewordings.reword(user["text"], do, row["split"], row["hazard"], rng)
    if row["hazard"]:
        last = last | {"text": answers.refusal(user["text"], rng), "rejected": answers.compliance(user["text"], rng)}
    before = [turn for asked, said in lead_in for turn in ({"role": "user", "text": asked}, {"role": "assistant", "text": said})]
    return row | {"turns": [*before, user | {"text": text}, last], "kind": f"{row['kind']}-reworded"}


def _apart(rows: list[dict]) -> list[dict]:
    """Harmful rows without those of ours that came near to a request of another split."""
    near = set()
    for split in SPLITS:
        inside = [i for i, row in enumerate(rows) if row["split"] == split and OURS.fullmatch(row["kind"])]
        outside = [row["turns"][-2]["text"] for row in rows if row["split"] != split]
        near |= {inside[i] for i, _ in harmful.near_pairs([rows[i]["turns"][-2]["text"] for i in inside], outside)}
    return [row for i, row in enumerate(rows) if i not in near]


def _about_clips(split: str, clips: list[dict], requests: list[harmful.Request], rng: np.random.Generator) -> list[dict]:
    """Requests and clips of which one may be harmful and the other not."""
    hazards = tuple(row for row in clips if row["hazard"])
    safe = tuple(row for row in clips if not row["hazard"])
    alike = tuple(row for row in safe if row["attributes"]["shape"] in LOOKALIKES)
    asked = tuple(one for one in requests if one.split == split and one.origin == "advbench")
    rows = []
    for _ in range(ABOUT_CLIP[split]):
        one, clip = pick(rng, asked), pick(rng, safe)
        refusal, compliance = answers.refusal(one.text, rng), answers.compliance(one.text, rng)
        rows.append(_exchange(one.text, refusal, compliance, split, True, "harmful-about-clip", clip))
        clip, question = pick(rng, alike), pick(rng, QUESTIONS[split])
        rows.append(_exchange(question, sentence(clip["caption"]), pick(rng, REFUSALS["clip"]), split, False, "harmless-about-clip", clip))
        clip, question = pick(rng, hazards), pick(rng, QUESTIONS[split])
        rows.append(_exchange(question, pick(rng, REFUSALS["clip"]), sentence(clip["caption"]), split, True, "harmless-about-hazard", clip))
    return rows


def _exchange(text: str, reply: str, rejected: str, split: str, hazard: bool, kind: str, clip: dict | None = None) -> dict:
    user = {"role": "user", "text": text} | ({"video": clip["video"]} if clip else {})
    turns = [user, {"role": "assistant", "text": reply, "rejected": rejected}]
    return {"turns": turns, "split": split, "hazard": hazard, "kind": kind}
