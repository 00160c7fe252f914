"""Who comes in, how much they may bring, and how an error is said in each of the API's protocols.

Invariants: a subject is verified against the cached grants before a byte of a body is read; what a request is about
is asked of `allowed`; a body is refused as soon as it is known to be too large, and all bodies held at one time are
bounded together; every error says what to do: problem documents (RFC 9457), and below /v2 and for the OpenAI routes
the form that their clients read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edge_agent import audit
from edge_agent.agent.policy import Forbidden
from edge_agent.agent.replay import Replay
from edge_agent.api.metrics import Metrics
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.hosting import Hosting
from edge_agent.sync.blobs import Blobs
from edge_agent.update.service import UpdateService
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import Grants, Subject, allowed
from edge_agent.wire.tokens import verify_access_token
from edge_agent.work import Work

RUN_MODEL = "run:model"
MAX_BODY = 64 * 1024
BODIES = 4
"""How many bodies of the largest size may be held at one time."""
BODY_S = 60.0
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_OPENAI = ("/v1/models", "/v1/chat/")
T = TypeVar("T")


class Device(Protocol):
    """The daemon, as far as the API uses its parts."""

    @property
    def work(self) -> Work: ...
    @property
    def updates(self) -> UpdateService: ...
    @property
    def blobs(self) -> Blobs: ...
    @property
    def models(self) -> Hosting: ...
    @property
    def replay(self) -> Replay: ...
    def grants(self) -> Grants | None: ...
    def healthy(self) -> bool: ...
    async def status(self) -> dict[str, Any]: ...


class Problem(Exception):
    """An answer that is an error: a status, what is wrong, what to do about it."""

    def __init__(self, status: int, detail: str, hint: str = "") -> None:
        super().__init__(detail)
        self.status, self.detail, self.hint = status, detail, hint


class Caller:
    """A verified subject with one request."""

    def __init__(self, gate: Gate, request: Request, subject: Subject) -> None:
        self.request, self.subject, self.device, self.metrics = request, subject, gate.device, gate.metrics
        self.max_body, self.now = gate.max_body, gate.clock()
        self._gate, self._held = gate, 0

    def must(self, action: str, resource: str = "") -> None:
        """Raises Forbidden unless the grants allow it."""
        gate, roles = self._gate, ", ".join(self.subject.roles) or "none"
        if not allowed(_grants(gate.device), self.subject, action, resource, now=self.now, device=gate.name):
            what = f"{action} {resource}".strip()
            raise Forbidden(f"{self.subject.name} may not {what}", f"the roles of this token are {roles}")

    async def body(self, limit: int) -> bytearray:
        """The whole body. Raises Problem when it is larger than the limit, or there is no room for it now."""
        large = Problem(413, f"the body is larger than {limit} bytes", "send less")
        length = self.request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise large
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in self.request.stream():
                    if len(data) + len(chunk) > limit:
                        raise large
                    self._hold(len(chunk))
                    data += chunk
        except TimeoutError as error:
            raise Problem(408, f"the body did not come within {BODY_S:g} s", "send it faster, or less") from error
        return data

    def _hold(self, size: int) -> None:
        gate = self._gate
        if gate.held + size > gate.max_body * BODIES:
            raise Problem(503, f"{gate.held >> 20} MiB of requests are being served", "try again later")
        gate.held += size
        self._held += size

    async def read(self, kind: type[T]) -> T:
        """A small body as JSON of a form. Raises Problem."""
        try:
            return msgspec.json.decode(await self.body(MAX_BODY), type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            fields = ", ".join(getattr(kind, "__struct_fields__", ()))
            raise Problem(400, f"the body cannot be read: {error}", f"JSON with {fields}") from error

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of some work, which is cancelled when the client leaves. Raises ClientDisconnect."""
        doing = asyncio.create_task(work)
        gone = asyncio.ensure_future(self.request.receive())  # after the body there is only the end
        try:
            await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise ClientDisconnect
            return doing.result()
        finally:
            doing.cancel()
            gone.cancel()
            await asyncio.gather(doing, gone, return_exceptions=True)

    def close(self) -> None:
        """Give back the room that the body took."""
        self._gate.held -= self._held


class Refusing(Protocol):
    """Hears of a request that was refused for who asks; the event, who, and why."""

    async def __call__(self, event: str, subject: str, **detail: Any) -> object: ...


Handler = Callable[[Caller], Awaitable[Response]]


class Gate:
    """Makes routes that only the allowed pass, and counts what is held behind them."""

    def __init__(
        self,
        device: Device,
        clock: Callable[[], float],
        max_body: int,
        name: str = "",
        refused: Refusing | None = None,
    ) -> None:
        self.device, self.clock, self.max_body, self.name, self._refused = device, clock, max_body, name, refused
        self.metrics = Metrics()
        self.held = 0

    def route(self, path: str, method: str, action: str, handler: Handler) -> Route:
        """A route for whom the grants allow the action; without one, the handler itself asks."""

        async def endpoint(request: Request) -> Response:
            audit.where.set(request.client.host if request.client else "")
            subject = Subject("unknown", [], 0.0)
            try:
                subject = self._subject(request)
                caller = Caller(self, request, subject)
                if action:
                    caller.must(action, request.path_params.get("name", "") if action == RUN_MODEL else "")
                with contextlib.closing(caller):
                    return await handler(caller)
            except ClientDisconnect:
                return Response(status_code=499)
            except (Problem, OutriderError) as error:
                if self._refused and (isinstance(error, Forbidden) or getattr(error, "status", 0) == 401):
                    why = {"path": f"{request.method} {request.url.path[:200]}", "reason": str(error)[:300]}
                    with contextlib.suppress(OutriderError):  # a full disk: the answer is no all the same
                        await self._refused("refuse:request", subject.name, **why)
                return problem(request, error)

        return Route(path, endpoint, methods=[method])

    def _subject(self, request: Request) -> Subject:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Problem(401, "a bearer token is missing", "log in at the hub: POST /v1/login")
        grants = _grants(self.device)
        try:
            now, floor = self.clock(), grants.issued_at
            return verify_access_token(grants.jwks, token.strip(), now=now, floor=floor, device=self.name)
        except WireError as error:
            raise Problem(401, str(error), "log in at the hub again") from error


def _grants(device: Device) -> Grants:
    grants = device.grants()
    if grants is None:
        raise Problem(503, "this device has no grants yet", "it takes them from the hub when it enrols or connects")
    return grants


def answer(value: Any, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem(request: Request, error: Problem | OutriderError) -> Response:
    """An error in the form that the clients of its route read."""
    path = request.url.path
    plain = not path.startswith(("/v2", *_OPENAI))
    if isinstance(error, OutriderError):
        refused = 422 if plain else 400
        status = 403 if isinstance(error, Forbidden) else refused if isinstance(error, Refused) else 500
        error = Problem(503 if isinstance(error, Retry) else status, error.message, error.hint)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(error.status)
    if plain:
        body = msgspec.json.encode({"status": error.status, "detail": error.detail, "hint": error.hint})
        return Response(body, error.status, headers, "application/problem+json")
    return Response(msgspec.json.encode(said(path, error)), error.status, headers, "application/json")


def said(path: str, error: Problem) -> dict[str, Any]:
    """The error document of the Open Inference Protocol, or OpenAI's."""
    text = f"{error.detail} ({error.hint})" if error.hint else error.detail
    if path.startswith("/v2"):
        return {"error": text}
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    code = "model_not_found" if error.status == 404 else None
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}
