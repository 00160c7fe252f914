"""Deterministic stand-ins for the seams of the agent: a scripted model and in-process tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edge_agent.agent.tool import Tool, ToolError, ToolSpec
from edge_agent.engines.base import Generate, Piece


class ScriptedModel:
    """Says the given texts in turn, then `none()`; an exception in the list is raised. Keeps what it was asked."""

    def __init__(self, *says: str | Exception) -> None:
        self._says = list(says)
        self.asked: list[Generate] = []

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        self.asked.append(request)
        said = self._says.pop(0) if self._says else "none()"
        if isinstance(said, Exception):
            raise said
        words = len(said.split())
        return Piece(said, done=True, finish="stop", output_tokens=words, first_token_s=0.01, total_s=0.02)


class LocalTools:
    """Declared tools called in this process; a failure set for a name is raised instead. Keeps the calls."""

    def __init__(self, *tools: Tool, fail: dict[str, Exception] | None = None) -> None:
        self._tools = {tool.spec.name: tool for tool in tools}
        self._fail = fail or {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.before: Callable[[str], None] = lambda name: None

    async def specs(self) -> Sequence[ToolSpec]:
        return [tool.spec for tool in self._tools.values()]

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        self.calls.append((name, args))
        self.before(name)
        if name in self._fail:
            raise self._fail[name]
        try:
            return self._tools[name].function(**args)
        except KeyError as error:
            raise ToolError(f"unknown tool {error}") from error
