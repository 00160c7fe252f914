"""A real daemon process for the tests, enrolled by hand at a hub that need not exist."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from edge_agent.enrol import IDENTITY, KEY, Broker, Enrolled, Identity
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk, sign_grants
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_access_token

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, check: Callable[[], T | None], timeout_s: float = 30.0) -> T:
    """The first answer that is neither None nor False; what a daemon does is only seen from outside."""
    deadline = time.monotonic() + timeout_s
    pause = socket.socketpair()
    try:
        while time.monotonic() < deadline:
            if answer := check():
                return answer
            pause[0].settimeout(0.05)
            try:
                pause[0].recv(1)
            except TimeoutError:
                continue
    finally:
        for end in pause:
            end.close()
    raise AssertionError(f"{what} did not happen within {timeout_s:g} s")


class DaemonProcess:
    """`outrider agent` on a state directory; `hub_key` signs what its hub would sign."""

    def __init__(self, state: Path, hub: str = "http://127.0.0.1:9", broker: str = "mqtt://127.0.0.1:9") -> None:
        self.state, self.port = state, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.hub_key = SigningKey.generate()
        self.log = state.parent / f"{state.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        now = time.time()
        grants = Grants(1, now, now + 3600, SHIPPED_ROLES, [public_jwk(self.hub_key.public)])
        enrolled = Enrolled(
            "main", "press-1", self.hub_key.public.text, Broker(broker), sign_grants(self.hub_key, grants), now
        )
        state.mkdir(mode=0o700)
        SigningKey.generate().save(state / KEY)
        (state / IDENTITY).write_bytes(msgspec.json.encode(Identity(hub, enrolled)))

    def start(self, *args: str, group: bool = False, **env: str) -> None:
        command = [sys.executable, "-m", "edge_agent.cli", "agent", "--state", str(self.state)]
        options = ["--api", f"127.0.0.1:{self.port}", "--pack", "tests.e2e.daemon_pack", "--telemetry-s", "0.5", *args]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **env},
                start_new_session=group,
            )
        until("the local API", self._healthy)

    def _healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def token(self, *roles: str) -> str:
        return issue_access_token(self.hub_key, "ada", list(roles) or ["admin"], now=time.time(), lifetime_s=600)

    def ask(self, method: str, path: str, body: Any = None, *roles: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token(*roles)}"}
        return httpx.request(method, f"{self.url}{path}", json=body, headers=headers, timeout=30)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("GET", "/v1/status").json()
        return answer

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(30)
