"""A child process behind an async face: spawned, watched, restarted, asked.

Invariants: every request ends within its timeout, with an answer, Retry or Refused; when the child dies all pending
requests fail with Retry and a new child starts after an exponential, capped delay with the same models and adapters
loaded; one that kills the child then is dropped, so one bad model cannot keep the others down; a new version that
kills it leaves the one before. A child that answers neither a ping nor a cancelled request is killed; its stderr goes
to the log; closing the socket is what ends it, so it never outlives the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.engines.base import EngineInfo, Generate, Piece
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.machine import ending, oom_kills
from edge_agent.rhythm import tick
from edge_agent.serving import frames
from edge_agent.serving.frames import Arena, AsyncChannel, BadFrame, Message
from edge_agent.serving.schedule import NORMAL, Serving
from edge_agent.wire.tensor import Tensor

Answer = Callable[[str, dict[str, Tensor]], Awaitable[dict[str, Tensor]]]
_KEPT_ENV = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")
_INNER_REQUESTS = 8
ADAPT_S = 60.0


class WorkerProcess:
    """One child. `answer` serves the inferences a tool runner asks for; the environment is scrubbed of secrets."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        answer: Answer | None = None,
        shares: bool = False,
        env: Mapping[str, str] | None = None,
        start_s: float = 120.0,
        ping_s: float = 5.0,
        hang_s: float = 30.0,
        grace_s: float = 10.0,
        backoff_s: tuple[float, float] = (0.25, 30.0),
    ) -> None:
        self.name, self._argv, self._answer, self._env = name, list(argv), answer, dict(env or {})
        self._shares = shares  # memory with the child; only an engine's worker is trusted with it
        self._start_s, self._ping_s, self._hang_s, self._grace_s = start_s, ping_s, hang_s, grace_s
        self._backoff_s = backoff_s
        self._log = logging.getLogger(f"outrider.{name}")
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Queue[Message | OutriderError]] = {}
        self._ready = asyncio.Event()
        self._channel: AsyncChannel | None = None
        self._arena: Arena | None = None
        self._rooms: dict[int, tuple[int, int]] = {}  # in the arena, by the request
        self._process: asyncio.subprocess.Process | None = None
        self._alive_at = 0.0
        self._loading, self._load_lock = "", asyncio.Lock()  # what is loaded again after a restart
        self._loads: dict[str, tuple[str, Serving]] = {}  # the folder of each model that is to be loaded
        self.served: dict[str, frames.Served] = {}
        self.waiting = 0
        self.infos: dict[str, EngineInfo] = {}
        self.adapters: dict[str, tuple[str, str]] = {}  # the model each one is loaded into, its folder
        self.specs: bytes = b""
        self.tail = deque[str](maxlen=40)  # the last lines of its log
        self.starts, self._ends, self._ending = 0, 0, ""
        self._given_up = ""  # why the child was killed by this process

    @classmethod
    def engine(cls, role: str, **options: Any) -> WorkerProcess:
        """The worker of an engine group: `language` or `network`."""
        return cls(role, [sys.executable, "-m", "edge_agent.serving.worker", role], shares=True, **options)

    @property
    def pid(self) -> int | None:
        """The child's process id while one runs."""
        return self._process.pid if self._process else None

    @property
    def connected(self) -> bool:
        """False as soon as the child's end is gone, before the process is."""
        return self._channel is not None

    async def ready(self, timeout_s: float) -> None:
        """Wait until the child serves. Raises Retry."""
        if self._ready.is_set():
            return
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can lose a cancellation
                await self._ready.wait()
        except TimeoutError as error:
            raise Retry(f"the {self.name} process is not ready", "its log says why it does not start") from error

    async def ending(self, start: int, timeout_s: float = 3.0) -> str:
        """How the child of that start ended; empty while it has not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._ends < start:  # noqa: ASYNC110 - it ends within the grace of `_bury`
                    await asyncio.sleep(0.01)
        return self._ending if self._ends >= start else ""

    async def run(self) -> None:
        """Keep a child running until cancelled."""
        delay = self._backoff_s[0]
        while True:
            began = time.monotonic()
            try:
                await self._one_life()
                reason = f"is gone: {self._ending}"
            except OSError as error:
                reason = f"did not start: {error}"
            if time.monotonic() - began > 60:
                delay = self._backoff_s[0]
            self._log.warning("the %s process %s; a new one starts in %.2f s", self.name, reason, delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, self._backoff_s[1])

    async def load(
        self, model: str, path: Path, timeout_s: float = 300.0, serving: Serving = NORMAL, beside: bool = True
    ) -> EngineInfo:
        """Load a model folder and keep it loaded over restarts. Raises Refused (bad model), Retry.

        The one before serves until the new one can, or (not `beside`) is unloaded first and comes back on failure.
        """
        await self.ready(timeout_s)
        try:
            info = await self._load(model, str(path), timeout_s, serving, beside)
        except OutriderError:
            if not beside and model in self._loads and self.connected:
                await self._load(model, self._loads[model][0], timeout_s, self._loads[model][1])
            raise
        self._loads[model] = str(path), serving
        self.adapters = {name: where for name, where in self.adapters.items() if where[0] != model}
        return info

    async def adapt(self, model: str, adapter: str, path: Path, timeout_s: float = ADAPT_S) -> None:
        """Load an adapter into a loaded model and keep it loaded over restarts. Raises Refused (bad adapter), Retry."""
        await self.ready(timeout_s)
        await self._adapt(model, adapter, str(path), timeout_s)
        self.adapters[adapter] = model, str(path)

    def runs(self, model: str, path: Path) -> bool:
        """Whether a model is loaded from that folder."""
        return self.connected and self._loads.get(model, ("",))[0] == str(path)

    def holds(self, model: str) -> bool:
        """Whether a version of a model is loaded."""
        return self.connected and model in self._loads

    async def drop(self, adapter: str) -> None:
        """Unload an adapter, after the requests that were sent before. Raises Refused, Retry."""
        model, _ = self.adapters.pop(adapter, ("", ""))
        if model:
            await self._adapt(model, adapter, "", ADAPT_S)

    async def infer(
        self, model: str, inputs: dict[str, Tensor], timeout_s: float = 60.0, priority: int = 2
    ) -> dict[str, Tensor]:
        """Run a network; class 0 goes first, 3 last. Raises Refused, Retry.

        Large outputs are views of memory that is shared with the child: copy what is kept for long.
        """
        await self.ready(timeout_s)

        def make(id: int) -> Message:
            if self._arena is None:
                return frames.Infer(id, model, inputs, priority, timeout_s)
            room = self._rooms[id] = self._arena.take(inputs)
            shown, sizes = self._arena.put(room, inputs)
            return frames.Infer(id, model, shown, priority, timeout_s, room, sizes)

        answer = await self._one(make, timeout_s)
        if not isinstance(answer, frames.InferResult):
            raise Retry(f"the {self.name} process answered {type(answer).__name__} to an inference")
        return answer.outputs

    async def generate(
        self, model: str, request: Generate, timeout_s: float = 120.0, priority: int = 2
    ) -> AsyncGenerator[Piece, None]:
        """Stream a completion; leaving the iteration cancels it. Raises Refused, Retry."""
        await self.ready(timeout_s)
        async with contextlib.aclosing(
            self._ask(lambda id: frames.GenerateReq(id, model, request, priority, timeout_s), timeout_s)
        ) as answers:
            async for answer in answers:
                if isinstance(answer, frames.PieceMsg):
                    yield answer.piece

    async def call(self, tool: str, args: dict[str, Any], timeout_s: float) -> frames.CallResult:
        """Run a tool; one that outlives its timeout and a grace is killed with its process. Raises Refused, Retry."""
        await self.ready(self._start_s)
        answer = await self._one(lambda id: frames.Call(id, tool, args, timeout_s), timeout_s + 1.0)
        if not isinstance(answer, frames.CallResult):
            raise Retry(f"the {self.name} process answered {type(answer).__name__} to a call")
        return answer

    async def call_all(self, calls: list[tuple[str, dict[str, Any]]], timeout_s: float) -> Sequence[frames.CallResult]:
        """Run tools that only read, in one message: each may take `timeout_s`, and begins within half of that or fails.

        Raises Refused, Retry.
        """
        await self.ready(self._start_s)
        answer = await self._one(lambda id: frames.Calls(id, calls, timeout_s / 2), 1.5 * timeout_s + 1.0)
        if not isinstance(answer, frames.CallResults):
            raise Retry(f"the {self.name} process answered {type(answer).__name__} to calls")
        return answer.results

    async def _load(self, model: str, path: str, timeout_s: float, serving: Serving, beside: bool = True) -> EngineInfo:
        answer = await self._change(lambda id: frames.Load(id, model, path, serving, beside), timeout_s)
        if not isinstance(answer, frames.Loaded):
            raise Retry(f"the {self.name} process answered {type(answer).__name__} to a load")
        self.infos[model] = answer.info
        return answer.info

    async def _adapt(self, model: str, adapter: str, path: str, timeout_s: float) -> None:
        await self._change(lambda id: frames.Adapt(id, model, adapter, path), timeout_s)

    async def _change(self, make: Callable[[int], Message], timeout_s: float) -> Message:
        async with self._load_lock:
            return await self._one(make, timeout_s)

    async def _one(self, make: Callable[[int], Message], timeout_s: float) -> Message:
        async with contextlib.aclosing(self._ask(make, timeout_s)) as answers:
            async for answer in answers:
                return answer
        raise Retry(f"the {self.name} process gave no answer")

    async def _ask(self, make: Callable[[int], Message], timeout_s: float) -> AsyncGenerator[Message, None]:
        channel, process = self._channel, self._process
        if channel is None or process is None:
            raise Retry(f"the {self.name} process is restarting")
        id = next(self._ids)
        answers = self._pending[id] = asyncio.Queue()
        deadline, finished = time.monotonic() + timeout_s, False
        try:
            try:
                await channel.send(make(id))
            except Refused:
                finished = True
                self._done(id)
                raise
            while not finished:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        answer = await answers.get()
                except TimeoutError as error:
                    raise Retry(f"the {self.name} process gave no answer within {timeout_s:g} s") from error
                finished = not (isinstance(answer, frames.PieceMsg) and not answer.piece.done)
                if isinstance(answer, OutriderError):
                    raise answer
                yield answer
        finally:
            if not finished and id in self._pending:
                if self._grace_s:
                    asyncio.get_running_loop().call_later(self._grace_s, self._kill_if_unanswered, id, process)
                    with contextlib.suppress(Retry):
                        await channel.send(frames.Cancel(id))
                else:
                    self._kill_if_unanswered(id, process)

    def _kill_if_unanswered(self, id: int, process: asyncio.subprocess.Process) -> None:
        if self._pending.pop(id, None) is not None and process.returncode is None:
            self._log.error("the %s process does not let go of a request; it is killed", self.name)
            self._ready.clear()
            self._given_up = "it did not let go of a request and was killed"
            process.kill()

    async def _one_life(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k in _KEPT_ENV or k.startswith("PYTHON")}
        environment |= self._env | {frames.FD_VARIABLE: str(theirs.fileno()), "PYTHONUNBUFFERED": "1"}
        with theirs, contextlib.ExitStack() as passed:
            fds = [theirs.fileno()]
            if self._shares:
                self._arena, fd = Arena.new()
                passed.callback(os.close, fd)
                environment[frames.ARENA_VARIABLE] = str(fd)
                fds.append(fd)
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=fds,
                env=environment,
            )
        self._process, self._alive_at, self.starts = process, time.monotonic(), self.starts + 1
        kills, self._given_up = oom_kills(), ""
        channel = self._channel = await AsyncChannel.open(ours)
        try:
            async with asyncio.TaskGroup() as group:
                logging_task = group.create_task(self._log_stderr(process))
                watching = group.create_task(self._watch(process, channel))
                try:
                    await self._read(channel, group)
                except BadFrame as error:
                    self._log.error("the %s process broke the protocol: %s", self.name, error)
                watching.cancel()
                await self._bury(process, channel)
                logging_task.cancel()
        finally:
            await self._bury(process, channel)
            self._ending = self._given_up or ending(process.returncode, kills, oom_kills())
            self._ends += 1

    async def _bury(self, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        self._ready.clear()
        self._channel = None
        channel.close()
        if any((self._loads.pop(self._loading, None), self.adapters.pop(self._loading, None))):
            self._log.error("%s killed the %s process when it was loaded again; it stays out", self._loading, self.name)
        for answers in self._pending.values():
            answers.put_nowait(Retry(f"the {self.name} process died", "it is being restarted"))
        self._pending.clear()
        self._rooms.clear()
        try:
            async with asyncio.timeout(2.0):  # wait_for of Python 3.11 can lose a cancellation
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        finally:
            self._process = None
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _read(self, channel: AsyncChannel, group: asyncio.TaskGroup) -> None:
        inner = asyncio.Semaphore(_INNER_REQUESTS)
        while (message := await channel.receive()) is not None:
            self._alive_at = time.monotonic()
            match message:
                case frames.Ready():
                    group.create_task(self._restore())
                case frames.Pong(_, waiting, served):
                    self.waiting, self.served = waiting, served
                case frames.Specs(specs):
                    self.specs = specs
                case frames.Infer():
                    await inner.acquire()
                    group.create_task(self._serve(message, channel)).add_done_callback(lambda _: inner.release())
                case frames.Error(id=id):
                    self._done(id, message.exception())
                case frames.PieceMsg(id=id, piece=piece) if not piece.done:
                    if id in self._pending:
                        self._pending[id].put_nowait(message)
                case frames.InferResult(id=id, outputs=outputs, sizes=sizes) if sizes and self._arena:
                    room = self._rooms.pop(id, (0, 0))  # no name for the views here: it would keep the room
                    self._done(id, frames.InferResult(id, self._arena.get(room, outputs, sizes, lent=True)))
                case (
                    frames.Loaded(id=id)
                    | frames.Adapted(id=id)
                    | frames.InferResult(id=id)
                    | frames.PieceMsg(id=id)
                    | frames.CallResult(id=id)
                    | frames.CallResults(id=id)
                ):
                    self._done(id, message)
                case _:
                    pass

    def _done(self, id: int, answer: Message | OutriderError | None = None) -> None:
        """A request has its last answer, whether somebody still waits for it or not."""
        if self._arena is not None:
            self._arena.give(self._rooms.pop(id, (0, 0)))
        asked = self._pending.pop(id, None)
        if asked is not None and answer is not None:
            asked.put_nowait(answer)

    async def _restore(self) -> None:
        for model, (path, serving) in list(self._loads.items()):
            self._loading = model
            try:
                await self._load(model, path, 300.0, serving)
            except OutriderError as error:
                self._log.error("model %s is not loaded again: %s", model, error)
        for adapter, (model, path) in list(self.adapters.items()):
            self._loading = adapter
            try:
                await self._adapt(model, adapter, path, ADAPT_S)
            except OutriderError as error:
                self._log.error("adapter %s is not loaded again: %s", adapter, error)
                if isinstance(error, Refused):
                    self.adapters.pop(adapter, None)
        if self._channel is not None:
            self._loading = ""
            self._ready.set()

    async def _serve(self, request: frames.Infer, channel: AsyncChannel) -> None:
        try:
            if self._answer is None:
                raise Refused(f"the {self.name} process may not ask for inferences")
            await channel.send(frames.InferResult(request.id, await self._answer(request.model, request.inputs)))
        except OutriderError as error:
            with contextlib.suppress(Retry):
                await channel.send(frames.Error.of(request.id, error))

    async def _watch(self, process: asyncio.subprocess.Process, channel: AsyncChannel) -> None:
        for n in itertools.count(1):
            with contextlib.suppress(Retry):
                await channel.send(frames.Ping(n))
            await tick(self._ping_s)
            silent = time.monotonic() - self._alive_at
            if silent > (self._hang_s if self._ready.is_set() else self._start_s):
                self._log.error("the %s process hangs (silent for %.1f s); it is killed", self.name, silent)
                self._given_up = f"it was silent for {silent:.1f} s and was killed"
                process.kill()
                return

    async def _log_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError):
            async for line in process.stderr:
                self.tail.append(text := line.decode(errors="replace").rstrip()[:400])
                self._log.info("%s", text)
