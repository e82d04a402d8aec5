"""How a rendered clip leaves the program: enlarged, marked, encoded, and signed; and what any clip says of itself.

May hold the order of these steps and the folder of secrets; how each works is `watermark`'s and `credentials`'s.
"""

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from g4v_jax.data import video
from g4v_jax.errors import UserError
from g4v_jax.provenance import credentials, watermark

SIDE = 256  # pixels that a clip is enlarged to, at least, so that a mark has room
LOOKED_AT = 64  # frames of a clip that a mark is looked for in
KEY_BYTES = 32  # of a new key
MIN_KEY, MAX_KEY = 8, 4096  # bytes


@dataclass(frozen=True)
class Secrets:
    """What clips are signed and marked with."""

    identity: credentials.Identity
    watermark: bytes


def open_secrets(folder: str | os.PathLike) -> Secrets:
    """The secrets of a folder: chain.pem, key.pem and watermark.key, readable by its owner alone.

    All are made where the folder is absent or empty, and watermark.key also where it alone is absent.
    Raises UserError as `credentials.make_identity` does, and for a key of the mark that is not one or that others can read.
    """
    identity = credentials.make_identity(folder)
    path = Path(folder) / "watermark.key"
    if not path.exists():
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(partial, path)  # whoever is first decides: two processes end with one key
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o077:
        raise UserError(f"{path}: others can read this key (mode {mode:04o}), and mark clips with it; run chmod 600")
    return Secrets(identity, read_key(path))


def read_key(path: str | os.PathLike) -> bytes:
    """The key of a mark. Raises UserError where it cannot be read, is empty, or is far too long."""
    try:
        with open(path, "rb") as file:
            key = file.read(MAX_KEY + 1)
    except OSError as error:
        raise UserError(f"{path}: the key of the mark cannot be read ({error.strerror}); name the folder with watermark.key") from None
    if not MIN_KEY <= len(key) <= MAX_KEY:
        held = f"more than {MAX_KEY}" if len(key) > MAX_KEY else len(key)
        raise UserError(f"{path}: {held} bytes are no key of a mark; it has {MIN_KEY} to {MAX_KEY}")
    return key


def payload(clip: np.ndarray, prompt: str, run: str) -> int:
    """What a clip's mark says: the first 32 bits of a SHA-256 over run, prompt and pixels. It stands in the audit trail."""
    return int.from_bytes(hashlib.sha256(f"{run}\0{prompt}\0".encode() + clip.tobytes()).digest()[:4])


def deliver(path: Path, clip: np.ndarray, fps: float, prompt: str, run: str, held: Secrets) -> int:
    """Write a rendered clip u8 [T H W 3] as an mp4 with mark and manifest -> the mark's payload."""
    mark = payload(clip, prompt, run)
    video.write(path, watermark.embed(enlarge(clip), mark, held.watermark), fps)
    credentials.sign(path, held.identity, credentials.describe(prompt, run, mark))
    return mark


def enlarge(clip: np.ndarray) -> np.ndarray:
    """A clip [T H W 3] whose pixels are repeated until its shorter side has at least SIDE of them."""
    factor = -(-SIDE // min(clip.shape[1:3]))
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def look(path: Path, key: bytes) -> watermark.Detection:
    """Whether a file's clip carries the mark of a key. Raises UserError where it is no readable clip."""
    return watermark.detect(video.frames(path, str(path), LOOKED_AT), key)
