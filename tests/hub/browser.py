"""A headless Chromium over the W3C WebDriver protocol, and a hub whose dashboard it can open.

Chromium reaches nothing but loopback: every other name resolves to nowhere, so a page that needs a CDN fails here.
"""

import asyncio
import base64
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tests.hub.rig import Hub, running, until

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Browser:
    """One window. Elements are named by CSS selectors; what is looked for is waited for."""

    def __init__(self, http: httpx.AsyncClient, session: str) -> None:
        self._http, self._session = http, session

    async def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = await self._http.request(method, f"/session/{self._session}{path}", json=body)
        value = answer.json()["value"]
        assert not answer.is_error, value
        return value

    async def open(self, url: str) -> None:
        await self.command("POST", "/url", {"url": url})

    async def url(self) -> str:
        return str(await self.command("GET", "/url"))

    async def run(self, script: str, *args: Any) -> Any:
        """The value of a JavaScript function body."""
        return await self.command("POST", "/execute/sync", {"script": script, "args": list(args)})

    async def text(self, selector: str = "body") -> str:
        """The visible text of the first match, or nothing."""
        return str(await self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    async def see(self, words: str, selector: str = "body", within: float = 15.0) -> None:
        """Wait until the words are shown in any match."""
        script = "return [...document.querySelectorAll(arguments[0])].some(x => x.innerText.includes(arguments[1]))"
        try:
            await until(lambda: self.run(script, selector, words), within)
        except AssertionError:
            raise AssertionError(f"{words!r} is not in {selector}: {await self.text()!r}") from None

    async def _find(self, selector: str) -> str:
        script = "return [...document.querySelectorAll(arguments[0])].find(x => x.offsetParent !== null)"
        found = await until(lambda: self.run(script, selector))
        return str(found[ELEMENT])

    async def click(self, selector: str) -> None:
        """Click, once nothing moves or lies over it."""

        async def clicked() -> bool:
            path = f"/session/{self._session}/element/{await self._find(selector)}/click"
            value = (await self._http.post(path, json={})).json()["value"]
            assert value is None or value["error"].startswith(("element", "stale")), value
            return value is None

        await until(clicked)

    async def type(self, selector: str, text: str) -> None:
        await self.command("POST", f"/element/{await self._find(selector)}/value", {"text": text})

    async def cdp(self, command: str, **params: Any) -> Any:
        return await self.command("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    async def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(await self.command("GET", "/screenshot"))

    async def look(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size and the look the system asks for."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.cdp("Emulation.setDeviceMetricsOverride", **metrics)


@asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """Starts chromedriver and through it Chromium, and ends both."""
    assert CHROMIUM is not None
    assert CHROMEDRIVER is not None
    port = free_port()
    quiet = asyncio.subprocess.DEVNULL
    driver = await asyncio.create_subprocess_exec(CHROMEDRIVER, f"--port={port}", stdout=quiet, stderr=quiet)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        try:
            await until(lambda: _ready(http))
            options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = await http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
            value = answer.json()["value"]
            assert "sessionId" in value, value
            yield Browser(http, value["sessionId"])
            await http.delete(f"/session/{value['sessionId']}")
        finally:
            driver.terminate()
            await driver.wait()


async def _ready(http: httpx.AsyncClient) -> bool:
    try:
        return bool((await http.get("/status")).json()["value"]["ready"])
    except httpx.TransportError:
        return False


@asynccontextmanager
async def serving(data: Path) -> AsyncIterator[tuple[Hub, str]]:
    """A hub with its dashboard, served over HTTP from this process; and its address."""
    port = free_port()
    async with running(data, dashboard=True) as hub:
        server = uvicorn.Server(uvicorn.Config(hub.app, port=port, log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        yield hub, f"http://127.0.0.1:{port}"
        server.should_exit = True
        await task
