"""A way to the broker through a proxy: HTTP CONNECT (RFC 9110, 9.3.6) or SOCKS 5 (RFC 1928, RFC 1929).

Invariants: the broker's name is resolved by the proxy; what the proxy answers is bounded and read to its end before
the first byte is the broker's; no error shows the proxy's password. Blocking, within the caller's timeout a step.
"""

from __future__ import annotations

import socket
import struct
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from edge_agent.errors import Refused

MAX_HEAD = 8192
_PORTS = {"http": 8080, "socks5": 1080, "socks5h": 1080}
_SOCKS = {2: "its rules forbid it", 3: "no way to that network", 4: "no way to that host", 5: "nothing listens there"}


class ProxyError(OSError):
    """The proxy is there and does not let us through."""


@dataclass(frozen=True)
class Proxy:
    """`http://`, `socks5://` or `socks5h://` with `[user:password@]host[:port]`."""

    scheme: str
    host: str
    port: int
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @staticmethod
    def parse(url: str) -> Proxy:
        """Raises Refused."""
        hint = "write http://[user:password@]host:8080 or socks5://host:1080"
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise Refused(f"not a proxy: {error}", hint) from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise Refused(f"not a proxy: scheme {parts.scheme!r}, host {parts.hostname!r}", hint)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if len(user.encode()) > 255 or len(password.encode()) > 255:
            raise Refused("the proxy's user or password is too long", "at most 255 bytes")
        return Proxy(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], user, password)

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
            (self._connect if self.scheme == "http" else self._socks)(link, host, port)
        except BaseException:
            link.close()
            raise
        return link

    def _connect(self, link: socket.socket, host: str, port: int) -> None:
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        head = [f"CONNECT {at} HTTP/1.1", f"Host: {at}"]
        if self.username:
            shown = b64encode(f"{self.username}:{self.password}".encode()).decode()
            head.append(f"Proxy-Authorization: Basic {shown}")
        link.sendall("\r\n".join([*head, "", ""]).encode())
        answer = bytearray()
        while not answer.endswith(b"\r\n\r\n"):
            answer += _exactly(link, 1)
            if len(answer) > MAX_HEAD:
                raise ProxyError(f"the proxy {self} gave an endless answer")
        line = answer.split(b"\r\n", 1)[0].decode(errors="replace")
        code = line.split(" ")[1:2]
        if code == ["407"]:
            raise Refused(f"the proxy {self} wants a user", "check user and password of the proxy")
        if not line.startswith("HTTP/1.") or code[:1] != ["200"]:
            raise ProxyError(f"the proxy {self} does not connect to {at}: {line[:100]}")

    def _socks(self, link: socket.socket, host: str, port: int) -> None:
        methods = b"\x00\x02" if self.username else b"\x00"
        link.sendall(bytes([5, len(methods)]) + methods)
        version, method = _exactly(link, 2)
        if version != 5:
            raise ProxyError(f"{self} is no SOCKS 5 proxy")
        if method == 2 and self.username:
            user, password = self.username.encode(), self.password.encode()
            link.sendall(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
            method = _exactly(link, 2)[1]
        if method != 0:
            raise Refused(f"the proxy {self} does not take us", "check user and password of the proxy")
        name = host.encode("idna")
        link.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack(">H", port))
        _, code, _, kind = _exactly(link, 4)
        if code:
            raise ProxyError(f"the proxy {self} does not connect to {host}:{port}: {_SOCKS.get(code, code)}")
        _exactly(link, {1: 4, 4: 16}.get(kind) or _exactly(link, 1)[0])
        _exactly(link, 2)


def _exactly(link: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = link.recv(count - len(got))
        if not piece:
            raise ProxyError("the proxy hung up")
        got += piece
    return got
