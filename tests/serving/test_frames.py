"""The frames: what is sent arrives, and what is malformed ends the channel, never the process."""

import asyncio
import contextlib
import itertools
import os
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.serving import frames
from edge_agent.serving.frames import AsyncChannel, BadFrame, Channel
from edge_agent.wire.tensor import Tensor

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ids = st.integers(0, 2**31)
ZEROS = bytes(frames.ARENA)
tensors = st.builds(
    Tensor, st.sampled_from(["float32", "uint8"]), st.lists(st.integers(0, 9), max_size=4), st.binary(max_size=64)
)
messages: Any = st.one_of(
    st.builds(frames.Infer, ids, st.text(max_size=9), st.dictionaries(st.text(max_size=9), tensors, max_size=3)),
    st.builds(frames.GenerateReq, ids, st.text(max_size=9), st.builds(Generate, st.text(), st.text())),
    st.builds(frames.PieceMsg, ids, st.builds(Piece, st.text(), st.booleans())),
    st.builds(
        frames.Call, ids, st.text(max_size=9), st.dictionaries(st.text(max_size=9), plain, max_size=3), st.floats(0, 9)
    ),
    st.builds(frames.CallResult, ids, st.booleans(), plain, st.text()),
    st.builds(
        frames.Calls, ids, st.lists(st.tuples(st.text(max_size=9), st.just({"line": 1})), max_size=3), st.floats(0, 9)
    ),
    st.builds(frames.CallResults, ids, st.lists(st.builds(frames.CallResult, ids, st.booleans(), plain), max_size=3)),
    st.builds(frames.Specs, st.binary(max_size=64)),
    st.builds(frames.Ping, ids),
)


@given(messages)
def test_a_message_survives_the_round_trip(message: frames.Message) -> None:
    assert frames.decode(frames.encode(message)[4:]) == message


@given(st.binary(max_size=64))
def test_bytes_from_anywhere_decode_or_are_a_bad_frame(payload: bytes) -> None:
    with contextlib.suppress(BadFrame):
        frames.decode(payload)


@given(st.lists(st.integers(0, 2 * 10**7) | st.none(), max_size=30), st.randoms(use_true_random=False))
def test_rooms_lie_apart_and_what_is_given_back_is_free_again(sizes: list[int | None], dice: Any) -> None:
    arena, fd = frames.Arena.new()
    os.close(fd)
    rooms = list[tuple[int, int]]()
    for size in sizes:
        if size is None and rooms:
            arena.give(rooms.pop(dice.randrange(len(rooms))))
        elif size is not None:
            room = arena.take({"x": Tensor("uint8", [size], memoryview(ZEROS)[:size])})  # type: ignore[arg-type]
            assert room[1] == 0 or (room[1] >= size and sum(room) <= frames.ARENA)
            rooms.append(room)
        taken = sorted(room for room in rooms if room[1])
        assert all(sum(one) <= other[0] for one, other in itertools.pairwise(taken))
    for room in rooms:
        arena.give(room)
    assert arena.take({"x": Tensor("uint8", [frames.ARENA], ZEROS)}) == (0, frames.ARENA)


def test_data_in_a_room_is_what_was_put_there_and_a_wrong_size_is_a_bad_frame() -> None:
    arena, fd = frames.Arena.new()
    os.close(fd)
    tensors = {"a": Tensor("uint8", [3], b"abc"), "b": Tensor("uint8", [20_000], b"b" * 20_000)}
    room = arena.take(tensors)
    shown, sizes = arena.put(room, tensors)
    assert arena.get(room, shown, sizes) == tensors
    assert [tensor.data for tensor in shown.values()] == [b"", b""]
    assert arena.put((0, 0), tensors) == (tensors, [])
    for wrong in ([3], [3, 30_000]):
        with pytest.raises(BadFrame, match="room"):
            arena.get(room, shown, wrong)


def test_a_room_that_is_lent_is_free_when_its_last_view_is_gone_on_whichever_thread() -> None:
    arena, fd = frames.Arena.new()
    os.close(fd)
    tensors = {"a": Tensor("uint8", [30_000], b"a" * 30_000), "b": Tensor("uint8", [3], b"bcd")}
    room = arena.take(tensors | {"c": Tensor("uint8", [90_000], ZEROS[:90_000])})
    shown, sizes = arena.put(room, tensors)
    lent = arena.get(room, shown, sizes, lent=True)
    assert lent == tensors
    small = {"x": Tensor("uint8", [20_000], ZEROS[:20_000])}
    assert arena.take(small) == (30_080, 20_032)  # what the answer needs is kept, and no more
    part = memoryview(lent["b"].data)[1:]
    with pytest.raises(TypeError, match="read-only"):
        part[0] = 0
    del lent
    assert arena.take(small) == (50_112, 20_032)
    assert bytes(part) == b"cd"
    views = [part]
    del part
    with ThreadPoolExecutor(1) as threads:
        threads.submit(views.clear).result()
    assert arena.take(small) == (0, 20_032)


async def test_both_ends_talk_and_large_tensors_pass() -> None:
    ours, theirs = socket.socketpair()
    daemon, child = await AsyncChannel.open(ours), Channel(theirs)
    request = frames.Infer(1, "det", {"x": Tensor("uint8", [8_000_000], bytes(8_000_000))})

    def serve() -> None:
        assert child.receive() == request
        child.send(frames.InferResult(1, request.inputs))

    serving = asyncio.create_task(asyncio.to_thread(serve))
    await daemon.send(request)
    assert await daemon.receive() == frames.InferResult(1, request.inputs)
    await serving
    child.close()
    assert await daemon.receive() is None
    daemon.close()
    with pytest.raises(Retry):
        await daemon.send(frames.Ping(1))
    daemon.close()


async def test_too_big_a_message_is_refused_and_the_channel_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 1000)
    ours, theirs = socket.socketpair()
    daemon, child = await AsyncChannel.open(ours), Channel(theirs)
    with pytest.raises(Refused, match="does not fit"):
        child.send(frames.Specs(bytes(2000)))
    child.send(frames.Pong(7))
    assert await daemon.receive() == frames.Pong(7)
    daemon.close()
    child.close()


async def test_an_announced_oversized_frame_is_a_bad_frame_on_both_sides() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack(">I", frames.MAX_FRAME + 1))
    daemon = await AsyncChannel.open(ours)
    with pytest.raises(BadFrame, match="announced"):
        await daemon.receive()
    daemon.close()
    theirs.close()
    left, right = socket.socketpair()
    left.sendall(struct.pack(">I", frames.MAX_FRAME + 1))
    with pytest.raises(BadFrame, match="announced"):
        Channel(right).receive()
    left.close()
    right.close()


def test_an_error_keeps_what_happens_next() -> None:
    assert isinstance(frames.Error.of(3, Retry("busy", "wait")).exception(), Retry)
    refused = frames.Error.of(3, KeyError("x")).exception()
    assert isinstance(refused, Refused)
    assert "KeyError" in refused.message
    assert frames.Error.of(3, Fatal("no")).kind == "fatal"


def test_an_unknown_message_kind_is_a_bad_frame() -> None:
    with pytest.raises(BadFrame):
        frames.decode(msgspec.msgpack.encode({"t": "surprise", "id": 1}))
