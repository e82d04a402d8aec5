"""Ordinary talk, for an LLM that must not forget how: people's conversations.

May hold the reading of the collection and the writing of `dialogues.jsonl`. Training splits and held-out ones are
different talks, so that perplexity on the latter measures how ordinary language is kept. Source: chitchat-dataset (MIT),
7,168 talks.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from g4v_jax.data import sources
from g4v_jax.data.folder import split_of, write_lines
from g4v_jax.errors import UserError

TURN = 300  # characters of a turn, at most
TURNS = 6  # of a conversation, at most; at least two thirds of them
PLAIN = re.compile(r"[\x20-\x7e\u2018\u2019\u201c\u201d]+")
ODD = re.compile(r"https?:|www\.|@\w|<|>")
KIND = "conversation"


def write(directory: str | os.PathLike, train: int = 2000, held_out: int = 120) -> dict:
    """Make `directory`/dialogues.jsonl: `train` conversations to train on, `held_out` in each held-out split, or all there are.

    Returns {"train", "validation", "test"} counts. Raises UserError where the folder holds them already, and all that
    `sources.bring_file` raises.
    """
    directory = Path(directory)
    out = directory / "dialogues.jsonl"
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    wanted = {"train": train, "validation": held_out, "test": held_out}
    rows, counts = [], dict.fromkeys(wanted, 0)
    for name, turns in _talks(sources.bring_file(sources.CHITCHAT, directory / "archives")):
        split = split_of(name)
        if counts[split] < wanted[split] and len(turns) >= TURNS * 2 // 3:
            rows.append(_row(turns[: min(TURNS, len(turns) // 2 * 2)], split))
            counts[split] += 1
    write_lines(out, rows)
    return counts


def _row(texts: Sequence[str], split: str) -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "text": text} for i, text in enumerate(texts)]
    return {"turns": turns, "split": split, "kind": KIND}


def _talks(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, texts of the turns) of the conversations in plain words, in the order of their names' hashes."""
    held = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(held, key=_hash):
        turns = [" ".join(" ".join(m["text"] for m in turn).split()) for turn in held[name]["messages"]]
        plain = [bool(PLAIN.fullmatch(t)) and not ODD.search(t) and len(t) <= TURN for t in turns]
        end = plain.index(False) if False in plain else len(turns)
        if end:
            yield name, turns[:end]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
