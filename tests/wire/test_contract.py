"""The contract, as properties: what is written is read back, what is changed is refused, what is new is survived."""

import json

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.wire.batch import MAX_BATCH, Header, decode_records, encode_batch, verify_batch
from edge_agent.wire.errors import BadSignature, TooBig, Undecodable, VersionRefused, WireError
from edge_agent.wire.messages import (
    JOB_TRANSITIONS,
    MAX_DEPTH,
    TERMINAL,
    Ack,
    Desired,
    JobReport,
    JobState,
    Presence,
    Record,
    check_depth,
    decode,
    encode,
)
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, from_text, to_text
from edge_agent.wire.topics import Topic, TopicKind

KEY = SigningKey.from_seed(bytes(range(32)))
TOPIC = "outrider/1/plant/press-1/up"

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
bodies = st.dictionaries(st.text(max_size=10), scalars | st.lists(scalars, max_size=4), max_size=4)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Header, list[Record]]:
    first = draw(st.integers(1, 2**40))
    seqs = sorted(draw(st.sets(st.integers(first, first + 30), max_size=12)))
    header = Header(draw(st.integers(1, 2**50)), first, first + 30)
    return header, [
        Record(seq, draw(st.floats(0, 2e9)), draw(names), draw(st.integers(0, 9)), draw(bodies)) for seq in seqs
    ]


@given(names, names, st.sampled_from(TopicKind))
def test_a_topic_is_parsed_back_to_itself(fleet: str, device: str, kind: TopicKind) -> None:
    topic = Topic(fleet, kind, None if kind is TopicKind.GRANTS else device)
    assert Topic.parse(str(topic)) == topic


@pytest.mark.parametrize(
    "text",
    ["", "outrider/1", "outrider/1/f/d/nope", "outrider/1/f/+/up", "other/1/f/d/up", "outrider/1/f/d/grants",
     "outrider/1/f/up", "outrider/1/F/d/up", "outrider/1/f/d/up/", "outrider/1/f/d\n/up"],
)  # fmt: skip
def test_what_is_not_a_topic_of_ours_does_not_parse(text: str) -> None:
    with pytest.raises(Undecodable):
        Topic.parse(text)


def test_a_topic_of_another_version_is_refused_by_its_name() -> None:
    with pytest.raises(VersionRefused, match="version 7"):
        Topic.parse("outrider/7/f/d/up")


@given(batches())
def test_a_batch_is_read_back_whole(batch: tuple[Header, list[Record]]) -> None:
    header, records = batch
    packed = encode_batch([encode(r) for r in records], KEY, TOPIC, header)
    assert verify_batch(TOPIC, packed.payload, packed.properties, KEY.public) == header
    assert decode_records(header, packed.payload) == records


@given(batches(), st.data())
def test_any_flipped_bit_of_a_batch_is_refused(batch: tuple[Header, list[Record]], data: st.DataObject) -> None:
    header, records = batch
    packed = encode_batch([encode(r) for r in records], KEY, TOPIC, header)
    where = data.draw(st.sampled_from(["payload", *packed.properties]))
    raw = packed.payload if where == "payload" else packed.properties[where].encode()
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << (bit % 8)
    payload, properties = packed.payload, dict(packed.properties)
    if where == "payload":
        payload = bytes(flipped)
    else:
        properties[where] = flipped.decode("latin-1")
    with pytest.raises(BadSignature):
        verify_batch(TOPIC, payload, properties, KEY.public)


def test_a_batch_replayed_on_another_devices_topic_is_refused() -> None:
    packed = encode_batch([encode(Record(1, 0.0, "telemetry", 5, {}))], KEY, TOPIC, Header(1, 1, 1))
    with pytest.raises(BadSignature):
        verify_batch("outrider/1/plant/press-2/up", packed.payload, packed.properties, KEY.public)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"not zstd", Undecodable),
        (zstandard.compress(b"not json"), Undecodable),
        (zstandard.compress(b'{"seq":1}'), Undecodable),
        (zstandard.compress(b'{"seq":9,"ts":0,"kind":"a","priority":5,"body":{}}'), Undecodable),
        (zstandard.compress(b"[" * 100_000), Undecodable),
        (zstandard.compress(bytes(MAX_BATCH + 1)), TooBig),
        (zstandard.compress(b"some text")[:-1], Undecodable),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26)), TooBig),
        (zstandard.compress(b"{}") + b"tail", Undecodable),
    ],
)
def test_a_signed_batch_that_makes_no_sense_is_refused_within_bounds(payload: bytes, error: type[WireError]) -> None:
    with pytest.raises(error):
        decode_records(Header(1, 1, 1), payload)


def test_a_frame_that_lies_about_its_size_never_unpacks_past_the_bound() -> None:
    bomb = bytearray(zstandard.compress(bytes(200_000)))
    assert len(bomb) < 100
    with pytest.raises(Undecodable):
        decode_records(Header(1, 1, 1), bytes(bomb))


def test_a_batch_past_the_limit_is_not_made() -> None:
    with pytest.raises(TooBig):
        encode_batch([b"x" * (MAX_BATCH + 1)], KEY, TOPIC, Header(1, 1, 1))


@pytest.mark.parametrize("header", [Header(0, 1, 1), Header(1, 0, 1), Header(1, 2, 1), Header(1, 1, 2**63)])
def test_a_signed_header_that_makes_no_sense_is_refused(header: Header) -> None:
    packed = encode_batch([], KEY, TOPIC, header)
    with pytest.raises(Undecodable):
        verify_batch(TOPIC, packed.payload, packed.properties, KEY.public)


@given(st.text(max_size=8), scalars)
def test_a_field_of_a_later_version_is_survived(name: str, value: object) -> None:
    message = json.loads(encode(Ack(3, 9, 1.5, "n")))
    message.setdefault(name, value)
    assert decode(Ack, json.dumps(message).encode()) == Ack(3, 9, 1.5, "n")


@given(st.text().filter(lambda text: text not in list(JobState)))
def test_a_state_of_a_later_version_reads_as_unknown(state: str) -> None:
    report = {"id": "j", "state": state, "ts": 1}
    assert decode(JobReport, json.dumps(report).encode()).state is JobState.UNKNOWN


@pytest.mark.parametrize("kind", [Ack, Presence, Desired])
def test_another_major_version_is_refused_by_its_name(kind: type) -> None:
    with pytest.raises(VersionRefused, match="version 2 spoke"):
        decode(kind, b'{"v": 2, "something": "else"}')


@given(st.binary(max_size=60))
def test_noise_is_undecodable_and_nothing_else(noise: bytes) -> None:
    with pytest.raises((Undecodable, VersionRefused)):
        decode(Presence, noise)


@given(st.data())
def test_any_flipped_bit_of_a_sealed_message_is_refused(data: st.DataObject) -> None:
    payload, properties = seal(KEY, TOPIC, Desired(4, 1.0, {"bundles": {"a": "1"}}))
    assert unseal(KEY.public, TOPIC, payload, properties, Desired).version == 4
    bit = data.draw(st.integers(0, len(payload) * 8 - 1))
    flipped = bytearray(payload)
    flipped[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(BadSignature):
        unseal(KEY.public, TOPIC, bytes(flipped), properties, Desired)


@given(st.binary(max_size=80))
def test_bytes_have_one_base64url_spelling(data: bytes) -> None:
    text = to_text(data)
    assert from_text(text) == data
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for other in (text + "=", *(text[:-1] + c for c in alphabet if text and c != text[-1])):
        try:
            assert from_text(other) != data
        except ValueError:
            continue


def test_a_job_ends_once() -> None:
    assert set(JOB_TRANSITIONS) == set(JobState) - {JobState.UNKNOWN}
    assert all(JOB_TRANSITIONS[state] == frozenset() for state in TERMINAL)
    assert all(JobState.QUEUED not in after for after in JOB_TRANSITIONS.values())


def test_records_are_written_with_every_field() -> None:
    assert msgspec.json.decode(encode(Record(1, 2.0, "loss", 0, {}))) == {
        "seq": 1, "ts": 2.0, "kind": "loss", "priority": 0, "body": {},
    }  # fmt: skip


def nested(levels: int, wide: bool) -> dict[str, object]:
    """An object with that many levels of lists and objects in all."""
    value: object = "end [[[{{{"
    for level in range(levels - 1):
        value = [1, value] if level % 2 else {"a": value, "b": []} if wide and level > 1 else {"a": value}
    return {"x": value}


@given(st.integers(1, 3 * MAX_DEPTH), st.booleans())
def test_a_record_is_read_up_to_the_depth_and_dead_past_it(levels: int, wide: bool) -> None:
    record = Record(1, 1.0, "reported", 1, nested(levels, wide))
    batch = encode_batch([encode(record)], KEY, TOPIC, Header(1, 1, 1))
    if levels <= MAX_DEPTH:
        assert decode_records(Header(1, 1, 1), batch.payload) == [record]
        check_depth(record.body)
    else:
        with pytest.raises(Undecodable, match="deeper"):
            decode_records(Header(1, 1, 1), batch.payload)
        with pytest.raises(Undecodable, match="deeper"):
            check_depth(record.body)


def test_a_deep_record_that_is_written_over_lines_is_dead_too_whatever_stands_beside_it() -> None:
    line, n = encode(Record(1, 1.0, "reported", 1, {})), MAX_DEPTH - 2
    deep = line.replace(b'"body":{}', b'"body":{"a":' + (b"[" * n + b"\n") * 3 + b"]" * 3 * n + b"}")
    text = deep + b"".join(line.replace(b":1,", b":%d," % seq, 1) for seq in (2, 3, 4))
    assert text.count(b"\n") == 3
    with pytest.raises(Undecodable, match="deeper"):
        decode_records(Header(1, 1, 4), zstandard.compress(text))
