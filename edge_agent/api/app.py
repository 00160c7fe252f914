"""The device's own HTTP API: the same token as at the hub, checked here with no network.

Invariants: every route but /healthz verifies the bearer token against the cached grants and asks `allowed`; bodies are
bounded before they are parsed; every error is a problem document (RFC 9457) with a hint. Nothing here blocks the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_agent.config import address
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import Grants, Subject, allowed
from edge_agent.wire.tokens import verify_access_token

MAX_BODY = 64 * 1024


class Work(Protocol):
    """What the API sets going; answers are anything msgspec encodes."""

    async def submit(self, text: str, subject: Subject) -> str:
        """The id of the accepted task. Raises Refused, or Retry when the queue is full."""
        ...

    async def task(self, id: str) -> Any | None: ...
    async def tasks(self) -> Sequence[Any]: ...
    async def call(self, name: str, args: dict[str, Any], subject: Subject) -> Any:
        """The result. Raises Denied, Refused, Retry."""
        ...


class Device(Protocol):
    """What the API shows, and its work."""

    @property
    def work(self) -> Work: ...
    def grants(self) -> Grants | None: ...
    def healthy(self) -> bool: ...
    async def status(self) -> dict[str, Any]: ...


class Denied(Refused):
    """Known, but not allowed."""


class TaskRequest(msgspec.Struct, frozen=True):
    text: str


class ToolRequest(msgspec.Struct, frozen=True):
    args: dict[str, Any] = {}


class _Problem(Exception):
    def __init__(self, status: int, detail: str, hint: str = "") -> None:
        super().__init__(detail)
        self.status, self.detail, self.hint = status, detail, hint


Handler = Callable[[Request, Device, Subject], Awaitable[Any]]


def create_app(device: Device, clock: Callable[[], float] = time.time) -> Starlette:
    """The routes over a device."""

    def route(path: str, method: str, action: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                subject = _subject(request, device, clock())
                if action and not allowed(_grants(device), subject, action, now=clock()):
                    raise Denied(f"{subject.name} may not {action}", _roles(subject))
                return _json(await handler(request, device, subject), 202 if method == "POST" else 200)
            except _Problem as problem:
                return _problem(problem.status, problem.detail, problem.hint)
            except Denied as error:
                return _problem(403, error.message, error.hint)
            except Refused as error:
                return _problem(422, error.message, error.hint)
            except Retry as error:
                return _problem(503, error.message, error.hint, {"Retry-After": "5"})
            except OutriderError as error:
                return _problem(500, error.message, error.hint)

        return Route(path, endpoint, methods=[method])

    async def healthz(_: Request) -> Response:
        healthy = device.healthy()
        return _json({"status": "ok" if healthy else "starting"}, 200 if healthy else 503)

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            route("/v1/status", "GET", "read:device", _status),
            route("/v1/tasks", "POST", "run:task", _submit),
            route("/v1/tasks", "GET", "read:task", _tasks),
            route("/v1/tasks/{id}", "GET", "read:task", _task),
            route("/v1/tools/{name}", "POST", "", _tool),  # which permission depends on the tool's risk
        ],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )


async def _status(_: Request, device: Device, __: Subject) -> Any:
    return await device.status()


async def _submit(request: Request, device: Device, subject: Subject) -> Any:
    return {"id": await device.work.submit((await _body(request, TaskRequest)).text, subject)}


async def _tasks(_: Request, device: Device, __: Subject) -> Any:
    return await device.work.tasks()


async def _task(request: Request, device: Device, _: Subject) -> Any:
    task = await device.work.task(request.path_params["id"])
    if task is None:
        raise _Problem(404, f"no task {request.path_params['id']}", "see GET /v1/tasks")
    return task


async def _tool(request: Request, device: Device, subject: Subject) -> Any:
    args = (await _body(request, ToolRequest)).args
    return {"result": await device.work.call(request.path_params["name"], args, subject)}


def _grants(device: Device) -> Grants:
    grants = device.grants()
    if grants is None:
        raise _Problem(503, "this device has no grants yet", "it takes them from the hub when it enrols or connects")
    return grants


def _subject(request: Request, device: Device, now: float) -> Subject:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _Problem(401, "a bearer token is missing", "log in at the hub: POST /v1/login")
    try:
        return verify_access_token(_grants(device).jwks, token.strip(), now=now)
    except WireError as error:
        raise _Problem(401, str(error), "log in at the hub again") from error


def _roles(subject: Subject) -> str:
    return f"the roles of this token are {', '.join(subject.roles) or 'none'}"


async def _body(request: Request, kind: type[Any]) -> Any:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise _Problem(413, f"the body is larger than {MAX_BODY} bytes", "send less")
    try:
        return msgspec.json.decode(bytes(data), type=kind)
    except msgspec.DecodeError as error:
        fields = ", ".join(kind.__struct_fields__)
        raise _Problem(400, f"the body cannot be read: {error}", f"JSON with {fields}") from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _problem(status: int, detail: str, hint: str = "", headers: dict[str, str] | None = None) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} | (headers or {}) if status == 401 else headers
    body = msgspec.json.encode({"status": status, "detail": detail, "hint": hint})
    return Response(body, status, headers, "application/problem+json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "see the routes in docs")


async def _unexpected(_: Request, error: Exception) -> Response:
    return _problem(500, f"{type(error).__name__} in the daemon", "its log has the details")


class _Server(uvicorn.Server):
    """The daemon handles the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LocalApi:
    """The listening service. The socket is bound at once, so that a taken port is known before anything runs."""

    def __init__(self, device: Device, where: str, clock: Callable[[], float] = time.time) -> None:
        host, port = address(where)
        try:
            family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(found)
        except OSError as error:
            never = isinstance(error, PermissionError | socket.gaierror)
            text = f"the local API cannot listen on {where}: {error}"
            raise (Refused if never else Retry)(text, "choose another --api HOST:PORT, or end what has it") from error
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        app = create_app(device, clock)
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Serve until cancelled."""
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="uvicorn")
        try:
            await asyncio.shield(serving)
        finally:
            self._server.should_exit = True
            await asyncio.wait([serving], timeout=5)
            self._socket.close()
