"""A hub and devices as separate processes, for the demo and the benchmarks.

Invariant: every process started here is ended here, whatever happens; logs stay in the fleet's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import httpx

from edge_agent.errors import Fatal, Retry

T = TypeVar("T")
P = ParamSpec("P")


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(
    what: str, timeout_s: float, check: Callable[P, Awaitable[T | None]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Ask until the answer is not None. Raises Retry saying what did not happen."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if (answer := await check(*args, **kwargs)) is not None:
                return answer
        if time.monotonic() > deadline:
            raise Retry(f"{what} did not happen within {timeout_s:g} s")
        await asyncio.sleep(0.05)


class Process:
    """A child `outrider …`, its log beside it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *args: str, env: dict[str, str] | None = None) -> None:
        leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []  # ends even after our kill -9
        command = [*leash, sys.executable, "-m", "edge_agent.cli", *args]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})}
            )

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def check(self) -> None:
        """Raises Fatal with the end of the log when the process is gone."""
        if self._process is None or self._process.returncode is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise Fatal(f"{self.name} ended with status {self._process and self._process.returncode}", tail)

    async def kill(self) -> None:
        """kill -9."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM, and kill -9 after 15 s."""
        await self._end(signal.SIGTERM)

    async def _end(self, how: signal.Signals) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(how)
        try:
            await asyncio.wait_for(self._process.wait(), 15)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class Hub:
    """The hub process with its embedded broker, and a client that is logged in."""

    def __init__(self, folder: Path) -> None:
        self.data, self.port = folder / "hub", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = Process("hub", folder)
        self.password = secrets.token_urlsafe(9)
        self.token = ""
        self.client = httpx.AsyncClient(base_url=self.url, timeout=30)

    async def start(self, *more: str) -> None:
        """Start and log in; `more` arguments for `hub run`."""
        await self.process.start(
            "hub", "run", "--data", str(self.data), "--http", f"127.0.0.1:{self.port}", *more,
            env={"OUTRIDER_ADMIN_PASSWORD": self.password},
        )  # fmt: skip
        await until("the hub's start", 180, self._ready)
        answer = await self.post("/v1/login", {"user": "admin", "password": self.password})
        self.token = answer["access_token"]
        self.client.headers["Authorization"] = f"Bearer {self.token}"

    async def _ready(self) -> bool | None:
        self.process.check()
        return True if (await self.client.get("/readyz")).status_code == 200 else None

    async def get(self, path: str, **query: Any) -> Any:
        """Raises Fatal with the hub's own words."""
        return self._answer(await self.client.get(path, params=query))

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises Fatal with the hub's own words."""
        return self._answer(await self.client.post(path, json=body))

    @staticmethod
    def _answer(response: httpx.Response) -> Any:
        if response.is_error:
            raise Fatal(f"{response.request.method} {response.request.url.path}: {response.text[:300]}")
        return response.json()

    async def stop(self) -> None:
        await self.client.aclose()
        await self.process.stop()


class Device:
    """A daemon process, and a client of its local API that shows the hub's access token."""

    def __init__(self, name: str, folder: Path, hub: Hub) -> None:
        self.name, self.hub = name, hub
        self.state, self.port = folder / name, free_port()
        self.process = Process(name, folder)
        self.client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}", timeout=30, headers={"Authorization": f"Bearer {hub.token}"}
        )
        self._args: list[str] = []

    async def start(self, *args: str) -> None:
        """Start; the arguments are kept for a restart."""
        self._args = list(args) or self._args
        await self.process.start(
            "agent", "--state", str(self.state), "--api", f"127.0.0.1:{self.port}", "--name", self.name, *self._args
        )

    async def status(self) -> dict[str, Any]:
        """The device's own account of itself."""
        response = await self.client.get("/v1/status")
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    async def stop(self) -> None:
        await self.client.aclose()
        await self.process.stop()


@contextlib.asynccontextmanager
async def running(folder: Path, *more: str) -> AsyncIterator[Hub]:
    """A hub in `folder`, which is there already, ended at the end."""
    hub = Hub(folder)
    try:
        await hub.start(*more)
        yield hub
    finally:
        await hub.stop()
