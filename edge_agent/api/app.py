"""The device's own HTTP API: the same token as at the hub, checked here with no network.

Invariants: every route but the health checks and a site's chunks verifies the bearer token against the cached grants
and asks `allowed`; bodies are bounded before they are parsed; every error comes with a hint, in the form of its route's
protocol (see access.py). Nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_agent.api import chat, oip
from edge_agent.api.access import RUN_MODEL, Caller, Device, Gate, Problem, Refusing, answer, problem
from edge_agent.config import address
from edge_agent.errors import Refused, Retry
from edge_agent.update.neighbours import Neighbours

MAX_BODY_MB = 64
"""The largest inference request, unless the settings say otherwise."""
MAX_ASKED = 4096


class TaskRequest(msgspec.Struct, frozen=True):
    text: str
    conversation: Annotated[str, msgspec.Meta(max_length=64)] = ""


class ReplayRequest(msgspec.Struct, frozen=True):
    model: str = ""


class HoldRequest(msgspec.Struct, frozen=True):
    minutes: float
    reason: str


class ToolRequest(msgspec.Struct, frozen=True):
    args: dict[str, Any] = {}


def create_app(
    device: Device,
    clock: Callable[[], float] = time.time,
    max_body: int = MAX_BODY_MB << 20,
    name: str = "",
    near: Neighbours | None = None,
    refused: Refusing | None = None,
) -> Starlette:
    """The routes over a device; offline tokens for its `name` are good here; `refused` hears of who is refused."""
    gate = Gate(device, clock, max_body, name, refused)

    async def healthz(_: Request) -> Response:
        healthy = device.healthy()
        return answer({"status": "ok" if healthy else "starting"}, 200 if healthy else 503)

    async def chunks(request: Request) -> Response:
        """For the devices next door, which have no token here: a chunk's hash stands in the signed index alone."""
        assert near is not None
        body = b""
        async for piece in request.stream():
            if len(body := body + piece) > MAX_ASKED:
                raise HTTPException(413, f"at most {MAX_ASKED} bytes of hashes")
        try:
            return Response(await near.answer(body), media_type="application/msgpack")
        except Retry as error:
            raise HTTPException(503, error.message) from error

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            *([Route("/v1/chunks", chunks, methods=["POST"])] if near is not None else []),
            gate.route("/metrics", "GET", "read:device", _metrics),
            gate.route("/v1/status", "GET", "read:device", _status),
            gate.route("/v1/tasks", "POST", "run:task", _submit),
            gate.route("/v1/tasks", "GET", "read:task", _tasks),
            gate.route("/v1/tasks/{id}", "GET", "read:task", _task),
            gate.route("/v1/tasks/{id}/replay", "POST", "read:task", _replay),
            gate.route("/v1/tools", "GET", "", _tools),  # those the caller may use
            gate.route("/v1/tools/{name}", "POST", "", _tool),  # which permission depends on the tool's risk
            gate.route("/v1/blobs", "POST", "upload:blob", _blob),
            gate.route("/v1/updates", "GET", "read:device", _updates),
            gate.route("/v1/updates/hold", "POST", "run:task", _hold),
            gate.route("/v1/updates/hold", "DELETE", "run:task", _release),
            *chat.routes(gate),
            *oip.routes(gate),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )


async def _metrics(caller: Caller) -> Response:
    text = caller.metrics.text(caller.device.models.workers, caller.device.work.counts)
    return Response(text, media_type="text/plain; version=0.0.4")


async def _status(caller: Caller) -> Response:
    return answer(await caller.device.status())


async def _submit(caller: Caller) -> Response:
    asked = await caller.read(TaskRequest)
    return answer({"id": await caller.device.work.submit(asked.text, caller.subject, asked.conversation)}, 202)


async def _tasks(caller: Caller) -> Response:
    return answer(await caller.device.work.tasks())


async def _task(caller: Caller) -> Response:
    id = caller.request.path_params["id"]
    task = await caller.device.work.task(id)
    if task is None:
        raise Problem(404, f"no task {id}", "see GET /v1/tasks")
    return answer(task)


async def _replay(caller: Caller) -> Response:
    """Decisions asked again, of a model the caller may run."""
    model = (await caller.read(ReplayRequest)).model
    caller.must(RUN_MODEL, model.partition(":")[0])
    return answer(await caller.unless_gone(caller.device.replay.run(caller.request.path_params["id"], model)))


async def _tools(caller: Caller) -> Response:
    return answer(await caller.device.work.tools(caller.subject))


async def _tool(caller: Caller) -> Response:
    args, name = (await caller.read(ToolRequest)).args, caller.request.path_params["name"]
    return answer({"result": await caller.device.work.call(name, args, caller.subject)}, 202)


async def _blob(caller: Caller) -> Response:
    """The body goes to the hub when that is there; a record names it."""
    content, name = await caller.body(caller.max_body), caller.request.query_params.get("name", "")
    kind = caller.request.headers.get("content-type", "application/octet-stream")
    return answer({"sha256": await caller.device.blobs.put(bytes(content), name[:200], kind[:100])}, 202)


async def _updates(caller: Caller) -> Response:
    updates = caller.device.updates
    return answer({"hold": updates.holding, "bundles": updates.evidence()})


async def _hold(caller: Caller) -> Response:
    asked = await caller.read(HoldRequest)
    return answer(await caller.device.updates.hold(asked.minutes, asked.reason), 201)


async def _release(caller: Caller) -> Response:
    await caller.device.updates.release()
    return await _updates(caller)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return problem(request, Problem(error.status_code, what, "see the routes in docs/device-api.md"))


async def _unexpected(request: Request, error: Exception) -> Response:
    return problem(request, Problem(500, f"{type(error).__name__} in the daemon", "its log has the details"))


class _Server(uvicorn.Server):
    """The daemon handles the signals, and says when to end: uvicorn would look ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()

    async def main_loop(self) -> None:
        await self.ending.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LocalApi:
    """The listening service. The socket is bound at once, so that a taken port is known before anything runs."""

    def __init__(
        self,
        device: Device,
        where: str,
        max_body: int = MAX_BODY_MB << 20,
        name: str = "",
        near: Neighbours | None = None,
        refused: Refusing | None = None,
    ) -> None:
        host, port = address(where)
        try:
            family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # asyncio sets TCP_NODELAY only where the protocol is named; without it each small answer waits 40 ms
            self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(found)
        except OSError as error:
            never = isinstance(error, PermissionError | socket.gaierror)
            text = f"the local API cannot listen on {where}: {error}"
            raise (Refused if never else Retry)(text, "choose another --api HOST:PORT, or end what has it") from error
        self.address = host, int(self._socket.getsockname()[1])
        self.url = f"http://{host}:{self.address[1]}"
        app = create_app(device, max_body=max_body, name=name, near=near, refused=refused)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            ws="none",
            date_header=False,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Serve until cancelled."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="uvicorn")
        try:
            await asyncio.shield(serving)
        finally:
            self._server.ending.set()
            await asyncio.wait([serving], timeout=5)
            self._socket.close()
