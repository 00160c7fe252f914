"""Every released message, as bytes in golden/v1.json: what once was written is read for ever, and written the same.

A new message is added by running this module (`python tests/wire/test_golden.py`); it never changes an old line.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.wire.batch import Header, decode_records, encode_batch, verify_batch
from edge_agent.wire.bundle import (
    BundleKind,
    Directive,
    FileEntry,
    Manifest,
    Sealed,
    Target,
    open_directive,
    open_root,
    seal_directive,
    seal_root,
)
from edge_agent.wire.chunks import Chunk, chunk_hash, decode_index, encode_index
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk, sign_grants, verify_grants
from edge_agent.wire.messages import (
    Ack,
    Desired,
    Job,
    JobKind,
    JobReport,
    JobState,
    Loss,
    LossReason,
    Presence,
    PresenceState,
    Record,
    decode,
    encode,
)
from edge_agent.wire.signing import SigningKey

GOLDEN = Path(__file__).parent / "golden" / "v1.json"
KEY = SigningKey.from_seed(bytes(range(32)))
TOPIC = "outrider/1/plant/press-1/up"
RECORDS = [
    Record(7, 1800000000.25, "telemetry", 5, {"vibration": 2.5, "line": 1, "ok": True, "note": "é"}),
    Record(9, 1800000001.0, "loss", 0, {"reason": "quota", "first_seq": 8, "last_seq": 8, "count": 1}),
]
MANIFEST = Manifest(
    "net",
    "1.2",
    BundleKind.ONNX,
    [FileEntry("model.onnx", 3, "ab" * 32)],
    license="Apache-2.0",
    meta={"source": "here"},
)
SINCE = ("configure:device", "run:model", "create:offline-token", "upload:blob", "manage:rollout", "read:rollout")
ROLES = {role: [p for p in given if p not in SINCE] for role, given in SHIPPED_ROLES.items()}  # as they were then
GRANTS = Grants(3, 1800000000.0, 1900000000.0, ROLES, [public_jwk(KEY.public)], {"eve": 1.0})
MESSAGES: dict[str, msgspec.Struct] = {
    "Presence": Presence(PresenceState.ONLINE, 1800000000.5, 17, 42, "nonce", "0.1.0"),
    "Ack": Ack(17, 42, 1800000000.5, "nonce"),
    "Desired": Desired(4, 1800000000.5, {"bundles": {"net": {"version": "1.2"}}}),
    "Job": Job("j1", JobKind.TASK, {"text": "Stop line 2"}, "ann", ["operator"], 1.0, 2.0, "key"),
    "JobReport": JobReport("j1", JobState.SUCCEEDED, 1.5, {"answer": "done"}, ""),
    "Loss": Loss(LossReason.QUOTA, 3, 9, 7, {"9": 7}),
    "Record": RECORDS[0],
    "Manifest": MANIFEST,
}

DIRECTIVE = Directive("plant", "press-7", "aarch64", 3, 1800000000.5, {"net": Target("1.2", "a" * 64)})
ROOT = b'{"signed":{"_type":"root"}}'
CHUNKS = [
    Chunk(0, 0, 3, chunk_hash(b"abc"), "5" * 64, 100, 3),
    Chunk(0, 3, 2, chunk_hash(b"de"), "5" * 64, 103, 2),
    Chunk(1, 0, 3, chunk_hash(b"abc"), "5" * 64, 100, 3),
]


def make() -> dict[str, Any]:
    packed = encode_batch([encode(r) for r in RECORDS], KEY, TOPIC, Header(17, 7, 9))
    return {
        **{name: encode(message).decode() for name, message in MESSAGES.items()},
        "batch": {"payload": base64.b64encode(packed.payload).decode(), "properties": packed.properties},
        "directive": msgspec.to_builtins(seal_directive(KEY, DIRECTIVE)),
        "root": msgspec.to_builtins(seal_root(KEY, ROOT)),
        "index": base64.b64encode(encode_index([2, 1], CHUNKS)).decode(),
        "grants": sign_grants(KEY, GRANTS),
    }


golden: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_released_message_is_read_and_written_as_it_was(name: str) -> None:
    message = MESSAGES[name]
    assert decode(type(message), golden[name].encode()) == message
    assert encode(message).decode() == golden[name]


def test_a_released_batch_is_still_read() -> None:
    payload, properties = base64.b64decode(golden["batch"]["payload"]), golden["batch"]["properties"]
    header = verify_batch(TOPIC, payload, properties, KEY.public)
    assert header == Header(17, 7, 9)
    assert decode_records(header, payload) == RECORDS


def test_a_released_chunk_index_is_still_read() -> None:
    files = [FileEntry("a", 5, "0" * 64), FileEntry("b", 3, "1" * 64)]
    assert list(decode_index(base64.b64decode(golden["index"]), files).chunks()) == CHUNKS


def test_a_released_directive_root_and_grants_still_verify() -> None:
    assert open_directive(KEY.public, msgspec.convert(golden["directive"], Sealed)) == DIRECTIVE
    assert open_root(KEY.public, msgspec.convert(golden["root"], Sealed)) == ROOT
    assert verify_grants(KEY.public, golden["grants"]) == GRANTS


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({**make(), **golden}, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{GOLDEN}\n")
