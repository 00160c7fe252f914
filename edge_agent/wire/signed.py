"""Messages the hub signs for a device: ack, desired, jobs. A device's presence is sealed the same way.

Invariant: the signature is checked over topic and payload before the payload is parsed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from edge_agent.wire.messages import decode, encode
from edge_agent.wire.signing import SigningKey, VerifyKey

T = TypeVar("T")


def seal(key: SigningKey, topic: str, message: msgspec.Struct) -> tuple[bytes, dict[str, str]]:
    """Payload and user properties."""
    payload = encode(message)
    return payload, {"sig": key.sign(topic, payload)}


def unseal(key: VerifyKey, topic: str, payload: bytes, properties: Mapping[str, str], kind: type[T]) -> T:
    """Raises BadSignature before anything is parsed, then Undecodable or VersionRefused."""
    key.verify(topic, payload, properties.get("sig", ""))
    return decode(kind, payload)
