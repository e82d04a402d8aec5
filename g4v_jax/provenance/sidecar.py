"""Signing by certificate: the certificates, and the sidecar that stands beside a clip with no manifest in it.

May hold who may sign and who vouches for them, and the sidecar's form, signature and bounds; what is said of a clip,
and what follows from it, is `credentials`' business. `CLIP.mp4.manifest.json` is one JSON object: `statement` (what is
said, the clip's SHA-256 included), `certificates` (PEM, the signer's first) and `signature`: ECDSA on P-256 with
SHA-256 (ES256), DER in hex, over the JSON of [format, statement] in ASCII with sorted keys and no spaces.
"""

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

FORMAT = "g4v_jax manifest 1"
MAX_SIDECAR = 256 * 2**10  # bytes
MAX_CERTIFICATES = 8
YEARS = 10  # that a self-made certificate is valid
PURPOSES = {  # extended key usages of certificates that may sign content, as in C2PA's default trust configuration
    "emailProtection": "1.3.6.1.5.5.7.3.4",
    "documentSigning": "1.3.6.1.5.5.7.3.36",
    "c2pa-kp-claimSigning": "1.3.6.1.4.1.62558.2.1",
}

_ES256 = ec.ECDSA(SHA256())


class Damaged(Exception):
    """A sidecar that is no longer, or never was, what its signer wrote; the message says how one can tell."""


def beside(path: Path) -> Path:
    """Where the sidecar of a clip is."""
    return path.with_name(f"{path.name}.manifest.json")


def write(path: Path, statement: dict, chain: tuple[x509.Certificate, ...], key: ec.EllipticCurvePrivateKey) -> Path:
    """Sign a statement about the clip at `path` and write its sidecar, whole or not at all -> the sidecar."""
    document = {
        "format": FORMAT,
        "statement": statement,
        "certificates": to_pem(chain),
        "signature": key.sign(_signed(statement), _ES256).hex(),
    }
    to = beside(path)
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="ascii")
        return partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict, list[x509.Certificate]]:
    """The statement of the sidecar at `path` and the certificates of whoever signed it, trusted or not.

    Raises Damaged where it is not a whole sidecar or not what was signed, and OSError where it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_SIDECAR + 1)
    if len(data) > MAX_SIDECAR:
        raise Damaged(f"the sidecar has more than {MAX_SIDECAR} bytes")
    try:
        document = json.loads(data)
        if document["format"] != FORMAT or not isinstance(document["statement"], dict):
            raise ValueError("another format")
        chain = from_pem(document["certificates"].encode("ascii"))
        signature = bytes.fromhex(document["signature"])
        key = chain[0].public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("the certificate's key is not on a curve")
        key.verify(signature, _signed(document["statement"]), _ES256)
    except InvalidSignature:
        raise Damaged("the signature does not match the sidecar") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnsupportedAlgorithm) as error:
        raise Damaged(f"the sidecar is damaged ({type(error).__name__})") from None
    return document["statement"], chain


def to_pem(chain: tuple[x509.Certificate, ...]) -> str:
    """Certificates as PEM text, in order."""
    return "".join(certificate.public_bytes(Encoding.PEM).decode("ascii") for certificate in chain)


def from_pem(data: bytes) -> list[x509.Certificate]:
    """1 to 8 certificates from PEM text, in order. Raises ValueError where it is anything else."""
    try:
        chain = x509.load_pem_x509_certificates(data)
    except x509.InvalidVersion as error:
        raise ValueError(str(error)) from None
    if not 1 <= len(chain) <= MAX_CERTIFICATES:
        raise ValueError(f"{len(chain)} certificates; 1 to {MAX_CERTIFICATES} are taken")
    return chain


def problem(chain: Sequence[x509.Certificate], anchors: list[x509.Certificate]) -> str | None:
    """Why who holds the first certificate is not to be trusted, or None: dates, purpose, and issuers to an anchor."""

    def purpose(policy: object, certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
        if usage is None or not {each.dotted_string for each in usage} & set(PURPOSES.values()):
            raise ValueError("not for signing content")

    def any_purpose(policy: object, certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
        pass  # of an authority: the default is for authorities of web sites

    leaf = ExtensionPolicy.permit_all().require_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, purpose)
    authority = ExtensionPolicy.webpki_defaults_ca()
    authority = authority.may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, any_purpose)
    now = datetime.datetime.now(datetime.UTC)
    try:
        for certificate in chain:
            if now > certificate.not_valid_after_utc:
                return f"the certificate of {holder(certificate)} has expired"
            if now < certificate.not_valid_before_utc:
                return f"the certificate of {holder(certificate)} is not valid yet"
        issuers = [anchor for anchor in anchors if anchor != chain[0]]  # nobody vouches for oneself
        if not issuers:
            return "no given certificate vouches for the signer"
        policy = PolicyBuilder().store(Store(issuers)).extension_policies(ca_policy=authority, ee_policy=leaf)
        policy.build_client_verifier().verify(chain[0], list(chain[1:]))
    except VerificationError as error:
        return f"no given certificate vouches for the signer ({plain(error)})"
    except (ValueError, UnsupportedAlgorithm) as error:
        return f"its certificates cannot be read ({plain(error)})"
    return None


def self_made() -> tuple[tuple[x509.Certificate, ...], ec.EllipticCurvePrivateKey]:
    """Two new certificates, the signer's and its authority's, and the signer's key, as C2PA's certificate profile asks.

    The authority's key is thrown away, so that nothing else can ever be issued under it. There are no names of people
    or machines in them: the signer's key names both.
    """
    signer, authority = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    mark = x509.SubjectKeyIdentifier.from_public_key(signer.public_key()).digest.hex()[:8]
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)  # clocks differ
    end = start + datetime.timedelta(days=365 * YEARS)

    def name(role: str) -> x509.Name:
        words = {NameOID.ORGANIZATION_NAME: "self-made", NameOID.COMMON_NAME: f"g4v_jax {role} {mark}"}
        return x509.Name([x509.NameAttribute(kind, text) for kind, text in words.items()])

    def issue(role: str, key: ec.EllipticCurvePublicKey, ca: bool) -> x509.Certificate:
        uses = dict.fromkeys("content_commitment key_encipherment data_encipherment key_agreement".split(), False)
        uses |= {"digital_signature": not ca, "key_cert_sign": ca, "crl_sign": ca}
        extensions = [
            (x509.BasicConstraints(ca, 0 if ca else None), True),
            (x509.KeyUsage(**uses, encipher_only=False, decipher_only=False), True),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False),
        ]
        if not ca:  # the one purpose that C2PA readers take in every configuration
            extensions.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False))
        serial = x509.random_serial_number()
        builder = x509.CertificateBuilder(name("authority"), name(role), key, serial, start, end)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority, SHA256())

    return (issue("signer", signer.public_key(), False), issue("authority", authority.public_key(), True)), signer


def holder(certificate: x509.Certificate) -> str:
    """The common name of who holds a certificate, as `plain` has it."""
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        names = []
    return plain(names[0].value if names else "an unnamed signer")


def plain(text: object) -> str:
    """A stranger's text as one short line that does nothing to a terminal."""
    words = " ".join(str(text).split())[:200]
    return "".join(each if each.isprintable() else "?" for each in words)


def _signed(statement: dict) -> bytes:
    """The bytes under the signature."""
    return json.dumps([FORMAT, statement], sort_keys=True, separators=(",", ":")).encode("ascii")
