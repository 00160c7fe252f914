"""External MCP servers as tools of the device, by the pack's file.

Invariants: nothing of a server is seen but the tools that the file lists, each with the risk class it says, under the
name SERVER_TOOL; a tool whose schema the call grammar cannot hold, or whose signature is longer than MAX_SIGNATURE, is
left out and told; a server that does not answer within its time is ended with its process and started anew for the next
call; what it answers is untrusted text (it declares nothing), bounded by the runner. A server that is not there costs
its own tools only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from edge_agent.agent.functions import Function, Functions
from edge_agent.agent.prompt import signature
from edge_agent.agent.tool import Risk, Tool, ToolError
from edge_agent.errors import Refused
from tools import settings

MAX_SIGNATURE = 1200  # characters that a model reads of one tool
START_S, GRACE_S = 60.0, 10.0
T = TypeVar("T")
_log = logging.getLogger("outrider.mcp")


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a server is reached, by `command` or `url` (a token from the variable `token_env`), and what it may offer."""

    tools: dict[str, Risk]
    command: list[str] = []
    url: str = ""
    token_env: settings.Secret = ""
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 10.0

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ValueError("a server has a command or a url")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    servers: dict[str, Server]


class Link:
    """One server: opened when it is asked, closed when it fails or is late."""

    def __init__(self, name: str, server: Server) -> None:
        self._name, self._server = name, server
        self._loop = asyncio.new_event_loop()
        self._open: asyncio.Future[Any] = self._loop.create_future()
        self._owner: asyncio.Task[None] | None = None
        self._refused = ""
        threading.Thread(target=self._loop.run_forever, name=f"mcp-{name}", daemon=True).start()

    def ask(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """What the work with the open client gives. Raises ToolError; the server is ended when it is late or broken."""
        is_open = self._open.done() and self._owner is not None
        doing = asyncio.run_coroutine_threadsafe(self._ask(work), self._loop)
        try:
            return doing.result(self._server.timeout_s + (0 if is_open else START_S))
        except concurrent.futures.TimeoutError:
            problem = f"{self._name} did not answer within {self._server.timeout_s:g} s and was ended"
        except Exception as error:  # noqa: BLE001 - whatever a server or its transport raises is the tool's error
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            problem = f"{self._name}: {self._refused or f'{type(error).__name__}: {error}'}"
        doing.cancel()
        self.close()
        raise ToolError(problem)

    def close(self) -> None:
        """End the server's process, and wait for it."""
        ended = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        concurrent.futures.wait([ended], GRACE_S)

    async def _ask(self, work: Callable[[Any], Awaitable[T]]) -> T:
        if self._owner is None or self._owner.done():
            self._open = self._loop.create_future()
            self._owner = asyncio.create_task(self._own(self._open))
        return await work(await asyncio.shield(self._open))

    async def _own(self, opened: asyncio.Future[Any]) -> None:
        """Holds the client: it is entered and left in one task."""
        from mcp import Client

        try:
            async with contextlib.AsyncExitStack() as stack:
                opened.set_result(await stack.enter_async_context(Client(await self._transport(stack))))
                await asyncio.Event().wait()
        except Exception as error:  # noqa: BLE001 - told to who asks
            if not opened.done():
                opened.set_exception(error)

    async def _close(self) -> None:
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.wait([self._owner])
            self._owner = None

    async def _transport(self, stack: contextlib.AsyncExitStack) -> Any:
        from mcp import StdioServerParameters
        from mcp.client.streamable_http import streamable_http_client

        if self._server.command:
            return StdioServerParameters(command=self._server.command[0], args=self._server.command[1:])
        if not self._server.token_env:
            return self._server.url
        if not (token := os.environ.get(self._server.token_env)):
            raise Refused(f"the variable {self._server.token_env} is not set", "it holds the server's token")
        import httpx2

        headers, limit = {"Authorization": f"Bearer {token}"}, self._server.timeout_s + GRACE_S
        hooks = {"response": [self._seen]}
        client = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=limit, event_hooks=hooks))
        return streamable_http_client(self._server.url, http_client=client)

    async def _seen(self, answer: Any) -> None:
        refused = answer.status_code in (401, 403)
        told = f"it refuses the token ({answer.status_code}): does {self._server.token_env} hold its own?"
        self._refused = told if refused else ""


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    """The allowed tools of all servers that answer. Raises ValueError."""
    servers = settings.read("mcp", state, options, Settings).servers
    return [tool for name, server in servers.items() for tool in _tools(name, server)]


def _tools(name: str, server: Server) -> list[Tool]:
    link = Link(name, server)
    try:
        offered = {tool.name: tool for tool in link.ask(lambda client: client.list_tools()).tools}
    except ToolError as error:
        _log.error("no tools of %s: %s", name, error)
        return []
    found = []
    for tool, risk in server.tools.items():
        try:
            if tool not in offered:
                raise Refused(f"it offers no such tool; it offers {', '.join(offered)[:300]}")
            schema = {key: value for key, value in offered[tool].input_schema.items() if key != "$schema"}
            spec = Functions([Function(f"{name}_{tool}".replace("-", "_"), offered[tool].description, schema)]).specs[0]
            if len(shown := signature(spec)) > MAX_SIGNATURE:
                raise Refused(
                    f"its signature has {len(shown)} characters, at most {MAX_SIGNATURE} are shown to a model"
                )
        except Refused as refused:
            _log.error("the tool %s of %s is left out: %s", tool, name, refused)
            continue
        limit = START_S + server.timeout_s + GRACE_S + 1  # the link ends its server before the daemon ends the runner
        spec = msgspec.structs.replace(spec, risk=risk, idempotent=risk == "read", timeout_s=limit)
        spec = msgspec.structs.replace(spec, concurrent=risk == "read")
        found.append(Tool(spec, _caller(link, tool), wants_context=False))
    return found


def _caller(link: Link, tool: str) -> Callable[..., Any]:
    def call(**args: Any) -> Any:
        answer = link.ask(lambda client: client.call_tool(tool, args))
        text = "\n".join(part.text for part in answer.content if part.type == "text")
        if answer.is_error:
            raise ToolError(text[:600] or "it failed")
        return text if answer.structured_content is None else answer.structured_content

    return call
