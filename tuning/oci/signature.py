"""Verify signatures of `cosign sign --key` with local public keys: no network, no clock.

Two forms are supported. The older signs a "simple signing" document that names the digest, under
the tag `sha256-<digest>.sig`. The newer is a Sigstore bundle with a DSSE envelope around an in-toto
statement, attached as a referrer. Keyless signatures, which need a transparency log and a
certificate authority, are not supported: use cosign for those.

Formats: cosign SIGNATURE_SPEC and BUNDLE_SPEC, DSSE 1.0, in-toto Statement v1.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning import files
from tuning.errors import SpecError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ANNOTATION = "dev.cosignproject.cosign/signature"
IN_TOTO = "application/vnd.in-toto+json"
SIGNED = "https://sigstore.dev/cosign/sign/v1"  # predicate of a bundle that signs an image
_TYPE = "cosign container image signature"


@dataclass(frozen=True)
class Key:
    """A public key and its file."""

    path: Path
    public: Public

    def signed(self, data: bytes, signature: bytes) -> bool:
        """Whether this key made `signature` of `data`, as cosign does."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding

        try:
            if isinstance(self.public, ec.EllipticCurvePublicKey):
                self.public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            elif isinstance(self.public, ed25519.Ed25519PublicKey):
                self.public.verify(signature, data)
            else:
                self.public.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
        except InvalidSignature:
            return False
        return True


def read_keys(paths: Iterable[Path]) -> tuple[Key, ...]:
    """The public keys in the PEM files at `paths`, such as cosign.pub. Raises SpecError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = []
    change = "name the PEM file that `cosign generate-key-pair` wrote as cosign.pub"
    for path in paths:
        try:
            public = load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            what = f"is not a public key ({type(error).__name__})"
            raise SpecError.at("SIGN-101", str(path), what, change) from None
        kinds = (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey, rsa.RSAPublicKey)
        if not isinstance(public, kinds):
            raise SpecError.at("SIGN-101", str(path), "is a key that cannot sign", change)
        keys.append(Key(path, public))
    return tuple(keys)


@dataclass(frozen=True)
class Signature:
    """An unverified signature of an image."""

    media_type: str  # SIMPLE or BUNDLE
    content: bytes
    annotation: str = ""  # the signature in base64, if it is not in the content

    def wrong(self, *, digest: str, keys: Iterable[Key]) -> str | None:
        """Why it is not a signature of `digest` by one of `keys`, or None."""
        if self.media_type == BUNDLE:
            return bundle(self.content, digest=digest, keys=keys)
        return simple(self.content, self.annotation, digest=digest, keys=keys)


def refusal(signatures: Iterable[Signature], *, digest: str, keys: Iterable[Key]) -> str | None:
    """Why an image with these signatures is not signed by one of `keys`, or None."""
    known = tuple(keys)
    wrong = [each.wrong(digest=digest, keys=known) for each in signatures]
    if None in wrong:
        return None
    if not wrong:
        return "is not signed"
    return f"has {len(wrong)} signature{'s' * (len(wrong) > 1)}; none is valid: it {wrong[0]}"


def simple(payload: bytes, signature: str, *, digest: str, keys: Iterable[Key]) -> str | None:
    """Why a "simple signing" document does not sign `digest` by one of `keys`, or None.

    `signature` is in base64, as in the annotation.
    """
    raw = _decoded(signature)
    if raw is None or not any(key.signed(payload, raw) for key in keys):
        return "is not by any of the keys"
    try:
        critical = files.parse_json(payload)["critical"]
        kind, named = critical["type"], critical["image"]["docker-manifest-digest"]
    except (ValueError, KeyError, TypeError):
        return "signs something that is not an image"
    return None if (kind, named) == (_TYPE, digest) else "signs another image"


def bundle(data: bytes, *, digest: str, keys: Iterable[Key]) -> str | None:
    """Why a Sigstore bundle does not sign `digest` by one of `keys`, or None."""
    try:
        envelope = files.parse_json(data)["dsseEnvelope"]
        kind, payload = envelope["payloadType"], _decoded(envelope["payload"])
        signatures = [_decoded(each["sig"]) for each in envelope["signatures"]]
    except (ValueError, KeyError, TypeError):
        return "is not a bundle with a signed statement"
    if kind != IN_TOTO or payload is None:
        return "is not a bundle with a signed statement"
    text = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    if not any(key.signed(text, raw) for key in keys for raw in signatures if raw):
        return "is not by any of the keys"
    try:
        statement: dict[str, Any] = files.parse_json(payload)
        named = {f"sha256:{subject['digest']['sha256']}" for subject in statement["subject"]}
        signs = statement["predicateType"] == SIGNED
    except (ValueError, KeyError, TypeError):
        return "signs something that is not an image"
    return None if signs and digest in named else "signs another image, or something else of it"


def _decoded(text: Any) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        return None
