"""Rendered clips leave marked and signed, and what is done to them afterwards is seen."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from g4v_jax import cli
from g4v_jax.data import video
from g4v_jax.errors import UserError
from g4v_jax.provenance import credentials, sidecar
from g4v_jax.provenance.delivery import deliver, enlarge, look, open_secrets, read_key


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return open_secrets(tmp_path_factory.mktemp("secrets") / "own")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """u8 [9 32 32 3]: a soft disc that moves over a slope."""
    y, x = np.mgrid[:32, :32]
    frames = [90 + 2 * x + 80 * ((x - 8 - t) ** 2 + (y - 16) ** 2 < 30) for t in range(9)]
    return np.repeat(np.stack(frames)[..., None], 3, axis=3).astype(np.uint8)


@pytest.fixture(scope="module")
def delivered(tmp_path_factory, held, clip):
    path = tmp_path_factory.mktemp("out") / "clip.mp4"
    return path, deliver(path, clip, 4.0, "a disc moves", "smol@250", held)


def test_a_clip_is_marked_signed_and_still_the_same_to_the_eye(delivered, held, clip):
    path, payload = delivered
    verdict = credentials.verify(path, held.identity)
    assert verdict.state == "valid" and verdict.claim["watermark"] == f"{payload:08x}" and verdict.claim["run"] == "smol@250"
    found = look(path, held.watermark)
    assert found.found and found.payload == payload
    frames, _ = video.decode(path, 9, 256, 256, "clip")
    error = np.abs(frames.astype(int) - enlarge(clip)).mean()
    assert frames.shape == (9, 256, 256, 3) and error < 4


def test_the_mark_outlives_the_file(delivered, held, tmp_path):
    path, payload = delivered
    frames = video.frames(path, "clip", 64)
    copy = tmp_path / "copy.gif"
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(copy, save_all=True, append_images=pictures[1:], duration=250)
    assert look(copy, held.watermark).payload == payload


def test_another_key_finds_nothing_and_another_signer_is_not_trusted(delivered, tmp_path):
    other = open_secrets(tmp_path / "other")
    assert not look(delivered[0], other.watermark).found
    assert credentials.verify(delivered[0], other.identity).state == "untrusted"


def test_the_payload_tells_clips_apart(delivered, held, clip, tmp_path):
    assert deliver(tmp_path / "a.mp4", clip, 4.0, "another prompt", "smol@250", held) != delivered[1]
    assert deliver(tmp_path / "b.mp4", clip, 4.0, "a disc moves", "smol@250", held) == delivered[1]


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path):
    first, again = open_secrets(tmp_path / "s"), open_secrets(tmp_path / "s")
    assert first.watermark == again.watermark and len(first.watermark) == 32
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "s").iterdir() if "key" in path.name} == {
        "key.pem": 0o600, "watermark.key": 0o600}  # fmt: skip


def test_what_is_no_key_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="0 bytes are no key"):
        read_key(tmp_path / "empty")
    (tmp_path / "long").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="more than 4096 bytes are no key"):
        read_key(tmp_path / "long")


def test_a_key_that_others_can_read_is_refused(tmp_path):
    open_secrets(tmp_path / "s")
    (tmp_path / "s/watermark.key").chmod(0o644)
    with pytest.raises(UserError, match="watermark.key: others can read this key .mode 0644"):
        open_secrets(tmp_path / "s")


def test_where_there_are_no_hard_links_a_key_is_made_all_the_same(tmp_path, monkeypatch):
    def link(one, other):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert len(open_secrets(tmp_path / "s").watermark) == 32
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"chain.pem", "key.pem", "watermark.key"}


def test_small_clips_are_enlarged_by_whole_pixels(clip):
    large = enlarge(clip)
    assert large.shape == (9, 256, 256, 3)
    np.testing.assert_array_equal(large[:, ::8, ::8], clip)
    assert enlarge(large) is not None and enlarge(large).shape == large.shape


def test_what_a_stranger_signs_does_nothing_to_a_terminal(held, clip, tmp_path, capsys):
    """A claim with line breaks, escapes and half a surrogate pair, signed as it should be by someone or other."""
    path = tmp_path / "clip.mp4"
    video.write(path, clip, 4.0)
    claim = {"run\n": "x\x1b[2K\nother.mp4: valid", "half": "\ud800"}
    statement = {"claim": claim, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    sidecar.write(path, statement, held.identity.chain, held.identity.key)
    cli.run(["verify", str(path), f"--json={tmp_path / 'v.json'}"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3 and "untrusted" in printed
    assert "\x1b" not in printed and "x?[2K other.mp4: valid" in printed
    assert json.loads((tmp_path / "v.json").read_text())[str(path)]["claim"] == claim
