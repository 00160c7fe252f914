"""The tool runner's process: `python -m edge_agent.agent.toolrunner --pack MODULE[:attr] --state DIR [--option k=v]…`.

Invariants: the main thread only reads frames, one thread runs the tools, so a pack sees one thread, but for tools that
it declares `concurrent`, of which CONCURRENT run at once; whatever a tool raises is its result and the runner lives; a
result is JSON of at most MAX_RESULT bytes; the daemon enforces timeouts by killing this process, and the end of the
socket ends it, in whatever code a tool is.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.agent.calls import RESERVED
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.errors import Fatal, Refused
from edge_agent.serving import frames
from edge_agent.serving.frames import (
    Call,
    CallResult,
    CallResults,
    Calls,
    Cancel,
    Channel,
    Infer,
    InferResult,
    Ping,
    Pong,
)
from edge_agent.wire.tensor import Tensor

MAX_RESULT = 64 * 1024
INFER_S = 60.0
CONCURRENT = 8
_log = logging.getLogger("outrider.tools")


class RunnerContext:
    """What a running tool may ask of the device (`tool.Context`)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Tensor]]] = {}

    def infer(self, model: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run an installed network. Raises ToolError when it is not installed, refuses or does not answer."""
        id = next(self._ids)
        future = self._waiting[id] = Future()
        try:
            self._channel.send(Infer(id, model, dict(inputs)))
            return future.result(INFER_S)
        except (Refused, TimeoutError) as error:
            raise ToolError(str(error) or f"{model} gave no answer within {INFER_S:g} s") from error
        finally:
            self._waiting.pop(id, None)

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()

    def answered(self, message: InferResult | frames.Error) -> None:
        """Wake the tool that waits for this answer, if it still does."""
        future = self._waiting.get(message.id)
        if future is None:
            return
        if isinstance(message, InferResult):
            future.set_result(message.outputs)
        else:
            future.set_exception(ToolError(str(message.exception())))


class Runner:
    """Serves the tools of a pack on a channel."""

    def __init__(self, channel: Channel, tools: Sequence[Tool]) -> None:
        self._channel = channel
        self._tools = {tool.spec.name: tool for tool in tools}
        self._context = RunnerContext(channel)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tool")
        self._threads = ThreadPoolExecutor(CONCURRENT, thread_name_prefix="tools")
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Serve until the daemon closes the socket."""
        self._channel.send(frames.Hello("tools", os.getpid()))
        self._channel.send(frames.Specs(msgspec.msgpack.encode([tool.spec for tool in self._tools.values()])))
        self._channel.send(frames.Ready())
        while (message := self._channel.receive()) is not None:
            match message:
                case Ping(n):
                    self._channel.send(Pong(n))
                case Cancel(id):
                    self._cancelled.add(id)
                case InferResult() | frames.Error():
                    self._context.answered(message)
                case Calls():
                    self._thread.submit(self._serve, message)
                case Call():
                    tool = self._tools.get(message.tool)
                    threads = self._threads if tool is not None and tool.spec.concurrent else self._thread
                    threads.submit(self._serve, message)
                case _:
                    raise frames.BadFrame(f"a tool runner takes no {type(message).__name__}")

    def _serve(self, asked: Call | Calls) -> None:
        try:
            self._channel.send(self._answer(asked) if isinstance(asked, Call) else self._answers(asked))
        except OSError:
            _log.info("the daemon is gone, a result has no reader")
        finally:
            self._cancelled.discard(asked.id)

    def _answers(self, asked: Calls) -> CallResults:
        until, late = time.monotonic() + asked.begin_s, CallResult(asked.id, False, error="those before took too long")
        calls = (Call(asked.id, name, args, 0.0) for name, args in asked.calls)
        return CallResults(asked.id, [self._answer(call) if time.monotonic() < until else late for call in calls])

    def _answer(self, call: Call) -> CallResult:
        try:
            return self._call(call)
        except ToolError as error:
            return CallResult(call.id, False, error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever a tool raises is its result
            _log.exception("tool %s failed", call.tool)
            return CallResult(call.id, False, error=f"{type(error).__name__}: {error}")

    def _call(self, call: Call) -> CallResult:
        tool = self._tools.get(call.tool)
        if tool is None:
            raise ToolError(f"unknown tool {call.tool}; the tools are: {', '.join(self._tools)}")
        if call.id in self._cancelled:
            raise ToolError("cancelled before it began")
        extra = {"ctx": self._context} if tool.wants_context else {}
        result = msgspec.to_builtins(tool.function(**call.args, **extra))
        size = len(msgspec.json.encode(result))
        if size > MAX_RESULT:
            raise ToolError(f"the result of {call.tool} has {size} bytes, the limit is {MAX_RESULT}")
        return CallResult(call.id, True, result)


def load(packs: str, state: Path, options: dict[str, str]) -> list[Tool]:
    """The tools of `MODULE[:attr]`, of an installed pack by its short name (entry points of `outrider.tools`), or of
    several with commas between them; each is a callable of state folder and options. An option `knowledge.days` is for
    `….knowledge`; one with no such name is for the first pack.

    Raises Fatal with the reason.
    """
    tools: list[Tool] = []
    short = {point.name: point for point in entry_points(group="outrider.tools")}
    for at, pack in enumerate(packs.split(",")):
        name, _, attribute = pack.partition(":")
        own = name.rpartition(".")[2] + "."
        given = {key.removeprefix(own): value for key, value in options.items() if key.startswith(own)}
        given |= {key: value for key, value in options.items() if at == 0 and "." not in key}
        try:
            state.mkdir(parents=True, exist_ok=True)
            make = short[pack].load() if pack in short else getattr(importlib.import_module(name), attribute or "pack")
            tools += make(state, given)
        except ModuleNotFoundError as error:
            hint = f"installed packs: {', '.join(sorted(short)) or 'none'}; some need `pip install 'outrider[EXTRA]'`"
            raise Fatal(f"tool pack {pack} does not load: ModuleNotFoundError: {error}", hint) from error
        except Exception as error:
            raise Fatal(f"tool pack {pack} does not load: {type(error).__name__}: {error}") from error
    names = [tool.spec.name for tool in tools]
    bad = [name for name in names if name in RESERVED or names.count(name) > 1]
    if bad:
        raise Fatal(f"tool pack {packs} declares {bad[0]} twice or as a reserved name", "rename it")
    reads = [tool.spec.name for tool in tools if tool.spec.risk == "read"]
    for spec in (tool.spec for tool in tools):
        if spec.check and spec.check.tool not in reads:
            raise Fatal(f"{spec.name} is checked by {spec.check.tool}, which is no reading tool", "declare one")
        if spec.undo and spec.undo.tool not in names:
            raise Fatal(f"{spec.name} is undone by {spec.undo.tool}, which is no tool", "declare it")
    return tools


def main(argv: Sequence[str]) -> None:
    """Entry of the process; never returns."""
    parser = argparse.ArgumentParser(prog="toolrunner", description="Run the tools of a pack for the daemon above.")
    parser.add_argument("--pack", required=True, help="MODULE[:attr]")
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    options: dict[str, Any] = dict(option.split("=", 1) if "=" in option else (option, "") for option in given.option)
    status = 1
    try:
        Runner(Channel.inherited(), load(given.pack, given.state, options)).run()
        status = 0
    except OSError:
        status = 0
    except Exception as error:  # noqa: BLE001 - said, then the process ends
        _log.error("%s", error)
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
