"""The invisible mark: round trip, quality, every listed edit, what is not marked, the code, and mistakes."""

import numpy as np
import pytest
from PIL import Image

from g4v_jax.data.world.attributes import combinations
from g4v_jax.data.world.draw import render
from g4v_jax.errors import UserError
from g4v_jax.provenance import changes, watermark

KEY = b"a key of tests"


def _clip(seed, size=256, frames=9, drawn=64):
    """A scene of the built-in world, enlarged."""
    scenes = combinations("train", bool(seed % 2))
    small = render(scenes[seed * 7 % len(scenes)], np.random.default_rng(seed), frames, drawn, drawn)
    how = (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)[seed % 2]
    return np.stack([np.asarray(Image.fromarray(picture).resize((size, size), how)) for picture in small])


@pytest.fixture(scope="module")
def clips():
    return [_clip(seed) for seed in range(3)]


@pytest.mark.parametrize("payload", [0, 1, 0xDEADBEEF, 2**32 - 1])
def test_round_trip(payload, clips):
    found = watermark.detect(watermark.embed(clips[0], payload, KEY), KEY)
    assert found.found and found.payload == payload and found.score >= watermark.MIN_SCORE
    assert found.scale == pytest.approx(1, abs=0.01)
    assert all(abs((value + 32) % 64 - 32) <= 0.5 for value in found.offset)


@pytest.mark.parametrize("shape", [(1, 128, 128), (9, 128, 224), (2, 720, 480)])
def test_other_sizes(shape):
    clip = np.full((*shape, 3), (250, 200, 60), np.uint8)
    assert watermark.detect(watermark.embed(clip, 77, KEY), KEY).payload == 77


def test_where_it_was_cut_and_scaled(clips):
    marked = watermark.embed(clips[1], 5, KEY)[:, 30:230, 21:221]
    scaled = np.stack([np.asarray(Image.fromarray(picture).resize((300, 300))) for picture in marked])
    found = watermark.detect(scaled, KEY)
    assert found.payload == 5 and found.scale == pytest.approx(1.5, rel=0.005)
    assert found.offset == pytest.approx((30, 21), abs=1)


def test_every_frame_keeps_its_quality(clips):
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    ends = np.zeros((3, 128, 128, 3), np.uint8)
    ends[1], ends[2] = 255, (0, 255, 0)
    for clip in [*clips, noise, ends]:
        marked = watermark.embed(clip, 123456789, KEY)
        assert marked.dtype == np.uint8 and marked.shape == clip.shape
        assert min(changes.psnr(one, other) for one, other in zip(marked, clip)) >= watermark.MIN_PSNR


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (0, 255, 0), (128, 128, 128)])
def test_a_picture_of_one_colour(colour):
    clip = np.full((9, 256, 256, 3), colour, np.uint8)
    read = changes.robustness([clip], KEY, names=["none", "h264 crf 23", "scale 0.5 bilinear", "gif"])
    assert all(all(one) for one in read.values()), read


def test_the_mark_follows_its_arguments(clips):
    marked = watermark.embed(clips[0], 9, KEY)
    assert np.array_equal(marked, watermark.embed(clips[0], 9, KEY))
    assert not np.array_equal(marked, watermark.embed(clips[0], 8, KEY))
    assert not np.array_equal(marked, watermark.embed(clips[0], 9, b"another"))


def test_every_change(clips):
    read = changes.robustness(clips, KEY, seed=1)
    assert list(read) == list(changes.CHANGES) and all(len(one) == len(clips) for one in read.values())
    assert not {name: one for name, one in read.items() if not all(one)}


def test_changes_change_what_they_say(clips):
    def change(name):
        return changes.CHANGES[name].apply(clips[0], np.random.default_rng(0))

    assert change("crop 20 %").shape == (9, 205, 205, 3)
    assert change("crop 10 % and resized back").shape == change("gif").shape == clips[0].shape
    assert change("scale 0.75 bicubic").shape == (9, 192, 192, 3)
    assert len(change("every 2nd frame")) == 5 and len(change("30 % of frames dropped")) == 6
    quality = [changes.psnr(change(f"h264 crf {crf}"), clips[0]) for crf in (18, 23, 28, 32)]
    assert quality == sorted(quality, reverse=True) and quality[0] < 60
    assert change("brightness -20 %").mean() == pytest.approx(0.8 * clips[0].mean(), rel=0.01)
    assert change("contrast x0.7").std() == pytest.approx(0.7 * clips[0].std(), rel=0.02)
    assert changes.psnr(clips[0], clips[0]) == float("inf")
    assert changes.psnr(np.zeros(4, np.uint8), np.full(4, 255, np.uint8)) == 0


def test_another_key_finds_nothing(clips):
    marked = watermark.embed(clips[2], 42, KEY)
    for other in range(10):
        found = watermark.detect(marked, b"wrong %d" % other)
        assert not found.found and found.payload is found.scale is found.offset is None


def test_what_is_not_marked():
    """At 2.4e-4 a clip, two or more in 200 would come once in a thousand keys."""
    rng = np.random.default_rng(0)
    found = 0
    for index in range(200):
        if index % 2:
            clip = _clip(index, 128, 2, 64)
        else:
            clip = rng.normal(128, rng.uniform(2, 60), (2, 96, 96, 3)).clip(0, 255).astype(np.uint8)
        found += watermark.detect(clip, KEY).found
    assert found <= 1
    assert not watermark.detect(np.full((2, 128, 128, 3), 90, np.uint8), KEY).found


def test_the_code_corrects_errors():
    """Half the free distance of 18, less one: any eight wrong symbols, and most sets of more."""
    pattern = watermark._pattern(KEY)
    rng = np.random.default_rng(0)
    payloads = [int(value) for value in rng.integers(2**32, size=30)]
    soft = np.stack([watermark._encode(payload, pattern) for payload in payloads])
    words = [watermark._word(payload, pattern) for payload in payloads]
    wrong = soft.copy()
    for row in wrong[:20]:
        row[rng.permutation(len(row))[:8]] *= -1
    for start, row in enumerate(wrong[20:]):
        row[start * 16 : start * 16 + 8] *= -1  # side by side
    assert watermark._decode(wrong) == words
    noisy = soft + rng.normal(0, 1, soft.shape).astype(np.float32)
    assert ((noisy > 0) != (soft > 0)).mean() > 0.1
    assert watermark._decode(noisy) == words


def test_wrong_bits_fail_the_check():
    pattern = watermark._pattern(KEY)
    word = watermark._word(0x12345678, pattern)
    assert all((word ^ 1 << bit) != watermark._word((word ^ 1 << bit) >> 16, pattern) for bit in range(48))


def test_mistakes(clips):
    clip = clips[0]
    with pytest.raises(UserError, match=r"9 frames of 256x100 pixels is too small to mark; give at least .* 128x128"):
        watermark.embed(clip[:, :100], 1, KEY)
    with pytest.raises(UserError, match="a clip of 0 frames"):
        watermark.embed(clip[:0], 1, KEY)
    with pytest.raises(UserError, match="at least 1 frame of 64x64"):
        watermark.detect(clip[:, :63], KEY)
    with pytest.raises(UserError, match=r"frames to mark are float32 \(9, 256, 256, 3\); give uint8"):
        watermark.embed(clip.astype(np.float32), 1, KEY)
    with pytest.raises(UserError, match=r"frames to look at are uint8 \(256, 256, 3\)"):
        watermark.detect(clip[0], KEY)
    for payload in (-1, 2**32, 1.5, None, True):
        with pytest.raises(UserError, match="whole number from 0 to 4294967295"):
            watermark.embed(clip, payload, KEY)
    for key in (b"", "text", None, bytearray(b"k")):
        with pytest.raises(UserError, match="key"):
            watermark.detect(clip, key)
    with pytest.raises(UserError, match="no change 'gift'; did you mean 'gif'"):
        changes.robustness([clip], KEY, names=["gift"])
