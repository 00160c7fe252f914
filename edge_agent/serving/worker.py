"""The worker process: `python -m edge_agent.serving.worker language|network|endpoint`.

Invariants: one thread reads frames at any time (ping, cancel, enqueue), whatever the others do; what it read and may
run at once it runs itself while another reads on, so a caller alone waits for no thread to wake; a loader thread makes
new models beside those that serve. One thing runs at a time, but for a network whose engine has lanes: that many of its
runs go at the same time while its pace says so, and nothing else goes beside them; what waits is bounded and one too
many answers Retry at once; every request is answered exactly once with its last frame; requests that ran together are
answered as if each had run alone, and a run that fails is repeated one by one, so nobody pays for a neighbour; a model
that fails to load is an Error and the worker lives; an engine that is lost (Fatal: a GPU that is gone) is a Retry and
the end of the worker, whose successor finds out what still runs; when the socket ends the process exits at once, in
whatever C code the threads are.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

from edge_agent.engines.base import BUILD, LanguageModel, Network, Piece
from edge_agent.errors import Fatal, OutriderError, Refused, Retry
from edge_agent.serving import batching, cache, frames
from edge_agent.serving.frames import (
    Adapt,
    Adapted,
    Arena,
    Cancel,
    Channel,
    GenerateReq,
    Hello,
    Infer,
    Load,
    Ping,
    Pong,
    Ready,
    Served,
)
from edge_agent.serving.schedule import LOWEST, NORMAL, Entry, Lanes, Pace, Schedule
from edge_agent.wire.tensor import Tensor

_LOST = 70  # EX_SOFTWARE of sysexits(3): the engine is beyond repair
Loader = Callable[[Path], LanguageModel | Network]


@dataclass
class _Hosted:
    """A model that serves."""

    model: LanguageModel | Network
    pace: Pace
    cache: cache.Cache
    together: bool = True  # until a run shows that rows cannot be told apart
    served: Served = field(default_factory=Served)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> Served:
        """What was served, and the engine that serves: it may change by itself (see engines/choose.py)."""
        info = self.model.info
        extra = info.extra.get(BUILD, {})
        return msgspec.structs.replace(self.served, engine=info.engine, provider=info.provider, **extra)

    def count(self, **more: float) -> None:
        """Add to what was served; from any thread."""
        with self._lock:
            sums = {name: getattr(self.served, name) + value for name, value in more.items()}
            lanes, batch = self.pace.way
            now = {"ewma_ms": round(self.pace.ewma_ms, 3), "lanes": lanes, "batch": batch if self.together else 1}
            self.served = msgspec.structs.replace(self.served, **sums, **now)


@dataclass
class _Switch:
    """A model that is ready to take its name."""

    load: Load
    model: LanguageModel | Network


_Work = Load | Adapt | Infer | GenerateReq | _Switch


class _Turn(NamedTuple):
    """What runs together, when it began (see `Lanes`), and whether other runs go, or may, at the same time."""

    batch: list[Entry[_Work]]
    began: tuple[float, float]
    company: bool


class Worker:
    """Serves one channel with the models a loader makes."""

    def __init__(self, channel: Channel, role: str, loader: Loader, arena: Arena | None = None) -> None:
        self._channel, self._role, self._loader, self._arena = channel, role, loader, arena
        self._schedule: Schedule[_Work] = Schedule()
        self._wake = threading.Condition()
        self._loads: queue.Queue[Load] = queue.Queue()
        self._models: dict[str, _Hosted] = {}
        self._threads, self._reading = 0, False
        self._ended = Future[None]()
        self._lanes = Lanes()
        self._running: set[int] = set()
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Serve until the daemon closes the socket."""
        threading.Thread(target=self._load, name="load", daemon=True).start()
        self._channel.send(Hello(self._role, os.getpid()))
        self._channel.send(Ready())
        self._staff(1)
        self._ended.result()

    def _staff(self, lanes: int) -> None:
        """A thread for each run that may go at the same time, and one that reads."""
        for number in range(self._threads, lanes + 1):
            threading.Thread(target=self._serve, name=f"serve-{number}", daemon=True).start()
        self._threads = max(self._threads, lanes + 1)

    def _serve(self) -> None:
        try:
            while (turn := self._next()) is not None:
                self._execute(turn)
            self._ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._ended.set_exception(error)

    def _read(self) -> bool:
        """Take in what comes next; False when the daemon is gone."""
        match self._channel.receive():
            case None:
                return False
            case Ping(n):
                models = list(self._models.items())
                self._channel.send(Pong(n, len(self._schedule.waiting), {name: m.now for name, m in models}))
            case Cancel(id):
                self._cancel(id)
            case Load(beside=True) as load:
                self._loads.put(load)
            case Infer() as message:
                self._infer(message)
            case Load() | Adapt() as message:
                self._enqueue(Entry(message, message.id, time.monotonic(), barrier=True))
            case GenerateReq() as message:
                self._enqueue(_entry(message))
            case message:
                raise frames.BadFrame(f"a {self._role} worker takes no {type(message).__name__}")
        return True

    def _infer(self, message: Infer) -> None:
        if message.sizes and self._arena is not None:
            inputs = self._arena.get(message.room, message.inputs, message.sizes)
            message = msgspec.structs.replace(message, inputs=inputs)
        hosted, entry = self._models.get(message.model), _entry(message)
        if hosted is not None and hosted.pace.serving.cache_mb:
            entry.digest = cache.key(message.inputs)
            known = hosted.cache.get(entry.digest)
            if known is not None:
                hosted.count(requests=1, cached=1)
                self._tell(message, known)
                return
        if hosted is not None and hosted.together and hosted.pace.serving.max_batch > 1:
            entry.key, entry.rows = batching.alike(message.model, message.inputs)
        self._enqueue(entry)

    def _enqueue(self, entry: Entry[_Work]) -> None:
        hosted = self._models.get(entry.model)
        try:
            with self._wake:
                self._schedule.add(entry, hosted.pace.serving if hosted else NORMAL)
        except Retry as error:
            self._fail(entry, error)

    def _cancel(self, id: int) -> None:
        with self._wake:
            entry = self._schedule.remove(id)
            if id in self._running:
                self._cancelled.add(id)
        if entry is not None and isinstance(entry.request, GenerateReq):
            self._channel.send(frames.PieceMsg(id, Piece("", done=True, finish="cancelled")))
        elif entry is not None:
            self._fail(entry, Retry("cancelled before it began"))

    def _load(self) -> None:
        while True:
            load = self._loads.get()
            try:
                made = _Switch(load, self._loader(Path(load.path)))
            except Exception as error:  # noqa: BLE001 - whatever a loader raises is the answer
                self._fail(Entry(load, load.id, 0.0), error)
                continue
            with self._wake:
                self._enqueue(Entry(made, load.id, time.monotonic(), barrier=True))
                self._wake.notify()

    def _execute(self, turn: _Turn) -> None:
        batch = turn.batch
        right = self._try(batch, turn.company)
        with self._wake:
            took, share = self._lanes.end(time.monotonic(), turn.began)
            ids = {entry.id for entry in batch}
            self._running -= ids
            self._cancelled -= ids
            waiting = bool(self._schedule.waiting) or len(batch) > 1
            if right and isinstance(batch[0].request, Infer) and (hosted := self._models.get(batch[0].request.model)):
                rows, size = sum(entry.rows for entry in batch), sum(entry.size for entry in batch)
                hosted.pace.ran(rows, size, took, share, waiting, turn.company)

    def _try(self, batch: list[Entry[_Work]], company: bool) -> bool:
        try:
            self._answer(batch, company)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is the answer to its request
            if len(batch) == 1:
                self._fail(batch[0], error)
                return False
            return all([self._try([entry], company) for entry in batch])
        return True

    def _next(self) -> _Turn | None:
        """What this thread executes; until there is something it reads, if no other does, or waits. None: the end."""
        while True:
            turn, wait, leads = None, None, False
            with self._wake:
                now = time.monotonic()
                late = self._schedule.expired(now)
                head = None if self._lanes.full else self._schedule.head(now)
                hosted = self._models.get(head.request.model) if head and isinstance(head.request, Infer) else None
                pace = hosted.pace if hosted else Pace()
                lanes, batch = pace.way[0], list[Entry[_Work]]()
                if head is not None and self._lanes.free(lanes):
                    batch, wait = self._schedule.take(now, pace)
                if batch:
                    company = lanes > 1 and bool(self._lanes.active or self._schedule.waiting)
                    turn = _Turn(batch, self._lanes.begin(now, lanes), company)
                    self._running |= {entry.id for entry in batch}
                    if self._schedule.waiting and self._lanes.free(lanes):
                        self._wake.notify()
                elif self._reading and not late:
                    self._wake.wait(wait)
                elif not late:
                    self._reading = leads = True
                    if wait is not None:
                        self._wake.notify_all()  # that they wait no longer than this
            for entry in late:
                self._count(entry, expired=1)
                self._fail(entry, Retry("its time was over before its turn came", "the device is busy: ask less often"))
            if turn is not None:
                return turn
            if leads:
                if not self._read():
                    return None
                self._reading = False

    def _fail(self, entry: Entry[_Work], error: BaseException) -> None:
        if not isinstance(error, OutriderError):
            traceback.print_exception(error)
        self._count(entry, requests=1, failed=1)
        lost = isinstance(error, Fatal) and isinstance(entry.request, Infer | GenerateReq)
        try:
            told = Retry(f"{error}", "its worker is being started again") if lost else error
            self._channel.send(frames.Error.of(entry.id, told))
        except OSError:
            os._exit(0)  # the daemon is gone
        if lost:
            print(f"{error}; this worker ends, so that a new one finds what is left", file=sys.stderr, flush=True)
            os._exit(_LOST)

    def _count(self, entry: Entry[_Work], **more: float) -> None:
        if isinstance(entry.request, Infer | GenerateReq) and entry.request.model in self._models:
            self._models[entry.request.model].count(**more)

    def _hand_on(self) -> None:
        """Let another thread read; no sooner than this one lets go of the interpreter, or both would wait for it."""
        with self._wake:
            if not self._reading:
                self._wake.notify()

    def _answer(self, batch: list[Entry[_Work]], company: bool) -> None:
        if not isinstance(batch[0].request, Infer):
            self._hand_on()
        match batch[0].request:
            case Load(beside=False) as load:
                if (before := self._models.pop(load.model, None)) is not None:
                    before.model.close()
                self._take(_Switch(load, self._loader(Path(load.path))))
            case _Switch() as switch:
                self._take(switch)
            case Adapt(id, name, adapter, path):
                language = cast(LanguageModel, self._hosted(name).model)
                if not hasattr(language, "load_adapter"):
                    raise Refused(f"{name} takes no adapters")
                if path:
                    language.load_adapter(adapter, Path(path))
                else:
                    language.unload_adapter(adapter)
                self._channel.send(Adapted(id))
            case Infer(model=name):
                self._run(name, batch, company)
            case GenerateReq() as request:
                self._generate(request)

    def _take(self, switch: _Switch) -> None:
        serving, name = switch.load.serving, switch.load.model
        before, lanes = self._models.get(name), getattr(switch.model, "lanes", 1)
        lanes = min(lanes, serving.concurrency or lanes)
        self._staff(lanes)
        self._models[name] = _Hosted(switch.model, Pace(serving, lanes), cache.Cache(int(serving.cache_mb * 2**20)))
        if before is not None:
            before.model.close()
        self._channel.send(frames.Loaded(switch.load.id, name, switch.model.info))

    def _run(self, name: str, batch: list[Entry[_Work]], company: bool) -> None:
        hosted = self._hosted(name)
        network = hosted.model
        if not hasattr(network, "infer"):
            raise Refused(f"{name} is a language model, it has no infer")
        asked, rows = [cast(Infer, entry.request).inputs for entry in batch], [entry.rows for entry in batch]
        inputs, began = batching.joined(asked), time.monotonic()
        if hosted.pace.serving.finite:
            from edge_agent.engines.binding import check_finite  # numpy: workers of endpoints go without

            check_finite(inputs)
        self._hand_on()
        outputs = getattr(network, "beside", network.infer)(inputs) if company else network.infer(inputs)
        took = time.monotonic() - began
        try:
            answers = batching.parted(outputs, rows) if len(batch) > 1 else [outputs]
        except Refused:
            hosted.together = False
            raise
        for entry, answer in zip(batch, answers, strict=True):
            if entry.digest:
                hosted.cache.put(entry.digest, answer)
            self._tell(cast(Infer, entry.request), answer)
        hosted.count(requests=len(batch), runs=1, rows=sum(rows), busy_s=took)

    def _tell(self, asked: Infer, answer: dict[str, Tensor]) -> None:
        sizes: list[int] = []
        if self._arena is not None:
            answer, sizes = self._arena.put(asked.room, answer)
        try:
            self._channel.send(frames.InferResult(asked.id, answer, sizes))
        except Refused as error:
            self._channel.send(frames.Error.of(asked.id, error))

    def _generate(self, message: GenerateReq) -> None:
        hosted = self._hosted(message.model)
        model, began = hosted.model, time.monotonic()
        if not hasattr(model, "generate"):
            raise Refused(f"{message.model} is a network, it does not generate")
        for piece in model.generate(message.request, lambda: message.id in self._cancelled):
            if piece.done:
                took = time.monotonic() - began
                hosted.pace.ran(1, 0, took, took, waiting=False)
                hosted.count(requests=1, runs=1, rows=1, busy_s=took)
            self._channel.send(frames.PieceMsg(message.id, piece))
            if piece.done:
                return
        raise Refused(f"{message.model} ended its stream without a last piece")

    def _hosted(self, name: str) -> _Hosted:
        if name not in self._models:
            raise Refused(f"model {name!r} is not loaded", f"loaded: {', '.join(self._models) or 'none'}")
        return self._models[name]


def _entry(message: Infer | GenerateReq) -> Entry[_Work]:
    now = time.monotonic()
    size = sum(len(tensor.data) for tensor in message.inputs.values()) if isinstance(message, Infer) else 0
    until = now + message.within_s if message.within_s else float("inf")
    return Entry(message, message.id, now, min(max(message.priority, 0), LOWEST), until, size=size, model=message.model)


def _language(path: Path) -> LanguageModel:
    from edge_agent.engines.genai import GenaiModel

    return GenaiModel(path)


def _endpoint(path: Path) -> LanguageModel:
    from edge_agent.engines.openai import OpenaiModel

    return OpenaiModel(path)


def _network(path: Path) -> Network:
    from edge_agent.engines.choose import network

    return network(path)


def main(role: str, loader: Loader | None = None) -> None:
    """Entry of the process; never returns. Raises Fatal for an unknown role or without a daemon above."""
    loaders: dict[str, Loader] = {"language": _language, "network": _network, "endpoint": _endpoint}
    loader = loader or loaders.get(role)
    if loader is None:
        raise Fatal(f"unknown worker {role!r}", f"one of {', '.join(loaders)}")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    status = 1
    try:
        Worker(Channel.inherited(), role, loader, Arena.inherited()).run()
        status = 0
    except OSError:
        status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
