"""Video files: which frames are taken, rotation, and what damaged or hostile files do."""

import io
import struct

import av
import numpy as np
import pytest
from folder import frames

from g4v_jax.data import video
from g4v_jax.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    video.write(path, frames(20, count=30), 10)
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    return path.read_bytes()


def encoded(codec: str, container: str, width: int, height: int, pixels: str, count: int = 2) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        frame = av.VideoFrame(width, height, pixels)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(count):
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("count", [1, 2, 4, 30])
def test_frames_are_spread_evenly_from_first_to_last(clip, count):
    pictures, seconds = video.decode(clip, count, 16, 16, "clip")
    assert pictures.shape == (count, 16, 16, 3) and pictures.dtype == np.uint8 and seconds.dtype == np.float32
    np.testing.assert_allclose(seconds, np.linspace(0, 2.9, count), atol=0.051)
    np.testing.assert_allclose(pictures[:, 8, 8, 1], 20 + 50 * seconds, atol=3)


def test_a_path_and_bytes_give_the_same(clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip)
    for one, other in zip(video.decode(clip, 4, 16, 16, "x"), video.decode(tmp_path / "clip.mp4", 4, 16, 16, "x")):
        np.testing.assert_array_equal(one, other)


def test_probe_counts_frames(clip):
    found = video.probe(clip, "clip")
    assert (found.frames, found.width, found.height) == (30, 48, 32)
    assert found.seconds == pytest.approx(2.9)


def test_variable_rate_is_sampled_by_time():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number, pts in enumerate([0, 10, 20, 30, 1000, 2000]):
            frame = av.VideoFrame.from_ndarray(frames(number * 40, 1, 32, 32)[0], format="rgb24")
            frame.pts = pts
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    pictures, seconds = video.decode(file.getvalue(), 3, 16, 16, "clip")
    np.testing.assert_allclose(seconds, [0, 1, 2], atol=1e-3)
    np.testing.assert_allclose(pictures[:, 8, 8, 0], [0, 160, 200], atol=4)


def test_rotation_is_applied(tmp_path):
    pictures = np.zeros((4, 32, 48, 3), np.uint8)
    pictures[:, :8, :8] = 255  # top left
    video.write(tmp_path / "clip.mp4", pictures, 10)
    data = (tmp_path / "clip.mp4").read_bytes()
    matrix = data.find(b"tkhd") + 44
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned, _ = video.decode(data[:matrix] + clockwise + data[matrix + 36 :], 2, 32, 32, "clip")
    assert turned[0, 2, 29, 0] > 200 and turned[0, 2, 2, 0] < 50  # top right
    wide, _ = video.decode(data[:matrix] + clockwise + data[matrix + 36 :], 2, 16, 64, "clip")
    assert wide.shape == (2, 16, 64, 3) and wide[0, 1, 60, 0] > 200 and wide[0, 1, 40, 0] < 50 and wide[0, 8, 60, 0] < 50


def test_damaged_files_name_the_file(clip, tmp_path):
    noise = np.random.default_rng(0).bytes(4000)
    middle = clip.find(b"mdat") + 300
    cases = {
        "zero": b"",
        "noise": noise,
        "page": b"<html><body>not found</body></html>",
        "cut": clip[: int(len(clip) * 0.9)],
        "overwritten": clip[:middle] + noise[:500] + clip[middle + 500 :],
        "no index": clip.replace(b"moov", b"xxxx"),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "list": b"ffconcat version 1.0\nfile '/etc/hostname'\n",
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        for given in (data, path):
            for read in (lambda: video.decode(given, 4, 16, 16, name), lambda: video.probe(given, name)):
                with pytest.raises(UserError, match=f"^{name}: "):
                    read()


def test_too_few_frames_and_missing_files(clip, tmp_path):
    with pytest.raises(UserError, match="clip: 30 frames, 31 wanted"):
        video.decode(clip, 31, 16, 16, "clip")
    with pytest.raises(UserError, match="cannot be opened"):
        video.probe(tmp_path / "none.mp4", "none.mp4")


def test_audio_alone_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 44100, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream"):
        video.decode(file.getvalue(), 1, 16, 16, "song.mp4")


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 100 * 100)
    monkeypatch.setattr(video, "MAX_FRAMES", 5)
    for data in (
        encoded("libx264", "mp4", 128, 128, "yuv420p"),
        encoded("png", "mov", 128, 128, "gray"),
        encoded("mjpeg", "avi", 64, 64, "yuvj420p", count=6),
    ):
        with pytest.raises(UserError, match="bomb: .*(limit|more than)"):
            video.decode(data, 1, 16, 16, "bomb")


def test_files_and_frames_that_would_fill_the_memory(clip, tmp_path, monkeypatch):
    whole = video.frames(clip, "clip", 64)
    monkeypatch.setattr(video, "MAX_HELD", 3 * whole[0].nbytes + 1)
    np.testing.assert_array_equal(video.frames(clip, "clip", 64), whole[:3])
    monkeypatch.setattr(video, "MAX_FILE", len(clip) - 1)
    with pytest.raises(UserError, match=f"big: {len(clip)} bytes; the limit is {len(clip) - 1}"):
        video.probe(clip, "big")


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="even width and height"):
        video.write(tmp_path / "odd.mp4", frames(0, 2, 31, 32), 8)
    with pytest.raises(ValueError, match="uint8"):
        video.write(tmp_path / "float.mp4", np.zeros((2, 32, 32, 3)), 8)
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video.write(tmp_path / "broken.mp4", frames(0), 8)
    assert not list(tmp_path.iterdir())
