"""A device whose agent speaks through an endpoint of its settings: tasks, its own API, a server that refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.agent.test_spans import Collector, collecting
from tests.e2e.daemon_process import ROOT, DaemonProcess, until
from tests.engines.endpoints import DONE, Handler, Scripted, says, server, stream, whole

KEY = "a-key-of-the-plant"


def caller(handler: Handler) -> None:
    """Calls a tool, then says what it gave; talks when there is no tool."""
    if handler.headers.get("authorization") != f"Bearer {KEY}":
        whole(401, {"error": {"message": "who are you?"}})(handler)
        return
    messages = handler.body["messages"]
    if messages[-1]["role"] == "tool":
        stream(says(f"Line 1: {messages[-1]['content']}"), says("", "stop"), DONE)(handler)
    elif "tools" in handler.body:
        line = 2 if handler.body["model"] == "small" else 1
        function = {"name": "read_sensor", "arguments": f'{{"sensor": "speed", "line": {line}}}'}
        call = {"index": 0, "id": "x", "type": "function", "function": function}
        stream(says(tool_calls=[call]), says("", "tool_calls"), DONE)(handler)
    else:
        stream(says("Good "), says("day"), says("", "stop"), DONE)(handler)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Scripted]:
    with server(caller) as made:
        yield made


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, endpoint: Scripted, collector: Collector
) -> Iterator[DaemonProcess]:
    tmp_path = tmp_path_factory.mktemp("endpoint")
    made = DaemonProcess(tmp_path / "press-1")
    config = f'model = "plant"\n[endpoints.plant]\nurl = "{endpoint.url}"\nmodel = "big"\nkey_env = "PLANT_KEY"\n'
    config += f'[endpoints.other]\nurl = "{endpoint.url}"\nmodel = "small"\nkey_env = "PLANT_KEY"\n'
    config += f'[otel]\nendpoint = "{collector.url}"\nevery_s = 0.1\n'
    (tmp_path / "agent.toml").write_text(config)
    try:
        made.start("--config", str(tmp_path / "agent.toml"), PLANT_KEY=KEY)
        yield made
    finally:
        made.end(signal.SIGKILL)


def ended(daemon: DaemonProcess, text: str) -> dict[str, Any]:
    id = daemon.ask("POST", "/v1/tasks", {"text": text}).json()["id"]

    def task() -> dict[str, Any] | None:
        found: dict[str, Any] = daemon.ask("GET", f"/v1/tasks/{id}").json()
        return found if found["state"] != "running" else None

    return until("the end of the task", task)


def test_a_task_and_a_client_are_served_by_the_endpoint_and_the_key_is_nowhere(
    daemon: DaemonProcess, endpoint: Scripted
) -> None:
    until("the endpoint", lambda: daemon.status()["models"].get("plant", {}).get("engine"))
    shown = daemon.status()["models"]["plant"]
    assert (shown["state"], shown["engine"], shown["provider"]) == ("configured", "openai", endpoint.url)
    task = ended(daemon, "how fast is line 1?")
    assert (task["state"], task["error"]) == ("succeeded", "")
    assert task["answer"] == "Line 1: sensor: speed, line: 1, value: 7.5"
    asked = {"model": "plant", "messages": [{"role": "user", "content": "hello", "name": "ada"}]}
    said = daemon.ask("POST", "/v1/chat/completions", asked).json()
    assert said["choices"][0]["message"]["content"] == "Good day"
    assert endpoint.asked[-1][2]["messages"] == asked["messages"]
    tool = {"type": "function", "function": {"name": "read_sensor", "parameters": {"type": "object"}}}
    called = daemon.ask("POST", "/v1/chat/completions", asked | {"tools": [tool]}).json()["choices"][0]
    assert called["finish_reason"] == "tool_calls"
    assert json.loads(called["message"]["tool_calls"][0]["function"]["arguments"]) == {"sensor": "speed", "line": 1}
    kept = [path.read_bytes() for path in daemon.state.rglob("*") if path.is_file()]
    assert not [raw for raw in [*kept, daemon.log.read_bytes()] if KEY.encode() in raw]


def test_the_trace_of_a_task_is_at_the_collector_with_nothing_of_what_was_said(
    daemon: DaemonProcess, collector: Collector
) -> None:
    id = ended(daemon, "how fast is line 1?")["id"]

    def of_task() -> list[str] | None:
        roots = [span for span in collector.spans() if id in str(span.attributes) and not span.parent_span_id]
        return [span.name for span in collector.spans() if roots and span.trace_id == roots[0].trace_id]

    names = until("the trace", of_task)
    assert names == ["invoke_agent outrider", "chat plant", "execute_tool read_sensor", "chat plant"]
    assert "how fast" not in str(collector.got)


def test_a_task_is_replayed_on_another_model_from_the_command_line(daemon: DaemonProcess) -> None:
    until("the other endpoint", lambda: daemon.status()["models"].get("other", {}).get("engine"))
    id = ended(daemon, "how fast is line 1?")["id"]
    before = daemon.ask("GET", "/v1/tasks").json()
    for model, code, told in (("plant", 0, "2 of 2 the same"), ("other", 1, "1 of 2 the same"), ("none", 78, "")):
        argv = [sys.executable, "-m", "edge_agent.cli", "replay", id, "--model", model, "--api", daemon.url]
        env = {**os.environ, "OUTRIDER_TOKEN": daemon.token("operator")}
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60, check=False)
        assert (done.returncode, told in done.stdout) == (code, True), (done.stdout, done.stderr)
        if model == "other":
            assert 'differs: read_sensor(sensor="speed", line=2)' in done.stdout
    assert "the language model none is not installed" in done.stderr
    assert daemon.ask("GET", "/v1/tasks").json() == before
    assert daemon.ask("POST", f"/v1/tasks/{id}/replay", {}, "viewer").status_code == 403


def test_a_server_that_is_away_fails_the_task_with_its_name_and_the_next_one_works(
    daemon: DaemonProcess, endpoint: Scripted
) -> None:
    endpoint.answers = [whole(401, {"error": {"message": "who are you?"}})]
    task = ended(daemon, "how fast is line 1?")
    assert task["state"] == "failed"
    assert "refuses the key: 401 who are you? (it is sent PLANT_KEY)" in task["error"]
    endpoint.answers = [caller]
    assert ended(daemon, "how fast is line 1?")["state"] == "succeeded"
    assert daemon.end() == 0
