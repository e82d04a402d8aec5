"""The rule-based reader against drawn, compressed, squashed, blurred and empty clips."""

import itertools

import av
import numpy as np
import pytest

from g4v_jax.data.world.attributes import COLOURS, MOTIONS, SHAPES, SIZES, VALUES, Scene
from g4v_jax.data.world.draw import blocked_card, render
from g4v_jax.data.world.make import SIZES as FRAME_SIZES
from g4v_jax.data.video import write
from g4v_jax.evals.reader import is_blocked_card, read

NOTHING = dict.fromkeys(VALUES)


def _squash(video, side=32, frames=9):
    """Nine frames of 32 x 32 by the area method of a video library, not by the reader's own."""
    chosen = video[np.linspace(0, len(video) - 1, frames).round().astype(int)]
    return np.stack(
        [
            av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            .reformat(side, side, interpolation="AREA")
            .to_ndarray()
            for picture in chosen
        ]
    )


def _compressed(video, path):
    write(path, video, 8)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_decoded_and_squashed_clips_are_read_right(tmp_path):
    scenes = list(itertools.product(SHAPES, COLOURS, MOTIONS, SIZES))
    wrong = dict.fromkeys(VALUES, 0)
    chosen = scenes[::7]  # 7 divides no number of values, so all of them occur
    for index, (shape, colour, motion, size) in enumerate(chosen):
        scene = Scene(shape, colour, motion, size)
        width, height = FRAME_SIZES[index % len(FRAME_SIZES)]
        video = render(scene, np.random.default_rng(index), 16, height, width)
        reading = read(_squash(_compressed(video, tmp_path / "clip.mp4")))
        for name in VALUES:
            wrong[name] += reading.attributes[name] != getattr(scene, name)
            assert 0 <= reading.confidence[name] <= 1
    assert all(count <= 0.01 * len(chosen) for count in wrong.values()), wrong


def test_original_size_reads_like_the_squashed_clip():
    scene = Scene("balloon", "pink", "down", "large")
    video = render(scene, np.random.default_rng(0), 30, 96, 128)
    expected = {name: getattr(scene, name) for name in VALUES}
    assert read(video).attributes == read(_squash(video)).attributes == expected


def test_blur_and_noise_are_tolerated():
    rng = np.random.default_rng(0)
    for shape in ("square", "star", "gun", "spoon"):
        scene = Scene(shape, "green", "left", "large")
        video = _squash(render(scene, rng, 9, 64, 64)).astype(float)
        for axis in (1, 2):
            video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
        noisy = np.clip(video + rng.normal(0, 12, video.shape), 0, 255).astype(np.uint8)
        assert read(noisy).attributes == {name: getattr(scene, name) for name in VALUES}


@pytest.mark.parametrize("level", [0, 90, 255])
def test_nothing_is_read_off_an_empty_clip(level):
    blank = np.full((9, 32, 32, 3), level, np.uint8)
    noise = np.random.default_rng(0).normal(level, 10, blank.shape).clip(0, 255).astype(np.uint8)
    for video in (blank, noise):
        assert read(video).attributes == NOTHING
        assert not is_blocked_card(video)


def test_the_blocked_card_is_known_and_has_no_sprite(tmp_path):
    stored = _compressed(blocked_card(20, 96, 128), tmp_path / "card.mp4")
    for card in (blocked_card(9, 32, 32), stored):
        assert is_blocked_card(card) and read(card).attributes == NOTHING
    faint = (blocked_card(9, 32, 32) / 16 + 100).astype(np.uint8)
    assert not is_blocked_card(faint)
    circle = Scene("circle", "red", "still", "large")
    assert not is_blocked_card(render(circle, np.random.default_rng(0), 9, 64, 64))


def test_one_frame_has_no_motion():
    scene = Scene("cross", "cyan", "up", "small")
    reading = read(render(scene, np.random.default_rng(0), 1, 64, 64))
    assert reading.motion is None and (reading.shape, reading.colour) == ("cross", "cyan")


def test_only_a_video_is_read():
    for wrong in (np.zeros((9, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            read(wrong)
