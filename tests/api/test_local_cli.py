"""What `outrider task` prints for machines is JSON, and nobody decides about what was not shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from edge_agent.agent.calls import Call
from edge_agent.agent.transcript import Step, Task
from edge_agent.errors import Refused
from edge_agent.local_cli import task
from edge_agent.wire.grants import Subject

ASK = Step("ask", "d1g3st", Call("purge", {"line": 2}), ts=2.0, expires=9e9)
WAITS = Task("local-1", "empty line 2", Subject("otto", ["operator"], 1.0), 1.0, "waiting", steps=[ASK])
UNDO = {"id": "local-1", "undone": [{"step": 3, "call": "set_speed(line=2, percent=40)"}]}


@pytest.fixture
def device() -> Iterator[tuple[str, list[Any]]]:
    """Where it answers, and what it was told to do."""
    asked = list[Any]()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(WAITS)

        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["args"]
            if not told.get("look"):
                asked.append(told)
            self._say({"result": UNDO})

        def _say(self, value: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(msgspec.json.encode(value))

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        serving.join()


@pytest.mark.parametrize("verb", [["approve"], ["approve", "--deny"], ["undo"]], ids=" ".join)
def test_beside_json_nobody_is_asked_about_a_call_that_is_not_shown(
    device: tuple[str, list[Any]], verb: list[str]
) -> None:
    api, asked = device
    argv = [*verb, "local-1", "--json", "--api", api, "--token", "t"]
    seen = CliRunner().invoke(task, argv, input="y\n")
    assert isinstance(seen.exception, Refused)
    assert (seen.stdout, asked) == ("", [])
    seen = CliRunner().invoke(task, [*argv, "--yes"])
    assert (seen.exit_code, len(asked), bool(json.loads(seen.stdout))) == (0, 1, True)
    seen = CliRunner().invoke(task, [each for each in argv if each != "--json"], input="n\n")
    assert ("set_speed(line=2, percent=40)" if verb == ["undo"] else "purge(line=2)") in seen.stdout
    assert len(asked) == 1
