"""Batches of records: NDJSON, zstd (RFC 8878), signed by the device.

Invariants: the signature covers topic, header and payload and is checked before anything is parsed; a batch covers
every seq from `first` to `last`, and a seq in that range with no record was let go and is told of by a `loss`
record; unpacking never takes more than `MAX_BATCH` bytes, whatever the frame claims.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import msgspec
import zstandard

from edge_agent.wire.errors import BadSignature, TooBig, Undecodable, VersionRefused
from edge_agent.wire.messages import MAX_DEPTH, Record, check_depth
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import VERSION

MAX_BATCH = 256 * 1024
CONTENT_TYPE = "ndjson+zstd"
_LARGEST = 2**63 - 1
_decoder = msgspec.json.Decoder(Record)
_local = threading.local()


class Header(msgspec.Struct, frozen=True):
    """What a batch covers: seqs `first` to `last`, both included, of `epoch`."""

    epoch: int
    first: int
    last: int


class Batch(msgspec.Struct, frozen=True):
    """What goes out: the payload and the MQTT user properties beside it."""

    payload: bytes
    properties: dict[str, str]


def _header_bytes(properties: Mapping[str, str]) -> bytes:
    return ";".join(f"{k}={properties.get(k, '')}" for k in ("v", "epoch", "first", "last", "ct")).encode()


def encode_batch(lines: Sequence[bytes], key: SigningKey, topic: str, header: Header) -> Batch:
    """Pack encoded records, an object a line, no newline at an end. Raises TooBig past MAX_BATCH bytes of NDJSON."""
    text = b"\n".join(lines)
    if len(text) > MAX_BATCH:
        raise TooBig(f"a batch of {len(text)} bytes of NDJSON; at most {MAX_BATCH}")
    packer = getattr(_local, "packer", None)
    if packer is None:
        packer = _local.packer = zstandard.ZstdCompressor(level=3)
    payload: bytes = packer.compress(text)
    properties = {
        "v": str(VERSION),
        "epoch": str(header.epoch),
        "first": str(header.first),
        "last": str(header.last),
        "ct": CONTENT_TYPE,
    }
    properties["sig"] = key.sign(topic, payload, _header_bytes(properties))
    return Batch(payload, properties)


def verify_batch(topic: str, payload: bytes, properties: Mapping[str, str], key: VerifyKey) -> Header:
    """What the batch covers. Raises BadSignature, then VersionRefused, then Undecodable."""
    if len(properties) > 16 or any(len(value) > 200 for value in properties.values()):
        raise BadSignature(f"more user properties on {topic} than a batch has")
    key.verify(topic, payload, properties.get("sig", ""), _header_bytes(properties))
    if properties.get("v") != str(VERSION):
        raise VersionRefused(f"protocol version {properties.get('v')} spoke; this side speaks version {VERSION}")
    try:
        header = Header(int(properties["epoch"]), int(properties["first"]), int(properties["last"]))
    except (KeyError, ValueError) as error:
        raise Undecodable(f"the batch header is not numbers: {error}") from None
    if not (0 < header.epoch <= _LARGEST and 0 < header.first <= header.last <= _LARGEST):
        raise Undecodable(f"the batch header makes no sense: {header}")
    return header


def decode_records(header: Header, payload: bytes, content_type: str = CONTENT_TYPE) -> list[Record]:
    """The records, in order of seq. Raises TooBig or Undecodable; both are covered by the ack."""
    if content_type != CONTENT_TYPE:
        raise Undecodable(f"content type {content_type!r}; this side reads {CONTENT_TYPE}")
    text = unpack(payload)
    try:
        records = _decoder.decode_lines(text)
        opened = text.count(b"{") + text.count(b"[") - 2 * len(records)  # beyond each record and its body
        if opened + 2 > MAX_DEPTH:
            _check_depth(text, records)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(f"not records: {error}") from None
    seq = header.first - 1
    for record in records:
        if not seq < record.seq <= header.last:
            raise Undecodable(f"seq {record.seq} after {seq} in a batch of {header.first} to {header.last}")
        seq = record.seq
    return records


def _check_depth(text: bytes, records: Sequence[Record]) -> None:
    between = text.count(b"\n") == text.count(b"}\n{")  # else a record may stretch over lines
    if not between or any(line.count(b"{") + line.count(b"[") > MAX_DEPTH for line in text.split(b"\n")):
        for record in records:
            check_depth(record.body)


def unpack(payload: bytes) -> bytes:
    """At most MAX_BATCH bytes of NDJSON. Raises TooBig or Undecodable."""
    if len(payload) > MAX_BATCH + 1024:
        raise TooBig(f"a batch of {len(payload)} packed bytes")
    try:
        size = zstandard.frame_content_size(payload)
        if not 0 <= size <= MAX_BATCH:
            raise TooBig(f"a batch that claims {size} bytes unpacked; it must say at most {MAX_BATCH}")
        unpacker = zstandard.ZstdDecompressor(max_window_size=8 << 20)
        return unpacker.decompress(payload, max_output_size=MAX_BATCH, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Undecodable(f"not a zstd frame: {error}") from None
