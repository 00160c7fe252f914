"""A child process for the tests: the real worker loop over an engine that misbehaves on command."""

import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from edge_agent.engines.base import EngineInfo, Generate, Piece
from edge_agent.errors import Fatal, Refused
from edge_agent.serving import frames, worker
from edge_agent.wire.tensor import Tensor


class Echo:
    """Says the prompt word by word; words in capitals are orders."""

    def __init__(self, path: Path) -> None:
        self._take(path)
        self.adapters: dict[str, str] = {}
        self.lanes = 2 if path.name == "twins" else 1
        self._pair = threading.Barrier(2)
        self.info = EngineInfo("echo", "cpu", path.name, "0" * 64, 0.0)

    @staticmethod
    def _take(path: Path) -> None:
        if path.name == "absent" or (path / "absent").exists():
            raise Refused("no such model", "install it")
        if path.name == "poison" or (path.name == "turncoat" and (path / "armed").exists()):
            os._exit(9)
        if path.name == "glutton":
            os.kill(os.getpid(), signal.SIGKILL)
        if path.name == "heavy":
            time.sleep(0.5)

    def load_adapter(self, name: str, folder: Path) -> None:
        self._take(folder)
        self.adapters[name] = folder.name

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        if request.adapter and request.adapter not in self.adapters:
            raise Refused(f"no adapter {request.adapter}")
        for word in request.prompt.split():
            if cancelled():
                break
            match word:
                case "CRASH":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "HANG":
                    os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(60)  # this thread may run on until the signal reaches the others
                case "STUCK":
                    while True:
                        time.sleep(0.05)
                case "FOREVER":
                    while not cancelled():
                        yield Piece("again ")
                        time.sleep(0.01)
                case "GARBAGE":
                    channel = socket.socket(fileno=int(os.environ[frames.FD_VARIABLE]))
                    channel.sendall(struct.pack(">I", frames.MAX_FRAME + 1))
                case "ADAPTERS":
                    yield Piece(f"{self.adapters.get(request.adapter, '-')} of {len(self.adapters)} ")
                case "ENVIRONMENT":
                    yield Piece(" ".join(sorted(os.environ)))
                case _:
                    yield Piece(word + " ")
        yield Piece("", done=True, finish="cancelled" if cancelled() else "stop")

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "bad" in inputs:
            raise Refused("it takes no input `bad`", "it takes x")
        if "lost" in inputs:
            raise Fatal("the GPU is lost: CUDA failure 700", "the worker must be started again")
        if "slow" in inputs:
            time.sleep(0.3)
        if "pair" in inputs:  # says whether another run came while this one waited
            try:
                self._pair.wait(0.1)
            except threading.BrokenBarrierError:
                self._pair.reset()
            else:
                return {"pair": Tensor("uint8", [1], b"y")}
        if "rows" in inputs:  # each row says how many ran together, and they take no longer than one
            time.sleep(0.005)
            rows = inputs["rows"].shape[0]
            if 13 in inputs["rows"].data:
                raise Refused("an unlucky number")
            return {"together": Tensor("uint8", [rows, 1], bytes([rows] * rows)), "rows": inputs["rows"]}
        if "sum" in inputs:  # what comes out has no rows
            return {"sum": Tensor("uint8", [], bytes([sum(inputs["sum"].data) % 256]))}
        return dict(inputs)

    def beside(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.infer(inputs) | ({"beside": Tensor("uint8", [1], b"y")} if "pair" in inputs else {})

    def close(self) -> None: ...


def runner() -> None:
    """A tool runner in ten lines: each call asks the daemon to infer and returns the sum of the bytes."""
    channel = frames.Channel.inherited()
    channel.send(frames.Hello("tools", os.getpid()))
    channel.send(frames.Specs(b"\x90"))
    channel.send(frames.Ready())
    call: frames.Call | None = None
    while (message := channel.receive()) is not None:
        match message:
            case frames.Ping(n):
                channel.send(frames.Pong(n))
            case frames.Call(tool="stuck"):
                print("stuck on purpose", file=sys.stderr, flush=True)
            case frames.Call():
                call = message
                channel.send(frames.Infer(77, "sum", {"x": Tensor("uint8", [2], bytes([1, 2]))}))
            case frames.InferResult(77, outputs):
                assert call is not None
                channel.send(frames.CallResult(call.id, True, sum(outputs["y"].data)))
            case frames.Error(77, message=text):
                assert call is not None
                channel.send(frames.CallResult(call.id, False, None, text))


if __name__ == "__main__":
    if sys.argv[1] == "runner":
        runner()
    elif sys.argv[1] == "broken":
        sys.exit("I never start")
    else:
        worker.main("echo", Echo)
