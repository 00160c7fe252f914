"""A way to the broker through an HTTP proxy: CONNECT (RFC 9110, 9.3.6).

Invariants: the broker's name is resolved by the proxy; what the proxy answers is bounded and read to its end before
the first byte is the broker's; no error shows the proxy's password. Blocking, within the caller's timeout a step.
"""

from __future__ import annotations

import logging
import socket
import time
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from edge_agent.errors import Refused

MAX_HEAD = 8192
log = logging.getLogger(__name__)


class ProxyError(OSError):
    """The proxy is there and does not let us through."""


@dataclass(frozen=True)
class Proxy:
    """`http://[user:password@]host[:port]`."""

    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}"

    @staticmethod
    def parse(url: str) -> Proxy:
        """Raises Refused."""
        hint = "write http://[user:password@]host:8080"
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise Refused(f"not a proxy: {error}", hint) from None
        if parts.scheme != "http" or not parts.hostname:
            raise Refused(f"not a proxy: scheme {parts.scheme!r}, host {parts.hostname!r}", hint)
        return Proxy(parts.hostname, port or 8080, unquote(parts.username or ""), unquote(parts.password or ""))

    @staticmethod
    def of(host: str, given: str = "") -> Proxy | None:
        """The given one, else that of the environment (HTTPS_PROXY, ALL_PROXY, NO_PROXY), which is not for loopback."""
        if given:
            return Proxy.parse(given)
        known = getproxies_environment()
        url = known.get("https") or known.get("all") or ""
        near = host == "localhost" or host.startswith("127.") or host == "::1"
        if not url or near or proxy_bypass(host):
            return None
        try:
            return Proxy.parse(url)
        except Refused as error:  # it may be right for others: a device does not stay down for it
            log.warning("the proxy of the environment is not used: %s", error)
            return None

    def dial(self, host: str, port: int, timeout: float) -> socket.socket:
        """A socket that speaks to `host`. Raises OSError, ProxyError, Refused (user or password)."""
        link = socket.create_connection((self.host, self.port), timeout)
        try:
            until = time.monotonic() + timeout
            self._connect(link, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", until)
            link.settimeout(timeout)
        except BaseException:
            link.close()
            raise
        return link

    def _connect(self, link: socket.socket, at: str, until: float) -> None:
        head = [f"CONNECT {at} HTTP/1.1", f"Host: {at}"]
        if self.username:
            shown = b64encode(f"{self.username}:{self.password}".encode()).decode()
            head.append(f"Proxy-Authorization: Basic {shown}")
        link.sendall("\r\n".join([*head, "", ""]).encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            link.settimeout(max(0.001, until - time.monotonic()))
            answer += (piece := link.recv(1))
            if not piece or len(answer) > MAX_HEAD:
                raise ProxyError(f"the proxy {self} hung up, or gave an endless answer")
        line = answer.split(b"\r\n", 1)[0].decode(errors="replace")
        code = line.split(" ")[1:2]
        if code == ["407"]:
            raise Refused(f"the proxy {self} wants a user", "check user and password of the proxy")
        if not line.startswith("HTTP/1.") or code != ["200"]:
            raise ProxyError(f"the proxy {self} does not connect to {at}: {line[:100]}")
