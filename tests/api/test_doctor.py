"""The doctor tries the broker as the device would, and measures the clock no finer than HTTP tells it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import doctor
from edge_agent.enrol import IDENTITY, KEY, Broker, Enrolled, Identity
from edge_agent.wire.signing import SigningKey
from tests.e2e.daemon_process import free_port
from tests.sync.brokers import Embedded


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Embedded]:
    made = Embedded(tmp_path)
    made.start()
    yield made
    made.stop()


def device(state: Path, broker: Broker) -> Path:
    """The state directory of an enrolled device."""
    state.mkdir()
    SigningKey.generate().save(state / KEY)
    enrolled = Enrolled("main", "press-1", SigningKey.generate().public.text, broker)
    (state / IDENTITY).write_bytes(msgspec.json.encode(Identity("http://127.0.0.1:9", enrolled)))
    return state


def check(name: str, *args: Any) -> doctor.Check:
    return next(each for each in doctor.examine(*args) if each.name == name)


def test_the_broker_is_ok_only_when_it_takes_the_device_s_connection(broker: Embedded, tmp_path: Path) -> None:
    good = device(tmp_path / "good", Broker(broker.url, broker.username, broker.password))
    before = sorted(path.name for path in good.iterdir())
    assert check("broker", good).state == "ok"
    assert sorted(path.name for path in good.iterdir()) == before
    wrong = check("broker", device(tmp_path / "wrong", Broker(broker.url, broker.username, "wrong")))
    assert wrong.state == "fail"
    assert "user and password" in wrong.hint


def test_a_broker_that_is_not_there_fails_an_enrolled_device_and_warns_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "BROKER_S", 0.5)
    nobody = f"mqtt://127.0.0.1:{free_port()}"
    assert check("broker", device(tmp_path / "d", Broker(nobody))).state == "fail"
    assert check("broker", None, "", nobody).state == "warn"
    assert check("broker", None, "", "http://x").state == "fail"


class _Clock(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ahead: float = getattr(self.server, "ahead")  # noqa: B009
        self.send_response_only(200)
        self.send_header("date", formatdate(time.time() + ahead, usegmt=True))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("ahead", "state", "says"),
    [(0.0, "ok", "within 1 s of the hub's"), (20.0, "ok", "-20 s|-21 s|-19 s"), (-300.0, "fail", r"\+(299|300|301) s")],
)
def test_the_clock_is_told_to_whole_seconds(ahead: float, state: str, says: str) -> None:
    with HTTPServer(("127.0.0.1", 0), _Clock) as server:
        server.ahead = ahead  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        found = check("clock", None, f"http://127.0.0.1:{server.server_port}", "http://x")
        server.shutdown()
        thread.join()
    assert found.state == state
    assert re.search(says, found.detail)
