"""Content credentials: sign the clips that the model writes, and say of any clip whether its credentials hold.

May hold identities, signing and verifying. A clip carries a C2PA manifest (C2PA specification 2.x, for files of boxes)
inside the mp4 where the optional package c2pa-python is installed, and otherwise a sidecar (see `sidecar`). Either says
that a model made the clip, when, by which run and from a prompt of which SHA-256; the prompt itself is never written.
Nothing here reaches for the network: no time-stamp authority, no remote manifests, no revocation lists. So signatures
hold as long as the signer's certificate does, and no longer.
"""

import datetime
import functools
import hashlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from g4v_jax.errors import UserError
from g4v_jax.provenance import sidecar

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # IPTC's word for a model's work
LABEL = "g4v_jax.generation"  # of the assertion that holds the claim
MAX_FILE = 4 * 2**30  # bytes of a clip
MAX_MANIFEST = 16 * 2**20  # bytes of a manifest inside one
MAX_BOXES = 10_000  # at the top level of one
MAX_CLAIM = 16 * 2**10  # bytes as JSON
MAX_PEM = 64 * 2**10  # bytes

EXPIRED = ("signingCredential.expired", "claimSignature.outsideValidity")  # C2PA's codes
FETCHES = ("remote_manifest_fetch", "ocsp_fetch")  # what c2pa would use the network for

_C2PA_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")  # the uuid of the box that holds a manifest

log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """What `verify` found. `claim` is what the signer said: from an untrusted one it is only that signer's word."""

    state: Literal["valid", "untrusted", "tampered", "missing", "unchecked"]
    reason: str
    claim: dict[str, str] | None = None  # where valid or untrusted


@dataclass(frozen=True)
class Identity:
    """Whoever signs: certificates from the signer's own to the highest known, and the private key."""

    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def anchors(self) -> list[x509.Certificate]:
        """The certificates to trust in order to trust this identity."""
        return [self.chain[-1]]


def describe(prompt: str, run: str, watermark: int | None = None) -> dict[str, str]:
    """The claim about a clip: its prompt's SHA-256, the run's fingerprint, the watermark's 32-bit payload in hex."""
    return {
        "prompt_sha256": hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
        "run": run,
        "watermark": "" if watermark is None else f"{watermark:08x}",
    }


def make_identity(folder: str | os.PathLike) -> Identity:
    """The identity kept in `folder` as chain.pem and key.pem; a self-made one where the folder is absent or empty.

    A self-made identity is a P-256 key (mode 0600), the signer's certificate, and its authority's (see
    `sidecar.self_made`). Others trust it by being given chain.pem.
    Raises UserError as `open_identity` does, and where `folder` is not a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name the folder that holds chain.pem and key.pem, or a new one")
    if not folder.exists() or not any(folder.iterdir()):
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True)
        try:
            chain, key = sidecar.self_made()
            secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with open(os.open(partial / "key.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secret)
            (partial / "chain.pem").write_text(sidecar.to_pem(chain), encoding="ascii")
            partial.rename(folder)
            log.info("made a signing identity in %s; who should trust its clips needs chain.pem", folder)
        except OSError:
            if not (folder / "key.pem").exists():  # otherwise another process was faster, and its identity is as good
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return open_identity(folder / "chain.pem", folder / "key.pem")


def open_identity(chain: str | os.PathLike, key: str | os.PathLike) -> Identity:
    """An identity from PEM files: certificates, the signer's first and its issuers after it, and a private key.

    Raises UserError where a file cannot be read, the key is readable by others, is not on P-256 or is another
    certificate's, or where the certificates are expired, not for signing content, or do not issue one another.
    """
    certificates = tuple(read_certificates(chain))
    data = _pem(key)
    mode = os.stat(key).st_mode & 0o777
    if mode & 0o077:
        raise UserError(f"{key}: others can read this private key (mode {mode:04o}); run chmod 600 and think it known")
    try:
        secret = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{key}: not a private key in PEM without a passphrase; give one") from None
    if not isinstance(secret, ec.EllipticCurvePrivateKey) or not isinstance(secret.curve, ec.SECP256R1):
        raise UserError(f"{key}: signatures are ES256, so the key must be an elliptic-curve key on P-256")
    if certificates[0].public_key() != secret.public_key():
        raise UserError(f"{key}: not the key of the first certificate in {chain}; give the pair that belongs together")
    identity = Identity(certificates, secret)
    if problem := sidecar.problem(identity.chain, identity.anchors):
        raise UserError(f"{chain}: cannot sign: {problem}; give a certificate for signing content, then its issuers")
    return identity


def read_certificates(path: str | os.PathLike) -> list[x509.Certificate]:
    """The certificates of a PEM file, in order. Raises UserError where it holds none, or more than 8."""
    try:
        return sidecar.from_pem(_pem(path))
    except ValueError:
        raise UserError(f"{path}: not 1 to {sidecar.MAX_CERTIFICATES} certificates in PEM; give such a file") from None


def sign(path: str | os.PathLike, identity: Identity, claim: dict[str, str], embed: bool | None = None) -> Path:
    """Sign the mp4 at `path`, whole or not at all -> the file that holds the manifest: the mp4 or its sidecar.

    Args: the clip; who signs; what is said of it (see `describe`), flat text; whether the manifest goes into the mp4
    (True: it must; False: a sidecar; None: into the mp4 where c2pa-python is installed, else a sidecar with a warning).
    Raises UserError where the file is not a whole mp4 or has a manifest in it already, the identity has expired, or
    c2pa-python is needed and absent.
    """
    path = Path(path)
    if _texts(claim) != claim or len(json.dumps(claim)) > MAX_CLAIM:
        raise ValueError(f"sign: a claim is flat text, at most {MAX_CLAIM} bytes as JSON")
    if problem := sidecar.problem(identity.chain, identity.anchors):
        raise UserError(f"{path}: cannot be signed: {problem}; make or give another identity")
    c2pa = _c2pa()
    if embed and c2pa is None:
        raise UserError(f"{path}: a manifest inside it needs the package c2pa-python; install g4v_jax[provenance]")
    if embed is None and c2pa is None:
        _warn_of_sidecars()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    action = {"action": "c2pa.created", "digitalSourceType": GENERATED, "when": when}
    with _open(path) as file:
        embedded, whole = _scan(file, path)
        if embedded:
            raise UserError(f"{path}: has a manifest already; write the clip anew to sign it")
        if not whole:
            raise UserError(f"{path}: damaged: a part of the file is missing; write the clip anew")
        if c2pa is None or embed is False:
            statement = {"generator": f"g4v_jax {_version()}", "action": action, "claim": claim, **_digest(file)}
            return sidecar.write(path, statement, identity.chain, identity.key)
        _embed(c2pa, file, path, identity, action, claim)
    sidecar.beside(path).unlink(missing_ok=True)  # an earlier clip's of the same name
    return path


def verify(path: str | os.PathLike, trust: Identity | Sequence[x509.Certificate] | None = None) -> Verdict:
    """Whether the credentials of the mp4 at `path` hold, in the eyes of who trusts the given certificates.

    States: `valid` (as a trusted signer left it); `untrusted` (as its signer left it, but whoever that is, is not
    trusted, or no longer); `tampered` (the clip or its manifest was changed after signing); `missing` (no manifest in
    it or beside it); `unchecked` (a manifest is in it, but c2pa-python, which can read it, is not installed).
    Raises UserError where it cannot be read, is not an mp4, is over the bounds, or is a damaged one with no manifest.
    """
    path = Path(path)
    anchors = trust.anchors if isinstance(trust, Identity) else list(trust or ())
    with _open(path) as file:
        embedded, whole = _scan(file, path)
        if embedded:
            c2pa = _c2pa()
            if c2pa is None:
                return Verdict("unchecked", "a C2PA manifest is in it; to check it, install g4v_jax[provenance]")
            return _verify_embedded(c2pa, file, anchors)
        if sidecar.beside(path).exists():
            return _verify_sidecar(file, path, anchors)
    if not whole:
        raise UserError(f"{path}: damaged: a part of the file is missing, and it has no manifest")
    return Verdict("missing", "no manifest in it or beside it")


def _embed(c2pa: ModuleType, file: BinaryIO, path: Path, identity: Identity, action: dict, claim: dict) -> None:
    """Put a manifest into the clip; the library reads its own work back before the clip is replaced."""
    manifest = {
        "claim_generator_info": [{"name": "g4v_jax", "version": _version()}],
        "format": "video/mp4",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}, "created": True},
            {"label": LABEL, "data": claim, "created": True},
        ],
    }
    secret = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, sidecar.to_pem(identity.chain).encode(), secret, None)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with (
            open(partial, "w+b") as out,
            c2pa.Context.from_dict(_settings(identity.anchors)) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(manifest, context=context) as builder,
        ):
            builder.sign(signer, "video/mp4", file, out)
        shutil.copymode(path, partial)
        partial.replace(path)
    except c2pa.C2paError as error:
        raise UserError(f"{path}: could not be signed ({sidecar.plain(error)}); it is as it was") from error
    finally:
        partial.unlink(missing_ok=True)


def _verify_embedded(c2pa: ModuleType, file: BinaryIO, anchors: list[x509.Certificate]) -> Verdict:
    """The verdict of c2pa's own reader."""
    file.seek(0)
    try:
        context = c2pa.Context.from_dict(_settings(anchors))
    except c2pa.C2paError as error:
        raise UserError(f"the certificates to trust cannot be used ({sidecar.plain(error)}); give others") from error
    try:
        with context, c2pa.Reader("video/mp4", file, context=context) as reader:
            report = json.loads(reader.json())
        manifest = report["manifests"][report["active_manifest"]]
        results = report["validation_results"]["activeManifest"]
        passed = {result["code"] for result in results["success"]}
        failed = {result["code"]: result.get("explanation", "") for result in results["failure"]}
    except (c2pa.C2paError, ValueError, RecursionError, KeyError) as error:
        return Verdict("tampered", f"its manifest is damaged ({sidecar.plain(error)})")
    if any(code.endswith("Hash.mismatch") for code in failed):
        return Verdict("tampered", "its content was changed after signing")
    if "claimSignature.validated" not in passed:
        return Verdict("tampered", "its signature does not match its manifest")
    others = [code for code in failed if code.split(".")[0] != "signingCredential" and code != EXPIRED[1]]
    if others or "assertion.bmffHash.match" not in passed:
        return Verdict("tampered", f"its manifest does not hold ({sidecar.plain(others or 'no hash of the content')})")
    claims = [each.get("data") for each in manifest.get("assertions", []) if each.get("label") == LABEL]
    claim = _texts(claims[0]) if claims else {}
    signer = sidecar.plain(manifest.get("signature_info", {}).get("common_name") or "an unnamed signer")
    if report["validation_state"] == "Trusted":
        return Verdict("valid", f"signed by {signer}", claim)
    if not failed.keys().isdisjoint(EXPIRED):
        return Verdict("untrusted", f"signed by {signer}, whose certificate has expired or is not valid yet", claim)
    if set(failed) <= {"signingCredential.untrusted"}:
        return Verdict("untrusted", f"signed by {signer}, for whom no given certificate vouches", claim)
    return Verdict("untrusted", f"signed by {signer}: {sidecar.plain('; '.join(failed.values()))}", claim)


def _verify_sidecar(file: BinaryIO, path: Path, anchors: list[x509.Certificate]) -> Verdict:
    """The verdict on a clip with a sidecar: its signature, then the clip's hash, then whose signature it is."""
    beside = sidecar.beside(path)
    try:
        statement, chain = sidecar.read(beside)
    except sidecar.Damaged as error:
        return Verdict("tampered", str(error))
    except OSError as error:
        raise UserError(f"{beside}: cannot be read ({error.strerror})") from None
    digest = _digest(file)
    if {name: statement.get(name) for name in digest} != digest:
        return Verdict("tampered", "its content was changed after signing")
    signer, claim = sidecar.holder(chain[0]), _texts(statement.get("claim"))
    if problem := sidecar.problem(chain, anchors):
        return Verdict("untrusted", f"signed by {signer}: {problem}", claim)
    return Verdict("valid", f"signed by {signer}", claim)


def _scan(file: BinaryIO, path: Path) -> tuple[bool, bool]:
    """Walk the top-level boxes (ISO/IEC 14496-12, 4.2) -> whether a C2PA box is among them, whether all are whole.

    Raises UserError for what is not an mp4 or is over the bounds.
    """
    end, at, embedded = os.fstat(file.fileno()).st_size, 0, False
    if end > MAX_FILE:
        raise UserError(f"{path}: {end} bytes; the limit is {MAX_FILE}")
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(32)
        size, kind, header = int.from_bytes(head[:4]), head[4:8], 8
        if at == 0 and kind != b"ftyp":
            raise UserError(f"{path}: not an mp4 file; give one")
        if size == 1:  # the size did not fit
            size, header = int.from_bytes(head[8:16]), 16
        elif size == 0:  # all that is left
            size = end - at
        if kind == b"uuid" and head[header : header + 16] == _C2PA_BOX:
            embedded = True
            if min(size, end - at) > MAX_MANIFEST:
                raise UserError(f"{path}: a manifest of {size} bytes; the limit is {MAX_MANIFEST}")
        if size < header or at + size > end:
            return embedded, False
        at += size
        if at == end:
            return embedded, True
    raise UserError(f"{path}: more than {MAX_BOXES} parts; this is no clip")


def _settings(anchors: list[x509.Certificate]) -> dict:
    """c2pa's settings: trust these certificates alone, and never use the network."""
    trust = {"trust_config": "\n".join(sidecar.PURPOSES.values())}
    if anchors:
        trust["user_anchors"] = sidecar.to_pem(tuple(anchors))
    return {
        "version": 1,
        "trust": trust,
        "verify": {"verify_trust": True, "verify_after_sign": True, **dict.fromkeys(FETCHES, False)},
        "core": {"allowed_network_hosts": [], "max_decompressed_manifest_size_in_mb": MAX_MANIFEST // 2**20},
        "builder": {"thumbnail": {"enabled": False}},
    }


def _c2pa() -> ModuleType | None:
    """The package c2pa-python, or None where it is not installed."""
    try:
        return importlib.import_module("c2pa")
    except ImportError:
        return None


@functools.cache
def _warn_of_sidecars() -> None:
    log.warning("c2pa-python is not installed: manifests go into sidecars, *.mp4.manifest.json, not into the clips")


def _version() -> str:
    return metadata.version("g4v_jax")


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None


def _pem(path: str | os.PathLike) -> bytes:
    """The bytes of a small file."""
    with _open(Path(path)) as file:
        data = file.read(MAX_PEM + 1)
    if len(data) > MAX_PEM:
        raise UserError(f"{path}: more than {MAX_PEM} bytes; give a file in PEM")
    return data


def _digest(file: BinaryIO) -> dict[str, str]:
    file.seek(0)
    return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _texts(value: object) -> dict[str, str]:
    """The text fields of what a stranger may have written."""
    return {name: text for name, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
