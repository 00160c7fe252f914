"""The loop's Model and Tools over the child processes of `serving`.

Invariants: an ordinary ToolError of the runner is a ToolError here; a runner that died or was killed for time is Retry,
which the loop reads as "effect unknown". A tool that is not `concurrent` is called when its turn has come, so that the
time it waits for others is not its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent import chat
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import Retry
from edge_agent.serving.supervisor import WorkerProcess

START_S = 60.0  # that a tool runner may take until it serves


class WorkerModel:
    """One model of a language worker."""

    def __init__(self, worker: WorkerProcess, model: str) -> None:
        self._worker, self._model = worker, model

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        text = ""
        async for piece in self._worker.generate(self._model, request, timeout_s, request.priority):
            text += piece.text
            if piece.done:
                whole = msgspec.structs.replace(piece, text=text)
                return msgspec.structs.replace(whole, text=chat.said(whole)) if request.chat else whole
        raise Retry("the language model broke off")


class RunnerTools:
    """The tools of a tool runner."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self._specs: tuple[bytes, Sequence[ToolSpec]] = (b"", ())
        self._turn, self._free = asyncio.Lock(), frozenset[str]()

    async def specs(self) -> Sequence[ToolSpec]:
        await self._worker.ready(START_S)
        if self._specs[0] is not self._worker.specs:  # each sample asks; they change with the runner's process
            known = self._worker.specs
            self._specs = (known, tuple(msgspec.msgpack.decode(known, type=list[ToolSpec])))
            self._free = frozenset(spec.name for spec in self._specs[1] if spec.concurrent)
        return self._specs[1]

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        await self.specs()
        async with contextlib.nullcontext() if name in self._free else self._turn:
            answer = await self._worker.call(name, args, timeout_s)
        if not answer.ok:
            raise ToolError(answer.error)
        return answer.result

    async def read(self, calls: Sequence[tuple[str, dict[str, Any]]], timeout_s: float) -> list[Any]:
        """A result or a ToolError for each of many readings, which go to the runner together. Raises Refused, Retry."""
        await self.specs()
        async with self._turn:
            answers = await self._worker.call_all(list(calls), timeout_s)
        return [answer.result if answer.ok else ToolError(answer.error) for answer in answers]
