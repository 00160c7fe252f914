"""A way to the broker through an HTTP proxy: CONNECT (RFC 9110, 9.3.6).

Invariants: the broker's name is resolved by the proxy; what the proxy answers is bounded and read to its end before
the first byte is the broker's; no error shows the proxy's password. Blocking, within the caller's timeout a step.
"""

from __future__ import annotations

import socket
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from edge_agent.errors import Refused

MAX_HEAD = 8192


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
        return None if not url or near or proxy_bypass(host) else Proxy.parse(url)

    def dial(self, host: str, port: int, timeout: float) -> socket.socket:
        """A socket that speaks to `host`. Raises OSError, ProxyError, Refused (user or password)."""
        link = socket.create_connection((self.host, self.port), timeout)
        try:
            self._connect(link, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except BaseException:
            link.close()
            raise
        return link

    def _connect(self, link: socket.socket, at: str) -> None:
        head = [f"CONNECT {at} HTTP/1.1", f"Host: {at}"]
        if self.username:
            shown = b64encode(f"{self.username}:{self.password}".encode()).decode()
            head.append(f"Proxy-Authorization: Basic {shown}")
        link.sendall("\r\n".join([*head, "", ""]).encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += (piece := link.recv(1))
            if not piece or len(answer) > MAX_HEAD:
                raise ProxyError(f"the proxy {self} hung up, or gave an endless answer")
        line = answer.split(b"\r\n", 1)[0].decode(errors="replace")
        code = line.split(" ")[1:2]
        if code == ["407"]:
            raise Refused(f"the proxy {self} wants a user", "check user and password of the proxy")
        if not line.startswith("HTTP/1.") or code != ["200"]:
            raise ProxyError(f"the proxy {self} does not connect to {at}: {line[:100]}")
