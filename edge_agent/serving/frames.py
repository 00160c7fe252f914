"""The frames the daemon and its child processes speak over an inherited AF_UNIX socketpair.

Invariants: a frame is a 4-byte big-endian length and one msgpack-encoded tagged message of at most MAX_FRAME bytes;
too big a message is Refused before a byte of it is written, so the channel stays usable; a frame that is too long or
cannot be decoded is BadFrame, after which the channel is closed. Requests carry an id of the side that asks, answers
(`*Result`, `Loaded`, `Adapted`, `PieceMsg`, `Error`) repeat it. The end of the socket is the end of the child: no
orphan stays. Tool specs and arguments travel as plain data, so nothing here knows the agent above.
The data of larger tensors lies in an `Arena` that an engine's worker shares with the daemon, which hands out its rooms:
one belongs to one request until that is answered, and its answer lies where its inputs lay, if there is room. Who asked
gets a view of it, and the room is free again when the last view of it is gone: an answer that is kept long is copied.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, cast

import msgspec

from edge_agent.engines.base import EngineInfo, Generate, Piece
from edge_agent.errors import Fatal, OutriderError, Refused, Retry
from edge_agent.serving.schedule import NORMAL, Serving
from edge_agent.wire.tensor import Tensor

MAX_FRAME = 64 * 1024 * 1024
FD_VARIABLE, ARENA_VARIABLE = "OUTRIDER_FD", "OUTRIDER_ARENA_FD"
ARENA = 64 * 1024 * 1024
_INLINE = 16 * 1024  # bytes of data that a message carries itself
_ALIGN = 64
_BUFFER = 1024 * 1024
_LENGTH = struct.Struct(">I")

ErrorKind = Literal["retry", "refused", "fatal"]


class BadFrame(OutriderError):
    """The peer does not speak the protocol: close the channel."""


class _Message(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower):
    pass


class Hello(_Message, frozen=True):
    """The child's first frame."""

    role: str
    pid: int


class Ready(_Message, frozen=True):
    """The child can serve; for a tool runner it follows its Specs."""


class Load(_Message, frozen=True):
    """Load a model folder under a name, replacing one of that name once it is ready. Answered by Loaded or Error.

    `beside`: the one before serves until then; else it is unloaded first, where memory cannot hold two.
    """

    id: int
    model: str
    path: str
    serving: Serving = NORMAL
    beside: bool = True


class Loaded(_Message, frozen=True):
    id: int
    model: str
    info: EngineInfo


class Adapt(_Message, frozen=True):
    """Load an adapter folder into a loaded language model, or drop it (`path` empty). Answered by Adapted or Error."""

    id: int
    model: str
    adapter: str
    path: str


class Adapted(_Message, frozen=True):
    id: int


class Infer(_Message, frozen=True):
    """Run a network once; a tool runner sends it to the daemon too. Answered by InferResult or Error.

    `priority` is 0 (first) to 3; what does not begin `within_s` is not run. `room` is a place in the arena and its
    size; with `sizes` the data of the inputs lies there.
    """

    id: int
    model: str
    inputs: dict[str, Tensor]
    priority: int = 2
    within_s: float = 0.0
    room: tuple[int, int] = (0, 0)
    sizes: list[int] = []


class InferResult(_Message, frozen=True):
    """With `sizes` the data lies in the request's room."""

    id: int
    outputs: dict[str, Tensor]
    sizes: list[int] = []


class GenerateReq(_Message, frozen=True):
    """Stream a completion. Answered by PieceMsg until one is `done`, or Error."""

    id: int
    model: str
    request: Generate
    priority: int = 2
    within_s: float = 0.0


class PieceMsg(_Message, frozen=True):
    id: int
    piece: Piece


class Cancel(_Message, frozen=True):
    """Stop a request; it is still answered."""

    id: int


class Call(_Message, frozen=True):
    """Run a tool with validated arguments. Answered by CallResult or Error."""

    id: int
    tool: str
    args: dict[str, Any]
    timeout_s: float


class CallResult(_Message, frozen=True):
    """`ok` with a result, or the text of an ordinary ToolError in `error`."""

    id: int
    ok: bool
    result: Any = None
    error: str = ""


class Calls(_Message, frozen=True):
    """Run tools one after the other; what is not begun within `begin_s` is left out. Answered by CallResults, Error."""

    id: int
    calls: list[tuple[str, dict[str, Any]]]
    begin_s: float


class CallResults(_Message, frozen=True):
    """One for each call, in order."""

    id: int
    results: list[CallResult]


class Specs(_Message, frozen=True):
    """What a tool runner offers; decode with `msgspec.msgpack.decode(specs, type=list[ToolSpec])`."""

    specs: bytes


class Error(_Message, frozen=True):
    """A request failed; the child lives on."""

    id: int
    kind: ErrorKind
    message: str
    hint: str = ""

    def exception(self) -> OutriderError:
        """The error as the asking side raises it; a child's Fatal is this request's Refused."""
        return (Retry if self.kind == "retry" else Refused)(self.message, self.hint)

    @classmethod
    def of(cls, id: int, error: BaseException) -> Error:
        """Any exception as the answer to request `id`; an unexpected one keeps its type's name."""
        if isinstance(error, OutriderError):
            kind: ErrorKind = (
                "retry" if isinstance(error, Retry) else "fatal" if isinstance(error, Fatal) else "refused"
            )
            return cls(id, kind, error.message, error.hint)
        return cls(id, "refused", f"{type(error).__name__}: {error}")


class Ping(_Message, frozen=True):
    n: int


class Served(msgspec.Struct, frozen=True):
    """What a model has done since it was loaded, its pace now, and how its compiled engine is coming along: `engine_*`
    are its phase, steps done and steps in all of that, and of a whole build the seconds and MiB at most.
    """

    requests: int = 0
    failed: int = 0
    expired: int = 0
    cached: int = 0
    runs: int = 0
    rows: int = 0
    busy_s: float = 0.0
    ewma_ms: float = 0.0
    engine: str = ""
    provider: str = ""
    lanes: int = 1
    batch: int = 1
    engine_phase: str = ""
    engine_done: int = 0
    engine_of: int = 0
    engine_build_s: float = 0.0
    engine_peak_mb: float = 0.0


class Pong(_Message, frozen=True):
    """`waiting` requests, and what was served by model."""

    n: int
    waiting: int = 0
    served: dict[str, Served] = {}


Message = (
    Hello | Ready | Load | Loaded | Adapt | Adapted | Infer | InferResult | GenerateReq | PieceMsg
    | Cancel | Call | CallResult | Calls | CallResults | Specs | Error | Ping | Pong
)  # fmt: skip
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytearray:
    """A whole frame, so that it is sent at once and wakes its reader once. Raises Refused when it is too large."""
    frame = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, frame, _LENGTH.size)
    size = len(frame) - _LENGTH.size
    if size > MAX_FRAME:
        raise Refused(
            f"{type(message).__name__} of {size} bytes does not fit a frame of {MAX_FRAME}",
            "send smaller inputs, for example a smaller image",
        )
    _LENGTH.pack_into(frame, 0, size)
    return frame


def decode(payload: bytes | bytearray) -> Message:
    """The message of a frame's payload. Raises BadFrame."""
    try:
        return _DECODER.decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadFrame(f"a frame cannot be decoded: {error}") from error


def _length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise BadFrame(f"a frame of {length} bytes is announced, the limit is {MAX_FRAME}")
    return int(length)


class Arena:
    """Memory that both ends see (its pages are taken when first written); the daemon's event loop gives out rooms."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, ARENA)
        self._view = memoryview(self._map)
        self._taken: dict[int, int] = {}  # the end of each room by its place
        self._back = deque[int]()  # rooms that no view is left of; views end on any thread

    @classmethod
    def new(cls) -> tuple[Arena, int]:
        """One, and the descriptor to pass down and close."""
        fd = os.memfd_create("outrider-arena")
        os.ftruncate(fd, ARENA)
        return cls(fd), fd

    @classmethod
    def inherited(cls) -> Arena | None:
        """The one that the daemon passed down, if it did."""
        fd = os.environ.get(ARENA_VARIABLE)
        return cls(int(fd)) if fd else None

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """The first room that is free for their data; of size 0 when there is none, or the data is small."""
        size, at = _size(tensors), 0
        while self._back:
            del self._taken[self._back.popleft()]
        for begin, end in sorted(self._taken.items()):
            if begin - at >= size:
                break
            at = end
        if size <= _INLINE or at + size > ARENA:
            return 0, 0
        self._taken[at] = at + size
        return at, size

    def give(self, room: tuple[int, int]) -> None:
        if room[1]:
            del self._taken[room[0]]

    def put(self, room: tuple[int, int], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        """What a message says of the tensors whose data is in the room; all, and no sizes, when it does not fit."""
        if not _INLINE < _size(tensors) <= room[1]:
            return tensors, []
        at, sizes = room[0], [len(tensor.data) for tensor in tensors.values()]
        for tensor, size in zip(tensors.values(), sizes, strict=True):
            self._view[at : at + size] = tensor.data
            at += _aligned(size)
        return {name: Tensor(tensor.dtype, tensor.shape, b"") for name, tensor in tensors.items()}, sizes

    def get(
        self, room: tuple[int, int], tensors: dict[str, Tensor], sizes: list[int], lent: bool = False
    ) -> dict[str, Tensor]:
        """The tensors of a message, with views of the room as their data. Raises BadFrame.

        `lent`: the room is given back by itself when the last of the views is gone, also after the process's end.
        """
        if not sizes:
            return tensors
        used = sum(map(_aligned, sizes))
        if len(sizes) != len(tensors) or used > room[1]:
            raise BadFrame(f"{len(tensors)} tensors of {sizes} bytes do not lie in a room of {room[1]}")
        view, at, got = self._view[room[0] : sum(room)], 0, dict[str, Tensor]()
        if lent:
            memory = (ctypes.c_ubyte * used).from_buffer(self._map, room[0])
            weakref.finalize(memory, self._back.append, room[0]).atexit = False
            view, self._taken[room[0]] = memoryview(memory).cast("B").toreadonly(), room[0] + used
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            got[name] = Tensor(tensor.dtype, tensor.shape, cast(bytes, view[at : at + size]))
            at += _aligned(size)
        return got


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(_aligned(len(tensor.data)) for tensor in tensors.values())


class Channel:
    """The child's end: blocking; `send` from any thread, `receive` from one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._reader = sock, sock.makefile("rb", _INLINE)
        self._sending = threading.Lock()

    @classmethod
    def inherited(cls) -> Channel:
        """The socket the daemon passed down. Raises Fatal when this process was not started by a daemon."""
        try:
            return cls(socket.socket(fileno=int(os.environ[FD_VARIABLE])))
        except (KeyError, ValueError, OSError) as error:
            raise Fatal(f"{FD_VARIABLE} names no socket", "this process is started by `outrider agent`") from error

    def send(self, message: Message) -> None:
        """Raises Refused (too big, nothing sent) or OSError (the daemon is gone)."""
        frame = encode(message)
        with self._sending:
            self._sock.sendall(frame)

    def receive(self) -> Message | None:
        """The next message, or None when the daemon is gone. Raises BadFrame."""
        try:
            header = self._reader.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                return None
            payload = self._reader.read(length := _length(header))
        except ConnectionError:
            return None
        return decode(payload) if len(payload) == length else None

    def close(self) -> None:
        self._reader.close()
        self._sock.close()


class AsyncChannel:
    """The daemon's end, on the event loop; `receive` from one task, `send` from any."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, sock: socket.socket) -> AsyncChannel:
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_BUFFER))

    async def send(self, message: Message) -> None:
        """Raises Refused (too big, nothing sent) or Retry (the child is gone)."""
        frame = encode(message)
        try:
            self._writer.write(frame)
            await self._writer.drain()
        except (ConnectionError, RuntimeError) as error:
            raise Retry("the child process is gone") from error

    async def receive(self) -> Message | None:
        """The next message, or None when the child is gone. Raises BadFrame."""
        try:
            length = _length(await self._reader.readexactly(_LENGTH.size))
            return decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        self._writer.close()
