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
KEY_BYTES = 32


@dataclass(frozen=True)
class Secrets:
    """What clips are signed and marked with."""

    identity: credentials.Identity
    watermark: bytes


def open_secrets(folder: str | os.PathLike) -> Secrets:
    """The secrets of a folder: chain.pem, key.pem and watermark.key; what is absent is made, readable by its owner alone.

    Raises UserError as `credentials.make_identity` does, and for a key of the mark that is not one.
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
        finally:
            partial.unlink()
    return Secrets(identity, read_key(path))


def read_key(path: str | os.PathLike) -> bytes:
    """The key of a mark. Raises UserError where it cannot be read, is empty, or is far too long."""
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the key of the mark cannot be read ({error.strerror}); name the folder with watermark.key") from None
    if not 8 <= len(key) <= 4096:
        raise UserError(f"{path}: {len(key)} bytes are no key of a mark; it has 8 to 4096")
    return key


def deliver(path: Path, clip: np.ndarray, fps: float, prompt: str, run: str, held: Secrets) -> int:
    """Write a rendered clip u8 [T H W 3] as an mp4 with mark and manifest -> the mark's payload.

    The payload is the first 32 bits of a SHA-256 over run, prompt and pixels: it finds the line of the audit trail.
    """
    payload = int.from_bytes(hashlib.sha256(f"{run}\0{prompt}\0".encode() + clip.tobytes()).digest()[:4])
    video.write(path, watermark.embed(enlarge(clip), payload, held.watermark), fps)
    credentials.sign(path, held.identity, credentials.describe(prompt, run, payload))
    return payload


def enlarge(clip: np.ndarray) -> np.ndarray:
    """A clip [T H W 3] whose pixels are repeated until its shorter side has at least SIDE of them."""
    factor = -(-SIDE // min(clip.shape[1:3]))
    return clip.repeat(factor, axis=1).repeat(factor, axis=2)


def look(path: Path, key: bytes) -> watermark.Detection:
    """Whether a file's clip carries the mark of a key. Raises UserError where it is no readable clip."""
    return watermark.detect(video.frames(path, str(path), LOOKED_AT), key)
