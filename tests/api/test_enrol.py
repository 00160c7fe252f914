"""An enrolment that was cut is made good with the same key; a clear refusal leaves nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.enrol import IDENTITY, KEY, Broker, Enrolled, enrol, load
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk, sign_grants
from edge_agent.wire.signing import SigningKey


class Hub(HTTPServer):
    """Enrols like the real one: a token works once, a name belongs to one key. `then` is what it does after that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.key = f"http://127.0.0.1:{self.server_port}", SigningKey.generate()
        self.tokens, self.devices = {"one", "two"}, dict[str, str]()
        self.then = "answer"

    def enrol(self, body: dict[str, str]) -> tuple[int, bytes]:
        owner = self.devices.get(body["name"], body["public_key"])
        if body["token"] not in self.tokens or owner != body["public_key"]:
            return 403, b'{"detail": "no"}'
        self.tokens.remove(body["token"])
        self.devices[body["name"]] = body["public_key"]
        now = time.time()
        grants = sign_grants(self.key, Grants(1, now, now + 60, SHIPPED_ROLES, [public_jwk(self.key.public)]))
        broker = Broker("mqtt://127.0.0.1:9")
        return 201, msgspec.json.encode(Enrolled("main", body["name"], self.key.public.text, broker, grants, now))


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        hub: Any = self.server
        status, body = hub.enrol(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if hub.then == "drop":
            return
        self.send_response(500 if hub.then == "fail" else status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if hub.then == "half" else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("then", ["drop", "half", "fail"])
def test_an_enrolment_the_hub_made_and_nobody_heard_of_is_made_good_with_a_new_token(
    hub: Hub, tmp_path: Path, then: str
) -> None:
    state, hub.then = tmp_path / "state", then
    with pytest.raises(Retry, match="the key is kept"):
        enrol(state, hub.url, "one", "press-1")
    assert [path.name for path in state.iterdir()] == [KEY]
    assert (state / KEY).stat().st_mode & 0o777 == 0o600
    hub.then = "answer"
    with pytest.raises(Refused, match="no"):
        enrol(state, hub.url, "one", "press-1")
    identity = enrol(state, hub.url, "two", "press-1")
    assert load(state) == identity
    assert hub.devices == {"press-1": SigningKey.load(state / KEY).public.text}


def test_a_clear_refusal_leaves_nothing_that_was_not_there(hub: Hub, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for _ in range(2):
        with pytest.raises(Refused, match="no"):
            enrol(state, hub.url, "wrong", "press-1")
        assert not state.exists()
    state.mkdir()
    with pytest.raises(Refused):
        enrol(state, hub.url, "wrong", "press-1")
    assert not list(state.iterdir())


def test_a_damaged_key_is_said_and_not_written_over(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / KEY).write_text("not a key")
    with pytest.raises(Fatal, match="cannot be kept"):
        enrol(tmp_path, hub.url, "one", "press-1")
    assert (tmp_path / KEY).read_text() == "not a key"
    assert hub.tokens == {"one", "two"}
    assert not (tmp_path / IDENTITY).exists()
