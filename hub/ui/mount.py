"""The dashboard on the hub's own app: log in, log out, and a gate before every page.

Invariants: nobody reaches a page, or makes the hub keep state, before a login; pages cannot be framed by others;
everything a page loads comes from this hub. NiceGUI has one app in a process, so the hub's services travel with the
request, and a second hub in a process (tests) starts it anew.
"""

import html
import re
from pathlib import Path
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from nicegui import core, ui
from nicegui.version import __version__ as nicegui_version
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.errors import Refused
from hub.ui import bundles, device, events, overview, rollouts
from hub.ui.frame import ACCENT, LOGO, Hub
from hub.ui.sessions import COOKIE

FOLDER = Path(__file__).parent
STATIC = f"/_nicegui/{nicegui_version}/static"
PAGES = (overview, device, bundles, rollouts, events)  # importing them registers their routes
MAX_FORM = 8192
FIRST_TIME = (
    """<p class="faint">First time here? The hub printed the password of <code>admin</code> at its first start.</p>"""
)
HEADERS = {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class Gate:
    """Before NiceGUI: hands the hub and the session to the pages, and sends strangers to the login."""

    def __init__(self, app: ASGIApp, hub: Hub) -> None:
        self._app = app
        self._hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path.startswith("/_nicegui"):
            return await self._app(scope, receive, send)
        if path.startswith("/v1/"):
            body = {"detail": "no such path", "hint": "see /openapi.json"}
            return await JSONResponse(body, 404)(scope, receive, send)
        session = self._hub.sessions.get(self._hub.services.auth, Request(scope).cookies.get(COOKIE))
        if session is None:
            return await RedirectResponse(f"/login?next={quote(path)}", 303)(scope, receive, send)
        scope["outrider"] = (self._hub, session)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers)


def mount(app: FastAPI) -> None:
    """Put the dashboard at `/` of `app`, after the API's routes; its services are `app.state.services`."""
    hub = Hub(app)
    add_login(app, hub)
    core.app.colors(primary=ACCENT)
    core.app.middleware_stack = None
    core.app.user_middleware.clear()
    ui.run_with(
        app,
        title="Outrider",
        favicon=LOGO,
        dark=None,
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=10.0,
        show_welcome_message=False,
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    mounted.app = Gate(mounted.app, hub)


def add_login(app: FastAPI, hub: Hub) -> None:
    """The login page is plain HTML: it works, and costs nothing, before anybody is known."""

    @app.get("/ui/style.css", include_in_schema=False)
    async def style() -> Response:
        return FileResponse(FOLDER / "style.css", headers={"Cache-Control": "no-cache"})

    @app.get("/login", include_in_schema=False)
    async def show_login(next: str = "/", ended: bool = False) -> Response:
        return login_page(next, "Your login has ended. Log in again." if ended else "")

    @app.post("/login", include_in_schema=False)
    async def log_in(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM:
                return login_page("/", "That is too long to be a password.", 413)
        form = {name: values[0] for name, values in parse_qs(body.decode(errors="replace")).items()}
        user, target = form.get("user", ""), form.get("next", "/")
        client = request.client.host if request.client else "unknown"
        try:
            token, lifetime = await hub.services.auth.login(user, form.get("password", ""), client)
            session = hub.sessions.open(hub.services.auth, token)
        except Refused as refused:
            return login_page(target, f"{_sentence(refused.message)} {_sentence(refused.hint)}", refused.status, user)
        local = target.startswith("/") and not target.startswith(("//", "/\\"))
        response = RedirectResponse(target if local else "/", 303)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, session.id, int(lifetime), httponly=True, samesite="lax", secure=secure)
        return response


def login_page(target: str, message: str = "", status: int = 200, user: str = "") -> Response:
    """The form; `message` says why the last try failed."""
    page = (FOLDER / "login.html").read_text()
    values = {
        "static": STATIC,
        "logo": LOGO,
        "next": html.escape(target),
        "user": html.escape(user),
        "message": f'<p class="bad" role="alert">{html.escape(message)}</p>' if message else "",
        "help": "" if message else FIRST_TIME,
        "focus_user": "" if user else "autofocus",
        "focus_password": "autofocus" if user else "",
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], page)
    return HTMLResponse(page, status, headers=HEADERS | {"Cache-Control": "no-store"})


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""
