"""The worker process: `python -m edge_agent.serving.worker language|network`.

Invariants: the main thread only reads frames (ping, cancel, enqueue), one execution thread owns every engine, so an
engine sees one thread; the queue is bounded and a full one answers Retry at once; every request is answered exactly
once with its last frame; a model that fails to load is an Error and the worker lives; when the socket ends the process
exits at once, in whatever C code the execution thread is.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import cast

from edge_agent.engines.base import LanguageModel, Network, Piece
from edge_agent.errors import Fatal, OutriderError, Refused, Retry
from edge_agent.serving import frames
from edge_agent.serving.frames import (
    Adapt,
    Adapted,
    Cancel,
    Channel,
    GenerateReq,
    Hello,
    Infer,
    Load,
    Ping,
    Pong,
    Ready,
)

QUEUE = 64
Loader = Callable[[Path], LanguageModel | Network]
_Work = Load | Adapt | Infer | GenerateReq


class Worker:
    """Serves one channel with the models a loader makes."""

    def __init__(self, channel: Channel, role: str, loader: Loader) -> None:
        self._channel, self._role, self._loader = channel, role, loader
        self._work: queue.Queue[_Work] = queue.Queue(QUEUE)
        self._models: dict[str, LanguageModel | Network] = {}
        self._live: set[int] = set()
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Serve until the daemon closes the socket."""
        threading.Thread(target=self._execute, name="execute", daemon=True).start()
        self._channel.send(Hello(self._role, os.getpid()))
        self._channel.send(Ready())
        while (message := self._channel.receive()) is not None:
            match message:
                case Ping(n):
                    self._channel.send(Pong(n))
                case Cancel(id):
                    if id in self._live:
                        self._cancelled.add(id)
                case Load() | Adapt() | Infer() | GenerateReq():
                    self._enqueue(message)
                case _:
                    raise frames.BadFrame(f"a {self._role} worker takes no {type(message).__name__}")

    def _enqueue(self, message: _Work) -> None:
        self._live.add(message.id)
        try:
            self._work.put_nowait(message)
        except queue.Full:
            self._live.discard(message.id)
            self._channel.send(frames.Error.of(message.id, Retry(f"{QUEUE} requests are waiting", "try again later")))

    def _execute(self) -> None:
        while True:
            message = self._work.get()
            try:
                self._answer(message)
            except Exception as error:  # noqa: BLE001 - whatever an engine raises is the answer to its request
                if not isinstance(error, OutriderError):
                    traceback.print_exc()
                try:
                    self._channel.send(frames.Error.of(message.id, error))
                except OSError:
                    return
            finally:
                self._live.discard(message.id)
                self._cancelled.discard(message.id)

    def _answer(self, message: _Work) -> None:
        if message.id in self._cancelled and not isinstance(message, GenerateReq):
            raise Retry("cancelled before it began")
        match message:
            case Load(id, name, path):
                model = self._loader(Path(path))
                previous = self._models.pop(name, None)
                self._models[name] = model
                if previous is not None:
                    previous.close()
                self._channel.send(frames.Loaded(id, name, model.info))
            case Adapt(id, name, adapter, path):
                language = cast(LanguageModel, self._model(name))
                if not hasattr(language, "load_adapter"):
                    raise Refused(f"{name} takes no adapters")
                if path:
                    language.load_adapter(adapter, Path(path))
                else:
                    language.unload_adapter(adapter)
                self._channel.send(Adapted(id))
            case Infer(id, name, inputs):
                network = self._model(name)
                if not hasattr(network, "infer"):
                    raise Refused(f"{name} is a language model, it has no infer")
                self._channel.send(frames.InferResult(id, network.infer(inputs)))
            case GenerateReq():
                self._generate(message)

    def _generate(self, message: GenerateReq) -> None:
        model = self._model(message.model)
        if not hasattr(model, "generate"):
            raise Refused(f"{message.model} is a network, it does not generate")
        if message.id in self._cancelled:
            self._channel.send(frames.PieceMsg(message.id, Piece("", done=True, finish="cancelled")))
            return
        for piece in model.generate(message.request, lambda: message.id in self._cancelled):
            self._channel.send(frames.PieceMsg(message.id, piece))
            if piece.done:
                return
        raise Refused(f"{message.model} ended its stream without a last piece")

    def _model(self, name: str) -> LanguageModel | Network:
        if name not in self._models:
            raise Refused(f"model {name!r} is not loaded", f"loaded: {', '.join(self._models) or 'none'}")
        return self._models[name]


def _language(path: Path) -> LanguageModel:
    from edge_agent.engines.genai import GenaiModel

    return GenaiModel(path)


def _network(path: Path) -> Network:
    from edge_agent.engines.onnxruntime import OnnxNetwork

    return OnnxNetwork(path)


def main(role: str, loader: Loader | None = None) -> None:
    """Entry of the process; never returns. Raises Fatal for an unknown role or without a daemon above."""
    loaders: dict[str, Loader] = {"language": _language, "network": _network}
    loader = loader or loaders.get(role)
    if loader is None:
        raise Fatal(f"unknown worker {role!r}", "language or network")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    status = 1
    try:
        Worker(Channel.inherited(), role, loader).run()
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
