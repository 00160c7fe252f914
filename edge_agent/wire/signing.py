"""Ed25519 signatures (RFC 8032) over topic, header and payload.

Invariants: what is signed is `outrider/1 NUL topic NUL header NUL payload`, so a signature made for one topic is
worth nothing on another; a signature has exactly one text form, so no bit of it can be changed unseen.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_agent.wire import durable
from edge_agent.wire.errors import BadSignature

_DOMAIN = b"outrider/1"


def to_text(data: bytes) -> str:
    """base64url without padding (RFC 4648 section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def from_text(text: str) -> bytes:
    """The inverse of `to_text`, strict: raises ValueError for any other spelling of the same bytes."""
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"not base64url: {error}") from None
    if to_text(data) != text:
        raise ValueError("not canonical base64url")
    return data


def _message(topic: str, header: bytes, payload: bytes) -> bytes:
    return b"\0".join((_DOMAIN, topic.encode(), header, payload))


class VerifyKey:
    """A public key."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self.key = key
        self.raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    @staticmethod
    def from_text(text: str) -> VerifyKey:
        """Raises ValueError when it is not a public key."""
        return VerifyKey(Ed25519PublicKey.from_public_bytes(from_text(text)))

    @property
    def text(self) -> str:
        return to_text(self.raw)

    @property
    def key_id(self) -> str:
        """The first 16 hex digits of SHA-256 of the raw key."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verify(self, topic: str, payload: bytes, signature: str, header: bytes = b"") -> None:
        """Raises BadSignature."""
        try:
            self.key.verify(from_text(signature), _message(topic, header, payload))
        except (InvalidSignature, ValueError):
            raise BadSignature(f"the signature on {topic} was not made by key {self.key_id} over this") from None


class SigningKey:
    """A private key; `save` keeps it readable by its owner alone."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.key = key
        self.public = VerifyKey(key.public_key())

    @staticmethod
    def generate() -> SigningKey:
        return SigningKey(Ed25519PrivateKey.generate())

    @staticmethod
    def from_seed(seed: bytes) -> SigningKey:
        """A key of 32 given bytes: for golden files."""
        return SigningKey(Ed25519PrivateKey.from_private_bytes(seed))

    @staticmethod
    def load(path: Path) -> SigningKey:
        """Raises OSError, or ValueError when the file is not an Ed25519 key in PEM."""
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds a {type(key).__name__}, not an Ed25519 key")
        return SigningKey(key)

    def save(self, path: Path) -> None:
        """Write PKCS#8 PEM with mode 0600, whole or not at all."""
        pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        durable.write(path, pem, 0o600)

    @staticmethod
    def load_or_create(path: Path) -> SigningKey:
        """The key at `path`, made there at the first call."""
        if path.exists():
            return SigningKey.load(path)
        key = SigningKey.generate()
        key.save(path)
        return key

    def sign(self, topic: str, payload: bytes, header: bytes = b"") -> str:
        """The signature as base64url."""
        return to_text(self.key.sign(_message(topic, header, payload)))
