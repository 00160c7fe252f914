"""The frame of every page: header, permission, live updates, actions; and how values are put into words.

Invariants: a page is shown and kept up to date only while its viewer may read it; an action asks `Auth.require` again
when it runs, whatever the button looked like; text that came from devices or people is escaped.
"""

import html
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from nicegui import ui
from nicegui.element import Element
from sqlalchemy.exc import SQLAlchemyError

from hub.errors import HubError, Refused
from hub.services import Services
from hub.ui.sessions import Session, Sessions
from hub.ui.snapshots import Snapshots

log = logging.getLogger(__name__)
ACCENT = "#5b5bd6"
LOGO = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="24" height="24">'
    '<rect width="32" height="32" rx="8" fill="#5b5bd6"/><g fill="none" stroke="#fff" stroke-width="2.6" '
    'stroke-linecap="round"><path d="M9 21a9.5 9.5 0 0 1 0-10M14 18.500a4.500 4.500 0 0 1 0-5"/></g>'
    '<circle cx="21" cy="16" r="4" fill="#fff"/></svg>'
)
NAVIGATION = (
    ("/", "Fleet", "hub"),
    ("/models", "Models", "inventory_2"),
    ("/rollouts", "Rollouts", "waves"),
    ("/events", "Events", "history"),
)
LOOKS = {None: ("brightness_auto", "as the system"), True: ("dark_mode", "dark"), False: ("light_mode", "light")}
NEXT_LOOK = {None: True, True: False, False: None}
DOTS = {"online": "ok", "stale": "stale", "offline": "off"}
Show = Callable[[], Awaitable[None]]


class Hub:
    """What the pages of one hub share; its services exist once `app` has started."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self.sessions = Sessions()
        self.snapshots = Snapshots(lambda: self.services)

    @property
    def services(self) -> Services:
        services: Services = self._app.state.services
        return services


class View:
    """One open page of one session."""

    def __init__(self, hub: Hub, session: Session, path: str, args: dict[str, str]) -> None:
        self.services, self.snapshots = hub.services, hub.snapshots
        self.session, self.path, self.args = session, path, args
        self._sessions = hub.sessions

    def why_not(self, action: str, resource: str = "") -> str:
        """Why this viewer may not, or the empty string."""
        try:
            self.services.auth.require(self.session.subject, action, resource)
        except Refused as refused:
            return f"{refused.message}: {refused.hint}"
        return ""

    def ended(self) -> bool:
        """True when the login is over; the browser is then sent to log in again."""
        if self._sessions.get(self.services.auth, self.session.id) is not None:
            return False
        ui.navigate.to(f"/login?ended=true&next={quote(self.path)}")
        return True

    def log_out(self) -> None:
        self._sessions.close(self.session.id)
        ui.navigate.to("/login")

    def next_look(self) -> None:
        self.session.dark = NEXT_LOOK[self.session.dark]

    async def live(self, show: Show, *needs: str, every: float = 1.0) -> None:
        """Show now, and again while the page is open, the login lasts and its permissions hold."""

        told = False

        async def again() -> None:
            nonlocal told
            if self.ended():
                return
            if any(map(self.why_not, needs)):
                timer.cancel()
                ui.navigate.reload()  # the page then says what is missing
                return
            try:
                await show()
                told = False
            except (HubError, SQLAlchemyError) as error:
                if not told:
                    log.warning("%s is not up to date: %s", self.path, error)
                    notify_refused("What you see is not up to date", str(error))
                told = True

        await show()
        timer = ui.timer(every, again, immediate=False)

    def button(
        self, text: str, run: Show, action: str, resource: str = "", *, icon: str | None = None, quiet: bool = False
    ) -> ui.button:
        """A button for an action; greyed out, saying why, for who may not."""

        async def allowed() -> None:
            self.services.auth.require(self.session.subject, action, resource)
            await run()

        return self.act(text, allowed, self.why_not(action, resource), icon=icon, quiet=quiet)

    def act(self, text: str, run: Show, reason: str = "", *, icon: str | None = None, quiet: bool = False) -> ui.button:
        """A button for what asks by itself whether it may be done; `reason` says why it is greyed out."""

        async def click() -> None:
            if self.ended():
                return
            button.disable()
            try:
                await run()
            except Refused as refused:
                notify_refused(refused.message, refused.hint)
            finally:
                if not button.is_deleted:
                    button.enable()

        with ui.element("span"):
            button = ui.button(text, on_click=click, icon=icon, color=None if quiet else "primary")
            button.props("unelevated no-caps").classes("quiet" if quiet else "")
            if reason:
                button.disable()
                ui.tooltip(reason)
        return button


def page(path: str, title: str, *needs: str) -> Callable[[Callable[[View], Awaitable[None]]], None]:
    """Register a page that needs the given permissions to read."""

    def register(build: Callable[[View], Awaitable[None]]) -> None:
        @ui.page(path, title=f"{title} · Outrider")
        async def guarded(request: Request) -> None:
            hub, session = request.scope["outrider"]
            args = {name: str(value) for name, value in request.path_params.items()}
            view = View(hub, session, request.url.path, args)
            header(view)
            try:
                for action in needs:
                    hub.services.auth.require(session.subject, action)
                await build(view)
            except Refused as refused:
                empty(refused.message, refused.hint, icon="block")

    return register


def header(view: View) -> None:
    """Brand, navigation, who is logged in, the look."""
    ui.add_head_html('<link rel="stylesheet" href="/ui/style.css">')
    dark = ui.dark_mode(view.session.dark)
    with ui.header().classes("top"), ui.element("nav"):
        ui.html(f'<a class="brand" href="/">{LOGO}<span>Outrider</span></a>')
        for target, text, icon in NAVIGATION:
            below = "/devices" if target == "/" else f"{target}/"
            here = view.path == target or view.path.startswith(below)
            with ui.link(target=target).classes("nav here" if here else "nav"):
                ui.icon(icon)
                ui.label(text)
        ui.element("div").classes("grow")

        def look() -> None:
            view.next_look()
            dark.value = view.session.dark
            toggle.props(f"icon={LOOKS[view.session.dark][0]}")
            tip.set_text(f"Look: {LOOKS[view.session.dark][1]}")

        with ui.button(icon=LOOKS[view.session.dark][0], on_click=look).props("flat round dense") as toggle:
            tip = ui.tooltip(f"Look: {LOOKS[view.session.dark][1]}")
        subject = view.session.subject
        ui.html(f'<span class="who"><b>{e(subject.name)}</b><i>{e(", ".join(subject.roles))}</i></span>')
        with ui.button(icon="logout", on_click=view.log_out).props("flat round dense aria-label='Log out'"):
            ui.tooltip("Log out")


def notify_refused(message: str, hint: str) -> None:
    ui.notify(message, caption=hint, type="negative", position="top", timeout=8000)


def e(value: object) -> str:
    """Escaped for HTML."""
    return html.escape(str(value))


def set_html(element: ui.html, content: str) -> None:
    """Send it only when it changed."""
    if element.content != content:
        element.set_content(content)


class Table(Element, component="table.js"):
    """A table of `name: heading`; `minor` columns are left out on a phone.

    A cell is text, or a dict of text, kind (CSS class), href, icon, note, tip, or act and off (a button that sends
    `act` with its row's id, and why it is off), or a list of such.
    """

    def __init__(self, columns: dict[str, str], minor: tuple[str, ...] = ()) -> None:
        super().__init__()
        kinds = {name: "minor" if name in minor else "" for name in columns}
        self._props["columns"] = [{"name": n, "label": label, "kind": kinds[n]} for n, label in columns.items()]
        self._props["rows"] = []

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Each row has an `id`. They are sent only when they changed; the browser patches the cells that differ."""
        if self._props["rows"] != rows:
            self._props["rows"] = rows


def empty(title: str, text: str, command: str = "", icon: str = "hub") -> None:
    """Says what is not here and what to do next."""
    with ui.element("section").classes("empty"):
        ui.icon(icon)
        ui.label(title).classes("title")
        ui.label(text).classes("muted")
        if command:
            code(command)


@contextmanager
def dialog(title: str) -> Iterator[ui.dialog]:
    """An open dialog, gone once it is closed."""
    with ui.dialog(value=True) as made, ui.card().classes("dialog"):
        made.on("hide", made.delete)
        ui.label(title).classes("title")
        yield made


def code(text: str) -> None:
    """A command or token with a button that copies it."""
    with ui.element("div").classes("code"):
        ui.label(text).classes("mono")
        ui.button(icon="content_copy", on_click=lambda: ui.clipboard.write(text)).props("flat round dense size=sm")


def heading(text: str, note: str = "") -> None:
    ui.html(f'<h2>{e(text)}</h2><span class="muted">{e(note)}</span>').classes("heading")


def ago(ts: float | None) -> str:
    """`12 s ago`."""
    return "never" if ts is None else f"{span(time.time() - ts)} ago"


def offset(seconds: float | None) -> str:
    """How far a device's clock is ahead of the hub's."""
    if seconds is None:
        return "—"
    digits = 2 if abs(seconds) < 100 else 0
    return f"{seconds:+.{digits}f} s".replace("-", "\u2212") if abs(seconds) >= 0.005 else "0.00 s"


def span(seconds: float) -> str:
    """A length of time in its largest fitting unit."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{max(0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def clock(ts: float) -> str:
    """Local time of day, with the date when it is not today's."""
    when = datetime.fromtimestamp(ts, UTC).astimezone()
    today = when.date() == datetime.now(UTC).astimezone().date()
    return when.strftime("%H:%M:%S" if today else "%d %b %H:%M")


def measured(value: Any) -> float | None:
    """What a device sent for a number; None where it is none, or past what a float holds."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def number(value: float) -> str:
    """Three figures at least, with thin spaces between thousands."""
    return f"{value:.3g}" if value % 1 and abs(value) < 1000 else f"{value:,.0f}".replace(",", "\u202f")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
