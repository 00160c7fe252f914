"""Errors as JSON `{detail, hint}` with the right status (after RFC 9457), and a bound on request bodies."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.audit import where
from hub.errors import Refused

MAX_BODY = 1 << 20  # bytes, all requests but uploads
MEDIA_TYPE = "application/problem+json"


def problem(status: int, detail: str, hint: str = "", headers: dict[str, str] | None = None) -> JSONResponse:
    content = {"detail": detail, "hint": hint, "status": status}
    return JSONResponse(content, status, media_type=MEDIA_TYPE, headers=headers)


class Where:
    """Lets the audit know from where a request comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            where.set(scope["client"][0] if scope.get("client") else "")
        await self._app(scope, receive, send)


class BoundedBody:
    """Ends a request whose body passes MAX_BODY with 413; blob uploads are bounded where they are written."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(("/v1/blobs/", "/v1/uploads/")):
            await self._app(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                raise HTTPException(413, f"the request is too big: at most {MAX_BODY} bytes")
            return message

        await self._app(scope, bounded, send)


def install(app: FastAPI) -> None:
    """Make every error a problem."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        if error.retry_after_s:
            headers["Retry-After"] = str(error.retry_after_s)
        return problem(error.status, error.message, error.hint, headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return problem(422, f"the request is not valid: {wrong}".encode(errors="replace").decode(), "see /docs")

    async def unwritable(_: Request, error: Exception) -> JSONResponse:
        return problem(422, "the request has text that UTF-8 cannot carry", "send no lone surrogates")

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return problem(error.status_code, str(error.detail), "see /docs", dict(error.headers or {}))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(UnicodeEncodeError, unwritable)
    app.add_middleware(BoundedBody)
    app.add_middleware(Where)
