"""Signed clips: what a signature covers, whom it convinces, and what damaged or hostile files do."""

import datetime
import functools
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from folder import frames

from g4v_jax.data import video
from g4v_jax.errors import UserError
from g4v_jax.provenance import credentials, sidecar
from g4v_jax.provenance.credentials import Identity, make_identity, open_identity, sign, verify

PROMPT = "a red wall brightens"
CLAIM = credentials.describe(PROMPT, "run 1f2e", 0xDEADBEEF)
new_key = functools.partial(ec.generate_private_key, ec.SECP256R1())
BOTH = pytest.mark.parametrize("embed", [True, False])  # kinds of manifest
EMAIL, SERVER = "1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.1"


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Identity:
    return make_identity(tmp_path_factory.mktemp("identity") / "mine")


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory) -> bytes:
    video.write(path := tmp_path_factory.mktemp("video") / "clip.mp4", frames(20, count=12), 10)
    return path.read_bytes()


@pytest.fixture
def clip(tmp_path, unsigned) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(unsigned)
    return path


def box(kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return (8 + len(content) if size is None else size).to_bytes(4, "big") + kind + content


def manifest_box(data: bytes) -> slice:
    """Where the manifest is in a signed mp4."""
    start = data.index(b"uuid") - 4
    return slice(start, start + int.from_bytes(data[start : start + 4]))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def issue(name, key, issuer, by, purpose=None, ca=False, start=-300, end=86400) -> x509.Certificate:
    """A certificate valid from `start` to `end` seconds from now."""
    now = datetime.datetime.now(datetime.UTC)
    at = [now + datetime.timedelta(seconds=seconds) for seconds in (start, end)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (issuer, name)]
    builder = x509.CertificateBuilder(*names, key.public_key(), x509.random_serial_number(), *at)
    for extension, critical in (
        (x509.BasicConstraints(ca, None), True),
        (x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), False),
        *([(x509.ExtendedKeyUsage([x509.ObjectIdentifier(purpose)]), False)] if purpose else []),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(by, SHA256())


def three(purpose: str = EMAIL, name: str = "signer", **leaf) -> Identity:
    """Root, intermediate and signer."""
    root, middle, key = new_key(), new_key(), new_key()
    signer = issue(name, key, "middle", middle, purpose, **leaf)
    middle = issue("middle", middle, "root", root, ca=True)
    return Identity((signer, middle, issue("root", root, "root", root, ca=True)), key)


def saved(identity: Identity, folder: Path, lock=NoEncryption(), secret=None, mode: int = 0o600) -> list[Path]:
    """`identity` as two files."""
    files = [folder / "chain.pem", folder / "key.pem"]
    files[0].write_text(sidecar.to_pem(identity.chain))
    files[1].write_bytes(secret or identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    files[1].chmod(mode)
    return files


def test_an_identity_is_made_once_and_kept_private(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "identity"
    (tmp_path / "empty").mkdir()

    def overtaken(partial, target):
        monkeypatch.undo()
        make_identity(target)
        return partial.rename(target)

    monkeypatch.setattr(Path, "rename", overtaken)
    made, again = make_identity(folder), make_identity(folder)
    assert made.chain != make_identity(tmp_path / "empty").chain
    assert made.chain == again.chain == tuple(credentials.read_certificates(folder / "chain.pem"))
    assert made.key.private_numbers() == again.key.private_numbers() and "PRIVATE" not in repr(made)
    assert os.listdir(tmp_path / "a") == ["identity"] and sorted(os.listdir(folder)) == ["chain.pem", "key.pem"]
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="chain.pem: cannot be opened"):
        make_identity(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        make_identity(__file__)


@pytest.mark.parametrize(
    ("leaf", "problem"),
    [({"purpose": SERVER}, "not for signing content"), ({"purpose": None}, "vouches")]
    + [({"end": -5}, "expired"), ({"start": 500}, "not valid yet")],
)
def test_certificates_that_may_not_sign_are_refused(tmp_path, clip, leaf, problem):
    identity = three(**leaf)
    with pytest.raises(UserError, match=f"chain.pem: cannot sign: .*{problem}"):
        open_identity(*saved(identity, tmp_path))
    with pytest.raises(UserError, match=f"clip.mp4: cannot be signed: .*{problem}"):
        sign(clip, identity, CLAIM)  # as one that has expired while in use


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mode": 0o640}, r"key.pem: others can read .*0640.*chmod 600"),
        ({"secret": b"garbage"}, "key.pem: not a private key"),
        ({"secret": b"x" * 100_000}, "bytes; give a file in PEM"),
        ({"lock": BestAvailableEncryption(b"word")}, "without a passphrase"),
        (lambda chain, key: (chain, new_key()), "not the key of the first certificate"),
        (lambda chain, key: (chain, ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda chain, key: (chain[:1], key), "vouches"),  # its issuers are missing
        (lambda chain, key: (chain[::2], key), "vouches"),
        (lambda chain, key: ((), key), "chain.pem: not 1 to 8 certificates"),
        (lambda chain, key: (chain * 3, key), "chain.pem: not 1 to 8 certificates"),
    ],
)
def test_keys_and_certificates_that_do_not_fit_are_refused(tmp_path, change, line):
    good = three()
    identity, how = (good, change) if isinstance(change, dict) else (Identity(*change(good.chain, good.key)), {})
    with pytest.raises(UserError, match=line):
        open_identity(*saved(identity, tmp_path, **how))


def test_the_manifest_is_what_c2pa_itself_calls_trusted(clip, unsigned, mine):
    assert sign(clip, mine, CLAIM) == clip and os.listdir(clip.parent) == ["clip.mp4"]
    trust = {"trust": {"user_anchors": sidecar.to_pem(tuple(mine.anchors))}}
    with c2pa.Context.from_dict(trust) as context, c2pa.Reader(str(clip), context=context) as reader:
        report = json.loads(reader.json())
    assert report["validation_state"] == "Trusted" and not report["validation_results"]["activeManifest"]["failure"]
    manifest = report["manifests"][report["active_manifest"]]
    generator = manifest["claim_generator_info"][0]
    assert (generator["name"], generator["version"]) == ("g4v_jax", credentials._version())
    found = {each["label"]: each["data"] for each in manifest["assertions"]}
    (action,) = found["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert found["g4v_jax.generation"] == CLAIM
    assert PROMPT.encode() not in clip.read_bytes() and b"PRIVATE" not in clip.read_bytes()
    with c2pa.Reader(str(clip)) as reader:  # whoever trusts nobody in particular
        assert reader.get_validation_state() == "Valid"
    assert video.probe(clip, "clip") == video.probe(unsigned, "clip")
    np.testing.assert_array_equal(video.decode(clip, 5, 16, 16, "")[0], video.decode(unsigned, 5, 16, 16, "")[0])


@BOTH
def test_whom_a_signature_convinces(clip, unsigned, mine, embed):
    others = three()
    where = sign(clip, mine, CLAIM, embed)
    assert where == (clip if embed else clip.with_name("clip.mp4.manifest.json"))
    assert (clip.read_bytes() == unsigned) != embed
    for trust in (mine, mine.chain, mine.chain[-1:], [*others.chain, *mine.chain]):
        verdict = verify(clip, trust)
        assert verdict.state == "valid" and verdict.claim == CLAIM and "g4v_jax signer" in verdict.reason
    for trust in (others, others.chain, None, [], mine.chain[:1]):
        verdict = verify(clip, trust)
        assert verdict.state == "untrusted" and verdict.claim == CLAIM and "vouches" in verdict.reason


@BOTH
def test_changed_clips_are_tampered_with_and_stripped_ones_have_no_manifest(clip, mine, embed):
    assert verify(clip, mine).state == "missing"
    where, data = sign(clip, mine, CLAIM, embed), clip.read_bytes()
    flips = [flipped(data, at) for at in (data.index(b"mdat") + 50, data.index(b"moov") + 50, len(data) - 1)]
    for changed in [*flips, data[:-50], data + box(b"mdat", b"more")]:
        clip.write_bytes(changed)
        for trust in (mine, three(), None):
            assert verify(clip, trust) == ("tampered", "its content was changed after signing", None)
    clip.write_bytes(data.replace(data[manifest_box(data)], b"")) if embed else where.unlink()
    assert verify(clip, mine) == ("missing", "no manifest in it or beside it", None)


@BOTH
@pytest.mark.parametrize("purpose", sidecar.PURPOSES.values())
def test_own_certificates_sign(tmp_path, clip, purpose, embed):
    identity = open_identity(*saved(three(purpose, "\x1b[2Jevil\n\u202e"), tmp_path))
    sign(clip, identity, CLAIM, embed)
    for trust in (identity, identity.chain[1:], identity.chain[1:2]):  # the intermediate alone is enough
        verdict = verify(clip, trust)  # and a signer's name does nothing to a terminal
        assert verdict.state == "valid" and verdict.reason.isprintable() and "evil" in verdict.reason
    assert verify(clip, three(purpose)).state == "untrusted"  # others of the same names


@BOTH
def test_who_was_issued_a_certificate_cannot_issue_one(clip, mine, monkeypatch, embed):
    forged, name = new_key(), mine.chain[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    forger = Identity((issue("forger", forged, name, mine.key, EMAIL), *mine.chain), forged)
    with pytest.raises(UserError, match="vouches"):
        sign(clip, forger, CLAIM, embed)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(sidecar, "problem", lambda chain, anchors: None)
        sign(clip, forger, CLAIM, embed)
    assert verify(clip, mine).state == "untrusted"


def test_signatures_end_with_their_certificate(tmp_path, clip, unsigned):
    identity, other = three(end=3), tmp_path / "other.mp4"
    other.write_bytes(unsigned)
    for path, embed in ((clip, True), (other, False)):
        sign(path, identity, CLAIM, embed)
        assert verify(path, identity).state == "valid"
    time.sleep(4.1)  # certificates count in whole seconds
    for path in (clip, other):
        state, reason, _ = verify(path, identity)
        assert state == "untrusted" and "expired" in reason


def test_no_changed_byte_changes_what_is_believed(clip, mine):
    sign(clip, mine, CLAIM, embed=True)
    data, rng = clip.read_bytes(), np.random.default_rng(1)
    manifest, states = manifest_box(data), []
    hostile = [flipped(data, at) for at in range(manifest.start + 4, manifest.stop, 37)]
    hostile += [data[:at] for at in range(0, len(data), 97)] + [data + data[manifest]]
    for _ in range(50):
        mixed = np.frombuffer(data, np.uint8).copy()
        mixed[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        hostile.append(mixed.tobytes())
    for changed in hostile:
        clip.write_bytes(changed)
        try:
            verdict = verify(clip, mine)
            assert verdict.claim == (CLAIM if verdict.state == "valid" else None)
            states.append(verdict.state)
        except UserError as error:
            assert "clip.mp4" in str(error)
    # the manifest ends in room for longer signatures, which nothing covers
    assert set(states) <= {"tampered", "missing", "valid"} and states.count("tampered") > 100


def test_changed_sidecars_are_tampered_with(clip, mine):
    where = sign(clip, mine, CLAIM, embed=False)
    document = json.loads(where.read_text())
    statement = document["statement"]
    assert statement["action"]["digitalSourceType"] == credentials.GENERATED and PROMPT not in str(document)
    others = [{**statement, "claim": {**CLAIM, "run": "another"}}, {**statement, "sha256": "0" * 64}]
    for changed in [{"statement": other} for other in others] + [{"signature": "00"}, {"signature": ""}]:
        where.write_text(json.dumps({**document, **changed}))
        assert verify(clip, mine) == ("tampered", "the signature does not match the sidecar", None)
    where.write_text(json.dumps(document))  # the same in another layout
    assert verify(clip, mine).state == "valid"


@pytest.mark.parametrize(
    "changed",
    [{"format": "another"}, {"statement": []}, {"statement": None}, {"certificates": "none"}, {"certificates": 5}]
    + [{"certificates": ""}, {"signature": "xy"}, {"signature": None}, {"certificates": "\u00e9"}]
    + [b"", b"\xff" * 99, b"[]", b"null", b"5", b"[" * 100_000, b"{}", b"9" * 10_000, b" " * 300_000],
)
def test_damaged_sidecars_are_tampered_with(clip, mine, changed):
    where = sign(clip, mine, CLAIM, embed=False)
    if isinstance(changed, dict):
        changed = json.dumps({**json.loads(where.read_text()), **changed}).encode()
    where.write_bytes(changed)
    verdict = verify(clip, mine)
    assert verdict.state == "tampered" and "sidecar" in verdict.reason and verdict.claim is None


@pytest.mark.parametrize("failure", [c2pa.C2paError("no space"), KeyboardInterrupt("stop"), None])
@BOTH
def test_a_signer_that_fails_leaves_the_clip_as_it_was(clip, unsigned, mine, monkeypatch, failure, embed):
    def failing(self, signer, kind, source, out):
        out.write(b"half a clip")
        raise failure

    def out_of_place(self, target):
        raise OSError("no place")

    monkeypatch.setattr(Path, "replace", out_of_place)
    if failure:
        monkeypatch.setattr(c2pa.Builder, "sign", failing)
    with pytest.raises((UserError, KeyboardInterrupt, OSError), match="stop|no place|could not be signed .no space"):
        sign(clip, mine, CLAIM, embed)
    assert clip.read_bytes() == unsigned and os.listdir(clip.parent) == ["clip.mp4"]


def test_a_signed_clip_is_not_signed_again(clip, mine):
    for claim in ({"run": 5}, {"a": {}}, {"a": None}, {"a": "x" * 20_000}):
        with pytest.raises(ValueError, match="flat text"):
            sign(clip, mine, claim)
    sign(clip, mine, CLAIM, embed=False)
    sign(clip, mine, CLAIM, embed=False)  # the clip may be another by now
    sign(clip, mine, CLAIM, embed=True)
    assert os.listdir(clip.parent) == ["clip.mp4"]  # the sidecar spoke of another file
    for embed in (True, False):
        with pytest.raises(UserError, match="has a manifest already"):
            sign(clip, mine, CLAIM, embed)


def test_without_c2pa_there_are_sidecars_and_a_warning(clip, unsigned, mine, monkeypatch, caplog):
    credentials._warn_of_sidecars.cache_clear()
    with monkeypatch.context() as absent, caplog.at_level(logging.WARNING):
        absent.setitem(sys.modules, "c2pa", None)
        for _ in range(2):
            assert sign(clip, mine, CLAIM) == sidecar.beside(clip)
        assert [record.message.split(":")[0] for record in caplog.records] == ["c2pa-python is not installed"]
        assert clip.read_bytes() == unsigned and verify(clip, mine).state == "valid"
        with pytest.raises(UserError, match=r"needs the package c2pa-python; install g4v_jax\[provenance\]"):
            sign(clip, mine, CLAIM, embed=True)
    sign(clip, mine, CLAIM, embed=True)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    verdict = verify(clip, mine)  # not called missing
    assert verdict.state == "unchecked" and "install g4v_jax[provenance]" in verdict.reason and verdict.claim is None


def test_nobody_is_called(clip, mine, monkeypatch):
    class Remote(c2pa.Builder):
        def sign(self, *args):
            self.set_no_embed()
            self.set_remote_url(address)
            return super().sign(*args)

    monkeypatch.setattr(c2pa, "Builder", Remote)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa"
        sign(clip, mine, CLAIM, embed=True)
        assert address.encode() in clip.read_bytes() and verify(clip, mine).state == "missing"
        with c2pa.Context.from_dict(credentials._settings(mine.anchors)) as context:
            with pytest.raises(c2pa.C2paError, match="must fetch"):
                c2pa.Reader(clip, context=context)
        with pytest.raises(TimeoutError):
            server.accept()


HEAD = box(b"ftyp", b"isom\0\0\2\0isom")
MANIFEST = credentials._C2PA_BOX + bytes(4) + b"manifest\0" + bytes(8)
LEVEL = box(b"jumd", b"c2pa" + bytes(12) + b"\3c2pa\0")
DEEP = functools.reduce(lambda inner, _: box(b"jumb", LEVEL + inner), range(2000), b"")


@pytest.mark.parametrize(
    "data",
    [b"", bytes(9), np.random.default_rng(0).bytes(5000), HEAD[:10], box(b"moov"), b"\0\0\0\1ftyp"]
    + [HEAD + box(b"mdat", b"x", size) for size in (0, 1, 7, 2**31, 2**32 - 1)]
    + [HEAD + box(b"mdat", size.to_bytes(8, "big"), 1) for size in (0, 2**40, 2**63, 2**64 - 1)]
    + [HEAD + box(b"uuid", MANIFEST + DEEP, size) for size in (None, 0, 1, 20, 2**32 - 1)]
    + [HEAD + box(b"uuid", MANIFEST + box(b"jumb", b"x" * 40, size)) for size in (None, 0, 1, 2**32 - 1)]
    + [HEAD + box(b"uuid", content) for content in (credentials._C2PA_BOX, MANIFEST)]
    + [HEAD + box(b"free") * 20_000, HEAD + box(b"uuid", (2**63).to_bytes(8) + MANIFEST, 1)],
)
def test_hostile_files_get_a_line_or_a_verdict(tmp_path, mine, data):
    path = tmp_path / "clip.mp4"
    for embed in (None, True, False):
        path.write_bytes(data)
        try:
            if embed is not None:
                sign(path, mine, CLAIM, embed)
            verdict = verify(path, mine)
            assert verdict.reason.isprintable()
            assert verdict.state in (("tampered", "missing") if embed is None else ("valid",))
        except UserError as error:
            assert str(path) in str(error) and path.read_bytes() == data


def test_files_that_are_not_there_or_too_big_get_a_line(tmp_path, mine):
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(UserError, match="cannot be opened"):
            verify(path)
        with pytest.raises(UserError, match="cannot be opened"):
            sign(path, mine, CLAIM)
    size = credentials.MAX_MANIFEST + 100
    for start, length in ((b"", credentials.MAX_FILE + 1), (HEAD + box(b"uuid", MANIFEST, size), len(HEAD) + size)):
        with open(tmp_path / "big.mp4", "wb") as file:
            file.write(start)
            file.truncate(length)
        with pytest.raises(UserError, match="bytes; the limit is"):
            verify(tmp_path / "big.mp4")
