"""Requests to the addresses that the pack's file lists, and to no other.

Invariants: a request goes where a rule allows its method and URL, each redirect again by the rules; it is connected to
the address that was looked up and checked, so a name cannot lead into a private network (unless its rule is `private`)
by answering twice; a rule's own headers, secrets too, go with its requests alone; proxies of the environment are not
used. Answers are bounded in bytes and time, and are untrusted text.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import httpx
import msgspec
from msgspec import Meta, field

from edge_agent.agent.tool import Tool, ToolError, declare
from tools import settings

_UNICAST = ipaddress.IPv6Network("2000::/3")
_EACH = httpx.Limits(max_keepalive_connections=0)  # one kept for an address would serve another host's name unchecked
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule: scheme, host and port stand as they are, `*` in path and query is any text.

    `headers` are sent as they stand, `secrets` from the variables of the environment that they name.
    """

    url: str
    methods: list[Method] = field(default_factory=lambda: ["GET"])
    private: bool = False
    headers: dict[str, str] = {}
    secrets: dict[str, settings.Secret] = {}

    def __post_init__(self) -> None:
        parts = httpx.URL(self.url)
        if parts.scheme not in ("http", "https") or not parts.host or "*" in parts.host or parts.userinfo:
            raise ValueError(f"url {self.url!r} is not like https://api.example.com/v1/*, with a whole host")

    def allows(self, method: str, url: httpx.URL) -> bool:
        """Whether a request may be made by this rule."""
        mine = httpx.URL(self.url)
        there = (mine.scheme, mine.host, mine.port) == (url.scheme, url.host, url.port)
        pattern = re.escape(mine.raw_path.decode()).replace(r"\*", ".*")
        return there and method in self.methods and re.fullmatch(pattern, _path(url)) is not None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file; `ca` is a file of certificates to trust instead of the usual ones."""

    allow: Annotated[list[Allow], Meta(min_length=1, max_length=100)]
    timeout_s: Annotated[float, Meta(gt=0, le=120)] = 10.0
    max_bytes: Annotated[int, Meta(gt=0, le=48 * 1024)] = 32 * 1024
    redirects: Annotated[int, Meta(ge=0, le=10)] = 3
    ca: str = ""


def _path(url: httpx.URL) -> str:
    """Path and query. Raises ToolError for one that a server may read in another way than a rule."""
    text = url.raw_path.decode()
    path = plain = text.partition("?")[0].lower()
    while (decoded := unquote(plain)) != plain:
        plain = decoded
    dots = any(re.split(r"[;\0-\x20]", part)[0] in (".", "..") for part in re.split(r"[/\\]", plain))
    if dots or any(bad in path for bad in ("%2e", "%2f", "%5c", "\\")):
        raise ToolError(f"the path {path[:100]} is not plain: no dots, slashes or backslashes in disguise")
    return text


class Http:
    """The tools."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        verify: Any = ssl.create_default_context(cafile=settings.ca) if settings.ca else True
        self._client = httpx.Client(verify=verify, trust_env=False, timeout=settings.timeout_s, limits=_EACH)

    def http_get(self, url: str) -> dict[str, Any]:
        """Read a web address (URL): its JSON or text."""
        return self._ask("GET", url, None)

    def http_send(self, method: Literal["POST", "PUT", "PATCH", "DELETE"], url: str, body: str = "") -> dict[str, Any]:
        """Send a request with a text or JSON body to a web address (URL)."""
        return self._ask(method, url, body)

    def _ask(self, method: str, url: str, body: str | None) -> dict[str, Any]:
        deadline = time.monotonic() + self._settings.timeout_s
        for _ in range(self._settings.redirects + 1):
            status, headers, content, problem = self._once(method, url, body, deadline)
            if method != "GET":
                return _sent(status, headers.get("content-type", ""), content, problem)
            if problem:
                raise ToolError(f"{url} {problem}")
            if not (300 <= status < 400 and "location" in headers):
                return {"status": status, **_read(headers.get("content-type", ""), content)}
            url = str(httpx.URL(url).join(headers["location"]))
        raise ToolError(f"{url} would be one redirect more than the {self._settings.redirects} that are followed")

    def _once(self, method: str, text: str, body: str | None, deadline: float) -> tuple[int, httpx.Headers, bytes, str]:
        try:
            url = httpx.URL(text).copy_with(fragment=None)
        except (httpx.InvalidURL, ValueError) as error:
            raise ToolError(f"{text[:100]!r} is no URL: {error}") from error
        rule = next((r for r in self._settings.allow if not url.userinfo and r.allows(method, url)), None)
        if rule is None:
            listed = ", ".join(f"{'/'.join(r.methods)} {r.url}" for r in self._settings.allow)
            raise ToolError(f"{method} {url} is not allowed here; allowed: {listed}")
        headers = {**rule.headers, "Host": url.netloc.decode()}
        if unset := [variable for variable in rule.secrets.values() if not os.environ.get(variable)]:
            raise ToolError(f"{url.host} needs the secret {unset[0]}, which is not set on this device")
        for variable in rule.secrets.values():
            if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", os.environ[variable]):
                raise ToolError(
                    f"the secret {variable} cannot be sent: it is to be printable ASCII, no space or line end around"
                )
        headers |= {name: os.environ[variable] for name, variable in rule.secrets.items()}
        headers["Accept-Encoding"] = "identity"  # what is packed has no bound before it is unpacked
        if body:
            headers.setdefault("Content-Type", "application/json" if body.lstrip()[:1] in ("{", "[") else "text/plain")
        tried: httpx.HTTPError | None = None
        for address in _addresses(url.host, url.port or 443, rule.private):
            try:
                asked = self._client.build_request(method, url.copy_with(host=address), headers=headers, content=body)
                asked.extensions["sni_hostname"] = url.host
                asked.extensions["timeout"] = httpx.Timeout(max(0.1, deadline - time.monotonic())).as_dict()
                asked.extensions["trace"] = _until(deadline)
                answer = self._client.send(asked, stream=True)
                try:
                    return answer.status_code, answer.headers, *self._content(answer)
                finally:
                    answer.close()
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                tried = error
            except httpx.HTTPError as error:
                effect = "" if method == "GET" else ": it may have had an effect"
                raise ToolError(f"{url} {self._told(error)}{effect}") from error
        raise ToolError(f"{url}: {type(tried).__name__}: {tried}") from tried

    def _content(self, answer: httpx.Response) -> tuple[bytes, str]:
        """What came, and what is wrong with it; empty when nothing is."""
        if packed := answer.headers.get("content-encoding"):
            return b"", f"gives {packed}, which was not asked for"
        content = b""
        try:
            for piece in answer.iter_raw():
                content += piece
                if len(content) > self._settings.max_bytes:
                    return content[: self._settings.max_bytes], f"gives more than {self._settings.max_bytes} bytes"
        except httpx.HTTPError as error:
            return content, self._told(error)
        return content, ""

    def _told(self, error: httpx.HTTPError) -> str:
        if isinstance(error, httpx.TimeoutException):
            return f"is not read after {self._settings.timeout_s:g} s"
        return f"fails: {type(error).__name__}: {error}"


def _until(deadline: float) -> Callable[[str, dict[str, Any]], None]:
    """A trace of httpcore that holds all reads of a connection to one deadline; its own timeouts begin anew at each."""

    def trace(event: str, about: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = about["return_value"]
            stream.read = partial(read, stream.read)

    def read(plain: Callable[[int, float], bytes], size: int, timeout: float | None = None) -> bytes:
        if (left := deadline - time.monotonic()) <= 0:
            raise httpx.ReadTimeout("the time is over")
        return plain(size, left)

    return trace


def _addresses(host: str, port: int, private: bool) -> list[str]:
    """Those of the host that may be connected to. Raises ToolError."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise ToolError(f"the host {host} is not found: {error}") from error
    if may := [address for address in found if private or _public(address)]:
        return may
    raise ToolError(f"{host} is {found[0]}, a private address: its rule has to say private = true")


def _public(address: str) -> bool:
    known = ipaddress.ip_address(address.partition("%")[0])
    known = getattr(known, "ipv4_mapped", None) or known
    if isinstance(known, ipaddress.IPv6Address) and (known not in _UNICAST or known.sixtofour):
        return False  # forms that a router may turn into any IPv4 address, and what is out of use
    return known.is_global and not known.is_multicast


def _read(kind: str, content: bytes) -> dict[str, Any]:
    if "json" in kind:
        try:
            return {"json": msgspec.json.decode(content)}
        except msgspec.DecodeError as error:
            raise ToolError(f"the answer says it is JSON and is not: {error}") from error
    if b"\0" in content:
        raise ToolError(f"the answer is {len(content)} bytes of {kind or 'no known type'}, not text")
    return {"text": content.decode(errors="replace")}


def _sent(status: int, kind: str, content: bytes, problem: str) -> dict[str, Any]:
    """The result of what was sent: a `problem` with the answer is no error, which would have it sent again."""
    try:
        read = _read("text/plain" if problem else kind, content)
    except ToolError as error:
        read, problem = {}, problem or str(error)
    if len(msgspec.json.encode(read)) > settings.MAX_RESULT:
        read, problem = {}, problem or "gives more than fits a result"
    return {"status": status, **read, **({"problem": problem} if problem else {})}


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`http_get`, and `http_send` where a rule has another method. Raises ValueError."""
    given = settings.read("http", state, options, Settings)
    tools, limit = Http(given), given.timeout_s + 5
    made = [declare(tools.http_get, timeout_s=limit, concurrent=True)]
    if any(set(rule.methods) - {"GET"} for rule in given.allow):
        made.append(declare(tools.http_send, risk="act", idempotent=False, timeout_s=limit, concurrent=True))
    return made
