"""Edits that strangers make to a video, and how much of the mark survives each.

May hold the listed edits, each a function of frames and a random generator, and the measurement over them. The edits
are the ones that the mark is promised to survive, and a few harder ones, measured without a promise.
"""

import io
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageSequence

from g4v_jax.data import video
from g4v_jax.errors import UserError, nearest
from g4v_jax.provenance import watermark


class Change(NamedTuple):
    """An edit and the least share of clips whose payload must be read after it: 0 where nothing is promised."""

    apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]  # u8 [T H W 3] -> u8 [T' H' W' 3]
    least: float


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two u8 arrays of one shape: over all they hold; inf where equal."""
    error = np.mean(np.square(np.subtract(one, other, dtype=np.float32)), dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def robustness(
    clips: Iterable[np.ndarray], key: bytes, seed: int = 0, names: Iterable[str] | None = None
) -> dict[str, list[bool]]:
    """Mark every clip, write it to a file as clips are delivered, make each change alone, and look for the payload.

    Args: the clips, each u8 [T H W 3]; the key; the seed of payloads and edits; which of CHANGES (all by default).
    Returns: the name of each change -> for every clip, whether its payload was read.
    Raises UserError for an unknown name, for clips that `watermark.embed` refuses, and for sides that are not even.
    """
    names = list(CHANGES if names is None else names)
    for name in names:
        if name not in CHANGES:
            raise UserError(f"no change {name!r}{nearest(name, CHANGES)}")
    recovered = {name: [] for name in names}
    for index, clip in enumerate(clips):
        payload = int(np.random.default_rng([seed, index]).integers(2**32))
        marked = _written(watermark.embed(clip, payload, key))
        for name in names:
            rng = np.random.default_rng([seed, index, list(CHANGES).index(name)])
            found = watermark.detect(CHANGES[name].apply(marked, rng), key)
            recovered[name].append(found.payload == payload)
    return recovered


def _written(frames: np.ndarray) -> np.ndarray:
    """The frames as they are in a file that the program writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write(path, frames, 12)
        return video.frames(path, path.name, len(frames))


def _h264(crf: int) -> Callable:
    """Encode as H.264 at a constant rate factor, and decode."""

    def apply(frames, rng):
        frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # 4:2:0 needs even sides
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=12)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            stream.thread_count = 1
            stream.options = {"crf": str(crf), "preset": "medium"}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode())
        file.seek(0)
        with av.open(file) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    return apply


def _resized(frames: np.ndarray, height: int, width: int, how: Image.Resampling) -> np.ndarray:
    """u8 [T H W 3] -> u8 [T height width 3]."""
    return np.stack([np.asarray(Image.fromarray(picture).resize((width, height), how)) for picture in frames])


def _scale(factor: float, how: Image.Resampling) -> Callable:
    return lambda frames, rng: _resized(frames, *(round(side * factor) for side in frames.shape[1:3]), how)


def _crop(share: float, back: bool = False) -> Callable:
    """Cut `share` of the height and of the width away, at a random place; `back` scales to the first size."""

    def apply(frames, rng):
        height, width = frames.shape[1:3]
        rows, columns = round(height * (1 - share)), round(width * (1 - share))
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        cut = frames[:, top : top + rows, left : left + columns]
        return _resized(cut, height, width, Image.Resampling.BICUBIC) if back else cut

    return apply


def _drop(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Leave 30 % of the frames out, at random."""
    kept = rng.permutation(len(frames))[: max(1, round(len(frames) * 0.7))]
    return frames[np.sort(kept)]


def _light(gain: float, pivot: float) -> Callable:
    """Multiply the distance from the grey level `pivot`."""
    return lambda frames, rng: np.clip((frames - pivot) * gain + pivot + 0.5, 0, 255).astype(np.uint8)


def _gif(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One palette of 256 colours for the whole clip, Floyd-Steinberg dithering, through a GIF file."""
    palette = Image.fromarray(frames.reshape(-1, *frames.shape[2:])).quantize(256)
    pictures = [Image.fromarray(p).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for p in frames]
    file = io.BytesIO()
    pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], duration=80)
    with Image.open(file) as gif:
        return np.stack([np.asarray(picture.convert("RGB")) for picture in ImageSequence.Iterator(gif)])


def _then(first: Callable, second: Callable) -> Callable:
    return lambda frames, rng: second(first(frames, rng), rng)


_LINEAR, _CUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

CHANGES = {
    "none": Change(lambda frames, rng: frames, 0.95),
    "h264 crf 18": Change(_h264(18), 0.95),
    "h264 crf 23": Change(_h264(23), 0.95),
    "h264 crf 28": Change(_h264(28), 0.95),
    "h264 crf 32": Change(_h264(32), 0.85),
    "scale 0.5 bilinear": Change(_scale(0.5, _LINEAR), 0.95),
    "scale 0.5 bicubic": Change(_scale(0.5, _CUBIC), 0.95),
    "scale 0.75 bilinear": Change(_scale(0.75, _LINEAR), 0.95),
    "scale 0.75 bicubic": Change(_scale(0.75, _CUBIC), 0.95),
    "scale 1.5 bilinear": Change(_scale(1.5, _LINEAR), 0.95),
    "scale 1.5 bicubic": Change(_scale(1.5, _CUBIC), 0.95),
    "scale 2 bilinear": Change(_scale(2.0, _LINEAR), 0.95),
    "scale 2 bicubic": Change(_scale(2.0, _CUBIC), 0.95),
    "crop 10 %": Change(_crop(0.1), 0.95),
    "crop 20 %": Change(_crop(0.2), 0.85),
    "every 2nd frame": Change(lambda frames, rng: frames[::2], 0.95),
    "30 % of frames dropped": Change(_drop, 0.95),
    "brightness -20 %": Change(_light(0.8, 0), 0.95),
    "brightness +20 %": Change(_light(1.2, 0), 0.95),
    "contrast x0.7": Change(_light(0.7, 127.5), 0.95),
    "contrast x1.3": Change(_light(1.3, 127.5), 0.95),
    "gif": Change(_gif, 0.95),
    "crop 10 % and resized back": Change(_crop(0.1, back=True), 0),
    "crop 20 % and resized back": Change(_crop(0.2, back=True), 0),
    "scale 0.5 and h264 crf 23": Change(_then(_scale(0.5, _CUBIC), _h264(23)), 0),
}
