"""Requests go where the file allows, and nowhere else: methods, paths, redirects, private networks, sizes, time."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal
from tools import settings
from tools.http import _public


class Site(BaseHTTPRequestHandler):
    """A web server that answers by the path, and keeps what came."""

    seen: list[tuple[str, str, dict[str, str], str]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer("")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["content-length"])).decode())

    def answer(self, body: str) -> None:
        self.seen.append((self.command, self.path, dict(self.headers), body))
        path = self.path.partition("?")[0].removeprefix("/v1/")
        if path in ("head", "early"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: " if path == "head" else b"")
            with contextlib.suppress(OSError):
                for _ in range(60):
                    time.sleep(0.05)
                    self.wfile.write(b"a" if path == "head" else b"HTTP/1.1 103 Early Hints\r\n\r\n")
            self.close_connection = True
            return
        if path == "slow":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for _ in range(100):
                time.sleep(0.05)
                self.wfile.write(b"x")
                self.wfile.flush()
            return
        if path.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", f"/{path.removeprefix('to/')}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        large = {"large": b"x" * 5000, "binary": b"\0\1", "nojson": b"{", "control": b"\1" * 3000}
        content = large.get(path, json.dumps({"path": self.path, "items": [1, 2]}).encode())
        self.send_response(404 if path == "gone" else 200)
        self.send_header(
            "Content-Type", "application/json" if path not in ("large", "binary", "control") else "text/plain"
        )
        if path == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def site() -> Iterator[tuple[str, list[Any]]]:
    seen: list[Any] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Site,), {"seen": seen}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def tools(folder: Path, text: str) -> dict[str, Any]:
    (folder / "http.toml").write_text(text)
    return {tool.spec.name: tool for tool in load("tools.http", folder, {})}


def rule(base: str, path: str = "/v1/*", more: str = "private = true") -> str:
    return f'[[allow]]\nurl = "{base}{path}"\n{more}\n'


def test_an_allowed_address_is_read_and_no_other_method_path_host_or_port(
    tmp_path: Path, site: tuple[str, list[Any]]
) -> None:
    base, seen = site
    made = tools(tmp_path, rule(base) + rule("https://api.example.com", "/only"))
    assert list(made) == ["http_get"], "no rule sends anything, so there is no tool that does"
    get = made["http_get"].function
    assert get(url=f"{base}/v1/a?x=1#part") == {"status": 200, "json": {"path": "/v1/a?x=1", "items": [1, 2]}}
    assert get(url=f"{base}/v1/gone")["status"] == 404
    before = len(seen)
    for url in (
        f"{base}/v2/a",
        f"{base}/v1",
        base.replace("127.0.0.1", "localhost") + "/v1/a",
        base.replace("http://", "https://") + "/v1/a",
        base.replace("//", "//user:pw@") + "/v1/a",
        "http://127.0.0.1:1/v1/a",
        "file:///etc/passwd",
    ):
        with pytest.raises(ToolError, match="is not allowed here; allowed: GET http"):
            get(url=url)
    for path in (
        *("../admin", "%2e%2e/admin", "a/%2e%2e%2fadmin", "a%5cb", "..;/admin", "..;a=1/admin", "..%3b/admin"),
        *("..%3B/admin", "..%00/admin", ".;/admin", "%252e%252e/admin", "a/..%252fadmin", "..%20/admin"),
    ):
        with pytest.raises(ToolError, match=r"is not (plain|allowed)"):
            get(url=f"{base}/v1/{path}")
    assert len(seen) == before
    for path in ("..a/b", "a..b/c;d=1", "50%25", ".well-known/x"):
        assert get(url=f"{base}/v1/{path}")["status"] == 200, "dots and semicolons that no server takes for a step up"


def test_a_body_is_sent_by_its_rule_with_its_headers_and_secrets(
    tmp_path: Path, site: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = site
    rules = rule(base, "/v1/open") + rule(
        base,
        "/v1/orders",
        'private = true\nmethods = ["POST"]\nheaders = {X-Site = "7"}\nsecrets = {Authorization = "TOOL_ORDERS"}',
    )
    made = tools(tmp_path, rules)
    assert (made["http_send"].spec.risk, made["http_send"].spec.idempotent) == ("act", False)
    send, get = made["http_send"].function, made["http_get"].function
    with pytest.raises(ToolError, match="needs the secret TOOL_ORDERS"):
        send(method="POST", url=f"{base}/v1/orders", body="{}")
    monkeypatch.setenv("TOOL_ORDERS", "Bearer s3cret")
    assert send(method="POST", url=f"{base}/v1/orders", body='{"part": 7}')["status"] == 200
    method, _, headers, body = seen[-1]
    assert (method, body, headers["X-Site"], headers["Authorization"]) == ("POST", '{"part": 7}', "7", "Bearer s3cret")
    get(url=f"{base}/v1/open")
    assert "Authorization" not in seen[-1][2]
    with pytest.raises(ToolError, match=r"DELETE .* is not allowed"):
        send(method="DELETE", url=f"{base}/v1/orders")


@pytest.mark.parametrize("value", ["s3cret-value\r", "s3cret-v\u00e4lue", " s3cret-value", "s3cret\nX: y"])
def test_a_secret_that_no_header_can_hold_is_told_by_its_variable_alone(
    tmp_path: Path, site: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    base, seen = site
    get = tools(tmp_path, rule(base, more='private = true\nsecrets = {X-Key = "TOOL_KEY"}'))["http_get"].function
    monkeypatch.setenv("TOOL_KEY", value)
    with pytest.raises(ToolError, match="the secret TOOL_KEY cannot be sent") as told:
        get(url=f"{base}/v1/a")
    assert "s3cret" not in str(told.value)
    assert seen == []


def test_each_redirect_is_checked_and_they_are_bounded(tmp_path: Path, site: tuple[str, list[Any]]) -> None:
    base, seen = site
    get = tools(tmp_path, "redirects = 2\n" + rule(base))["http_get"].function
    assert get(url=f"{base}/v1/to/v1/a")["json"]["path"] == "/v1/a"
    with pytest.raises(ToolError, match="/secret is not allowed here"):
        get(url=f"{base}/v1/to/secret")
    with pytest.raises(ToolError, match="one redirect more than the 2"):
        get(url=f"{base}/v1/to/v1/to/v1/to/v1/a")
    assert "/secret" not in [path for _, path, _, _ in seen]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "fec0::1", "2001::1")),
        *((address, False) for address in ("::ffff:127.0.0.1", "100.64.0.1", "ff02::1", "fe80::1%eth0", "fd00::1")),
    ],
)
def test_an_address_that_may_lead_inside_by_another_form_is_private(address: str, public: bool) -> None:
    assert _public(address) is public


def test_a_private_address_is_refused_unless_its_rule_says_so(tmp_path: Path, site: tuple[str, list[Any]]) -> None:
    base, seen = site
    for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "[::ffff:10.0.0.1]", "0.0.0.0", "224.0.0.1"):
        url = f"http://{host}:{base.rpartition(':')[2]}"
        get = tools(tmp_path, rule(url, more=""))["http_get"].function
        with pytest.raises(ToolError, match="a private address: its rule has to say private = true"):
            get(url=f"{url}/v1/a")
    assert seen == []


def test_answers_are_bounded_in_bytes_and_time_and_are_text(tmp_path: Path, site: tuple[str, list[Any]]) -> None:
    base, _ = site
    get = tools(tmp_path, "max_bytes = 4000\ntimeout_s = 3\n" + rule(base))["http_get"].function
    for path, told in (
        ("large", "gives more than 4000 bytes"),
        ("binary", "is 2 bytes of text/plain, not text"),
        ("nojson", "says it is JSON and is not"),
        ("packed", "gives gzip, which was not asked for"),
    ):
        with pytest.raises(ToolError, match=told):
            get(url=f"{base}/v1/{path}")
    began = time.monotonic()
    with pytest.raises(ToolError, match="not read after 3 s"):
        get(url=f"{base}/v1/slow")
    assert time.monotonic() - began < 4.8
    closed = tools(tmp_path, rule("http://127.0.0.1:1"))["http_get"].function
    with pytest.raises(ToolError, match="ConnectError"):
        closed(url="http://127.0.0.1:1/v1/a")


@pytest.mark.parametrize("path", ["head", "early", "slow"])
def test_an_answer_that_trickles_ends_at_its_time_wherever_it_is(
    tmp_path: Path, site: tuple[str, list[Any]], path: str
) -> None:
    base, _ = site
    get = tools(tmp_path, "timeout_s = 0.5\n" + rule(base))["http_get"].function
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"is not read after 0.5 s"):
        get(url=f"{base}/v1/{path}")
    assert time.monotonic() - began < 1.5


def test_what_was_sent_is_no_error_for_what_its_answer_holds(
    tmp_path: Path, site: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error would have it sent again."""
    monkeypatch.setattr(settings, "MAX_RESULT", 10_000)
    base, seen = site
    more = 'private = true\nmethods = ["POST"]'
    send = tools(tmp_path, "max_bytes = 4000\ntimeout_s = 0.5\n" + rule(base, more=more))["http_send"].function
    for path, text, problem in (
        ("large", "x" * 4000, "gives more than 4000 bytes"),
        ("binary", "", "the answer is 2 bytes of text/plain, not text"),
        ("nojson", "", "the answer says it is JSON and is not"),
        ("packed", "", "gives gzip, which was not asked for"),
        ("slow", "x", "is not read after 0.5 s"),
        ("control", "", "gives more than fits a result"),
    ):
        got = send(method="POST", url=f"{base}/v1/{path}", body="{}")
        assert (got["status"], got.get("text", "")[:4000].startswith(text)) == (200, True)
        assert problem in got["problem"]
    assert len(got) == 2
    with pytest.raises(ToolError, match=r"is not read after 0.5 s: it may have had an effect"):
        send(method="POST", url=f"{base}/v1/head", body="{}")
    assert [each[0] for each in seen] == ["POST"] * 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing required field `allow`"),
        ("allow = []", "length >= 1"),
        ('[[allow]]\nurl = "https://*.example.com/"', "is not like https://api.example.com"),
        ('[[allow]]\nurl = "ftp://a/"', "is not like https://api.example.com"),
        ('[[allow]]\nurl = "https://a/"\nmethod = "GET"', "unknown field `method`"),
        ("allow = [", "http.toml cannot be used"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        tools(tmp_path, text)


def test_without_a_file_the_pack_says_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CONFIG", str(tmp_path / "etc" / "agent.toml"))
    with pytest.raises(Fatal, match=r"needs a file: .*etc/tools/http\.toml or .*state/http\.toml"):
        load("tools.http", tmp_path / "state", {})
    (tmp_path / "etc" / "tools").mkdir(parents=True)
    (tmp_path / "etc" / "tools" / "http.toml").write_text(rule("http://a"))
    assert [tool.spec.name for tool in load("tools.http", tmp_path / "state", {})] == ["http_get"]
    with pytest.raises(Fatal, match="has no option rate; it has config"):
        load("tools.http", tmp_path / "state", {"rate": "1"})


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of a host by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    whose, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(whose)
        .issuer_name(whose)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    files = folder / f"{name}.pem", folder / f"{name}.key"
    files[0].write_bytes(made.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@pytest.mark.parametrize(
    ("name", "trusted", "told"),
    [
        ("localhost", "localhost", ""),
        ("localhost", "", "CERTIFICATE_VERIFY_FAILED"),
        ("elsewhere", "elsewhere", "Hostname mismatch.*not valid for 'localhost'"),
    ],
)
def test_over_tls_the_host_is_known_by_its_name_though_it_is_reached_by_its_address(
    tmp_path: Path, name: str, trusted: str, told: str
) -> None:
    here = type("Here", (Site,), {"seen": []})
    files = certificate(tmp_path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), here)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    ca = f'ca = "{tmp_path / trusted}.pem"\n' if trusted else ""
    url = f"https://localhost:{server.server_port}"
    try:
        by_number = url.replace("localhost", "127.0.0.1")
        get = tools(tmp_path, ca + rule(url) + rule(by_number))["http_get"].function
        if told:
            with pytest.raises(ToolError, match=told):
                get(url=f"{url}/v1/a")
        else:
            assert get(url=f"{url}/v1/a")["json"]["path"] == "/v1/a"
            assert here.seen[0][2]["Host"] == f"localhost:{server.server_port}"
            with pytest.raises(ToolError, match="IP address mismatch"):
                get(url=f"{by_number}/v1/a")  # not by the connection that is known as localhost
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
