"""How well the invisible mark holds: after each edit, on clips without a mark, and how visible it is.

May hold the measure on files of clips; the mark and the edits are `provenance`'s.
"""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from g4v_jax.data import video
from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure
from g4v_jax.provenance import changes, watermark
from g4v_jax.provenance.delivery import KEY_BYTES, LOOKED_AT, enlarge


MAX_FALSE_POSITIVES = 1e-3


def measure(
    paths: Sequence[str], trials: int, edited: int | None = None, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Figure]:
    """Mark clips and change them in every way of `changes.CHANGES`; look for marks of `trials` keys in unmarked clips.

    `edited`: how many of the clips are marked, spread over all of them; None: all. Each is looked at unmarked.
    "watermark/{change}": share of clips whose 32 bits were read; "watermark/false_positives"; "watermark/psnr_db": of
    the mark, before it is encoded. Clips are enlarged first and encoded once marked, as they are delivered. Keys are
    drawn anew each time, payloads and edits from `seed`. Raises UserError for no clips, and for a file that is no
    readable clip.
    """
    if not paths:
        raise UserError("watermark measure: name at least one clip: g4v watermark measure CLIP.mp4 ...")
    key = secrets.token_bytes(KEY_BYTES)
    read: dict[str, list[bool]] = {name: [] for name in changes.CHANGES}
    ratios, wrong = [], []
    edited = min(edited or len(paths), len(paths))
    for number, path in enumerate(paths):
        clip = enlarge(video.frames(Path(path), str(path), LOOKED_AT))
        if _share(edited, number, len(paths)):
            for name, hits in changes.robustness([clip], key, seed + number).items():
                read[name] += hits
            ratios.append(changes.psnr(clip, watermark.embed(clip, number, key)))
        looks = _share(trials, number, len(paths))
        wrong += [watermark.detect(clip, secrets.token_bytes(KEY_BYTES)).found for _ in range(looks)]
        if (number + 1) % 50 == 0:
            say(f"{number + 1} of {len(paths)} clips")
    figures = {f"watermark/{name}": Figure.share(hits) for name, hits in read.items()}
    if wrong:
        figures["watermark/false_positives"] = Figure.share(wrong)
    figures["watermark/psnr_db"] = Figure.mean(ratios)
    figures["watermark/psnr_db_least"] = Figure.exact(min(ratios), len(ratios))
    return figures


def missed(figures: dict[str, Figure]) -> list[str]:
    """Names of figures that break a promise: fewer marks read than `changes.CHANGES` says, more found where none is, or a
    mark that shows more than `watermark.MIN_PSNR` allows.
    """
    names = [name for name, change in changes.CHANGES.items() if figures[f"watermark/{name}"].value < change.least]
    wrong = figures.get("watermark/false_positives")
    if wrong and wrong.value > MAX_FALSE_POSITIVES:
        names.append("false_positives")
    if figures["watermark/psnr_db_least"].value < watermark.MIN_PSNR:
        names.append("psnr_db_least")
    return names


def _share(whole: int, number: int, parts: int) -> int:
    """What of a whole falls to part `number` of `parts`, so that the parts add up and differ by one at most."""
    return whole * (number + 1) // parts - whole * number // parts
