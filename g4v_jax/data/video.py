"""Video files: decode a few frames of a clip safely, count its frames, write one.

May hold what touches PyAV. Files come from strangers: sizes are bounded before anything is decoded, a file cannot
make the demuxer open another one, and what cannot be read in full raises UserError with the file's name. The
interpreter is free while PyAV decodes, so callers run many clips in threads; one clip uses one thread.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter

from g4v_jax.errors import UserError

MAX_PIXELS = 4096 * 4096  # of one frame
MAX_FILE = 4 * 2**30  # bytes of a clip: its packets are held, still compressed
MAX_HELD = 2**30  # bytes of the frames that `frames` gives
MAX_FRAMES = 36_000  # of one clip: ten minutes at 60 frames a second
CONTAINERS = "mov,matroska,webm,avi,mpegts,gif"  # no playlists: those open other files and addresses


class Probe(NamedTuple):
    """What `probe` found out by decoding a whole clip."""

    frames: int
    seconds: float  # from the first frame to the last
    width: int
    height: int


def decode(
    data: bytes | str | os.PathLike, frames: int, height: int, width: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decode `frames` frames spread evenly over the whole clip, its first and last included.

    Args: the file's bytes or path; the number of frames T; the height and width in pixels that each upright frame
    is squashed to; the name to use in errors.
    Returns: u8 [T height width 3] RGB and f32 [T], the seconds of each frame from the first frame.
    Raises UserError where it is not a whole, readable video of at least T frames.
    """
    with _open(data, name) as (container, stream):
        packets, times = _packets(container, stream, name)
        if len(times) < frames:
            raise UserError(f"{name}: {len(times)} frames, {frames} wanted; use a longer clip or fewer frames")
        wanted = np.abs(np.linspace(0, times[-1], frames)[:, None] - times).argmin(axis=1)
        scaler = VideoReformatter()  # one for all frames: a new one for each costs ten times as much
        pictures = {}
        for index, frame in _frames(packets, len(times), name):
            if index in wanted:
                across, down = (height, width) if frame.rotation % 180 else (width, height)  # as it lies in the file
                small = scaler.reformat(
                    frame, width=across, height=down, format="rgb24", interpolation="BILINEAR", threads=1
                )
                pictures[index] = np.rot90(small.to_ndarray(), frame.rotation // 90)
        return np.stack([pictures[index] for index in wanted]), times[wanted].astype(np.float32)


def probe(data: bytes | str | os.PathLike, name: str) -> Probe:
    """Decode a whole clip and say what it is. Raises UserError where it is not a whole, readable video."""
    with _open(data, name) as (container, stream):
        packets, times = _packets(container, stream, name)
        for _ in _frames(packets, len(times), name):
            pass
        return Probe(len(times), float(times[-1]), stream.width, stream.height)


def frames(data: bytes | str | os.PathLike, name: str, limit: int) -> np.ndarray:
    """The first frames of a clip in its own size: u8 [T H W 3], at most `limit`, and as many as MAX_HELD bytes hold.

    Raises UserError as `probe` does.
    """
    with _open(data, name) as (container, stream):
        packets, times = _packets(container, stream, name)
        scaler, pictures = VideoReformatter(), np.empty((0,))
        for index, frame in _frames(packets, len(times), name):
            if index == 0:
                size = (frame.height, frame.width, 3)
                pictures = np.empty((min(limit, len(times), MAX_HELD // int(np.prod(size))), *size), np.uint8)
            if index < len(pictures):
                picture = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
                if picture.shape != pictures.shape[1:]:
                    raise UserError(f"{name}: its frames change size; write it again in one size")
                pictures[index] = picture
        return pictures


def write(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
    """Write u8 [T H W 3] RGB frames as H.264 in mp4, whole or not at all. H and W must be even."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"write: frames are {frames.dtype} {frames.shape}; expected uint8 [T, H, W, 3]")
    path = Path(path)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"{path}: H.264 needs an even width and height, not {width}x{height}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.thread_count = 1  # the same bytes on every machine
            # slower presets use macroblock trees, whose output differs a little from run to run
            stream.options = {"crf": "18", "preset": "superfast"}
            for picture in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open(data: bytes | str | os.PathLike, name: str) -> Iterator[tuple]:
    """The container and its video stream, with every bound set."""
    try:
        # Always a file object: a path handed to the library could be an address or a protocol of its own.
        file = io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror})") from None
    with file:
        try:
            size = file.seek(0, io.SEEK_END)
            if not size:
                raise UserError(f"{name}: the file is empty")
            if size > MAX_FILE:
                raise UserError(f"{name}: {size} bytes; the limit is {MAX_FILE}")
            file.seek(0)
            # Opening decodes a frame to learn the format, so the bound must be there already ...
            bound = {"max_pixels": str(MAX_PIXELS)}
            container = av.open(file, options={"format_whitelist": CONTAINERS}, stream_options=[bound])
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{name}: not a readable video ({getattr(error, 'strerror', None) or error})") from error
        with container:
            if not container.streams.video:
                raise UserError(f"{name}: no video stream in it; give a video file")
            stream = container.streams.video[0]
            if not 0 < stream.width * stream.height <= MAX_PIXELS:
                raise UserError(f"{name}: {stream.width}x{stream.height} pixels; the limit is {MAX_PIXELS} in all")
            # ... but it does not reach the decoder that reads the frames.
            stream.codec_context.options = bound
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream


def _packets(container, stream, name: str) -> tuple[list[av.Packet], np.ndarray]:
    """All packets, still compressed, and the seconds of each frame from the first, in display order: f64 [n]."""
    packets, stamps = [], []
    try:
        for packet in container.demux(stream):
            packets.append(packet)
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
            if len(stamps) > MAX_FRAMES:
                raise UserError(f"{name}: more than {MAX_FRAMES} frames; cut it into shorter clips")
    except av.error.FFmpegError as error:
        raise UserError(f"{name}: damaged after {len(stamps)} frames ({error.strerror})") from error
    if not stamps:
        raise UserError(f"{name}: no frames in it; the file is empty or damaged")
    if None in stamps:  # containers without time stamps have a constant rate
        return packets, np.arange(len(stamps)) / float(stream.guessed_rate or 25)
    times = np.sort(np.array(stamps, np.int64))
    return packets, (times - times[0]) * float(stream.time_base)


def _frames(packets: list[av.Packet], count: int, name: str) -> Iterator[tuple[int, av.VideoFrame]]:
    """Number and frame of every frame in the order of display; UserError unless there are exactly `count`."""
    done = 0
    try:
        for packet in packets:
            for frame in packet.decode():
                if frame.width * frame.height > MAX_PIXELS:
                    raise UserError(f"{name}: a frame has more than {MAX_PIXELS} pixels; scale it down")
                yield done, frame
                done += 1
    except av.error.FFmpegError as error:
        raise UserError(f"{name}: damaged after {done} of {count} frames ({error.strerror})") from error
    if done != count:
        raise UserError(f"{name}: damaged: {done} of {count} frames could be decoded")
