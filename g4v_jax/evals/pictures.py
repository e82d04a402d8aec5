"""Pictures and the page of a report: strips of frames with words under them."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ZOOM_SIDE = 96  # pixels of a shown frame
SHOWN_FRAMES = 5
TEXT_HEIGHT = 16


def strip(video: np.ndarray, lines: Sequence[str]) -> Image.Image:
    """Frames of a clip u8 [T H W 3] side by side, with lines of text below."""
    chosen = np.linspace(0, len(video) - 1, min(SHOWN_FRAMES, len(video))).round().astype(int)
    picture = Image.new("RGB", (SHOWN_FRAMES * (ZOOM_SIDE + 2), ZOOM_SIDE + TEXT_HEIGHT * len(lines) + 6), "white")
    for place, index in enumerate(chosen):
        frame = Image.fromarray(video[index]).resize((ZOOM_SIDE, ZOOM_SIDE), Image.Resampling.NEAREST)
        picture.paste(frame, (place * (ZOOM_SIDE + 2), 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, line in enumerate(lines):
        draw.text((2, ZOOM_SIDE + 2 + row * TEXT_HEIGHT), _fit(draw, font, line, picture.width), "black", font=font)
    return picture


def sheet(strips: Sequence[Image.Image], path: Path, columns: int = 2) -> None:
    """Strips in columns as one PNG."""
    width, height = max(s.width for s in strips), max(s.height for s in strips)
    rows = -(-len(strips) // columns)
    picture = Image.new("RGB", (columns * (width + 8), rows * (height + 8)), "white")
    for i, one in enumerate(strips):
        picture.paste(one, ((i % columns) * (width + 8), (i // columns) * (height + 8)))
    picture.save(path)


def page(
    path: Path, title: str, about: str, figures: dict[str, dict], notes: dict[str, str], sheets: dict[str, str],
    talks: Sequence[tuple],
) -> None:
    """One HTML file: the figures as a table, the sheets, and requests with their replies.

    `figures` as in report.json, with "beside", what is to be said beside one; `notes` figure -> why it is not there, or
    what it lacks; `sheets` caption -> file beside the page;
    `talks` (request, reply, verdict).
    """
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{f['value']:.3f}</td><td>{f['low']:.3f} – {f['high']:.3f}</td>"
        f"<td>{f['n']}</td><td>{html.escape(f['beside'])}</td></tr>"
        for name, f in sorted(figures.items())
    )
    pictures = "".join(f"<h2>{html.escape(text)}</h2><img src='{html.escape(name)}'>" for text, name in sheets.items())
    spoken = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in talk) + "</tr>" for talk in talks)
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em;max-width:1100px}td,th{padding:2px 12px;text-align:left}"
        "img{max-width:100%}</style>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>{pictures}"
        f"<h2>Requests and replies</h2><table><tr><th>user</th><th>reply</th><th>verdict</th></tr>{spoken}</table>"
        f"<h2>Figures</h2><table><tr><th>figure</th><th>value</th><th>95 % interval</th><th>n</th><th></th></tr>{rows}</table>"
        + "".join(f"<p>{html.escape(name)}: {html.escape(why)}</p>" for name, why in notes.items()),
        encoding="utf-8",
    )


def _fit(draw: ImageDraw.ImageDraw, font, line: str, width: int) -> str:
    line = " ".join(line.split())  # what a model writes may have line breaks
    while draw.textlength(line, font=font) > width - 4 and len(line) > 4:
        line = line[:-4] + "…"
    return line
