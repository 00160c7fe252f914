"""The daemon with no hub and no broker: it serves, it is supervised, it survives."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.daemon_process import ROOT, DaemonProcess, free_port, until

UNIT = ROOT / "deploy" / "outrider-agent.service"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    made = DaemonProcess(tmp_path / "press-1")
    yield made
    made.end(signal.SIGKILL)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def records(daemon: DaemonProcess, kind: str) -> list[str]:
    with sqlite3.connect(f"file:{daemon.state / 'outrider.db'}?mode=ro", uri=True) as db:
        blocks = [lines.decode() for (lines,) in db.execute("select lines from outbox order by first")]
    db.close()
    return [line for block in blocks for line in block.splitlines() if f'"kind":"{kind}"' in line]


def test_tools_answer_and_telemetry_gathers_with_no_network(daemon: DaemonProcess) -> None:
    daemon.start()
    answer = daemon.ask("POST", "/v1/tools/read_sensor", {"args": {"sensor": "speed", "line": 1}})
    assert answer.json() == {"result": {"sensor": "speed", "line": 1, "value": 7.5}}
    until("samples", lambda: len(records(daemon, "telemetry")) >= 5)
    assert any('"sensor":"wear","line":2' in line for line in records(daemon, "telemetry"))
    assert any("memory_free_mb" in line for line in records(daemon, "telemetry"))
    status = daemon.status()
    assert status["connected"] is False
    assert status["outbox"]["depth"] == status["last_seq"] - status["acked"] >= 5
    assert {tool["name"] for tool in status["tools"]} == {"read_sensor", "stamp", "jam", "hang"}
    assert daemon.end() == 0


@pytest.mark.parametrize(
    ("tool", "args", "roles", "status", "says"),
    [
        ("read_sensor", {"sensor": "noise", "line": 1}, ["admin"], 422, "noise"),
        ("read_sensor", {"sensor": "speed", "line": 3}, ["admin"], 422, "line"),
        ("open_door", {}, ["admin"], 422, "open_door"),
        ("jam", {}, ["admin"], 422, "the feeder is jammed"),
        ("stamp", {"text": "x"}, ["viewer"], 403, "may not use stamp"),
    ],
)
def test_a_bad_call_is_refused_with_its_reason(
    shared: DaemonProcess, tool: str, args: dict[str, Any], roles: list[str], status: int, says: str
) -> None:
    answer = shared.ask("POST", f"/v1/tools/{tool}", {"args": args}, *roles)
    assert answer.status_code == status
    assert says in answer.json()["detail"]
    assert answer.json()["hint"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    made = DaemonProcess(tmp_path_factory.mktemp("shared") / "press-1")
    made.start()
    yield made
    made.end(signal.SIGKILL)


def test_a_tool_that_hangs_is_killed_and_the_next_one_answers(shared: DaemonProcess) -> None:
    hung = shared.ask("POST", "/v1/tools/hang", {})
    assert hung.status_code == 503
    answer = shared.ask("POST", "/v1/tools/read_sensor", {"args": {"sensor": "speed", "line": 1}})
    assert answer.status_code == 202
    assert shared.status()["workers"]["tools"]["starts"] == 2


def test_the_daemon_process_imports_no_heavy_library(shared: DaemonProcess) -> None:
    assert shared.process is not None
    mapped = Path(f"/proc/{shared.process.pid}/maps").read_text()
    for library in ("numpy", "onnxruntime", "pydantic_core", "_upb"):
        assert library not in mapped
    assert "sqlite3" in mapped


def test_kill_9_takes_the_children_along_and_an_accepted_task_is_resumed(daemon: DaemonProcess) -> None:
    daemon.start("--task-s", "4")
    id = daemon.ask("POST", "/v1/tasks", {"text": "how fast is line 1?"}).json()["id"]
    until("the task to run", lambda: daemon.status()["running"] == id)
    workers = [worker["pid"] for worker in daemon.status()["workers"].values()]
    before = len(records(daemon, "telemetry"))
    daemon.end(signal.SIGKILL)
    until("the children to end", lambda: all(gone(pid) for pid in workers))
    daemon.start("--task-s", "1")
    ended = until("the end of the task", lambda: _ended(daemon, id))
    assert ended["runs"] == 2
    assert ended["error"]
    until("the end of its job, reported once the task is saved", lambda: "failed" in _told(daemon, id))
    assert _told(daemon, id) == ["delivered", "running", "failed"]
    assert len(records(daemon, "telemetry")) >= before
    assert len([line for line in records(daemon, "audit") if '"event":"submit"' in line]) == 1


def _told(daemon: DaemonProcess, id: str) -> list[str]:
    """The states that the job of a task was reported in, those between left out."""
    lines = [line for line in records(daemon, "job") if id in line]
    return [state for line in lines for state in ("delivered", "running", "failed") if f'"state":"{state}"' in line]


def _ended(daemon: DaemonProcess, id: str) -> dict[str, Any] | None:
    task: dict[str, Any] = daemon.ask("GET", f"/v1/tasks/{id}").json()
    return task if task["state"] != "running" else None


def test_a_second_daemon_on_the_same_state_or_port_is_refused(daemon: DaemonProcess, tmp_path: Path) -> None:
    daemon.start()
    twin = DaemonProcess(tmp_path / "press-2")
    twin.port = daemon.port
    for state in (daemon.state, twin.state):
        command = ["agent", "--state", str(state), "--api", f"127.0.0.1:{daemon.port}"]
        done = _outrider(*command)
        assert done.returncode == 75, done.stderr  # systemd tries again
        assert done.stderr.splitlines()[-1].startswith("hint:")
    assert "in use by another process" in _outrider("agent", "--state", str(daemon.state)).stderr


def test_a_signal_to_the_whole_process_group_ends_it_in_time(daemon: DaemonProcess) -> None:
    for _ in range(3):
        daemon.start(group=True)
        assert daemon.process is not None
        until("the tools", lambda: daemon.status()["tools"])
        children = [worker["pid"] for worker in daemon.status()["workers"].values()]
        os.killpg(daemon.process.pid, signal.SIGTERM)
        assert daemon.process.wait(10) == 0
        assert all(gone(pid) for pid in children if pid)


def _outrider(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    import sys

    command = [sys.executable, "-m", "edge_agent.cli", *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env={**os.environ, **env}
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_ready_watchdog_and_stopping(daemon: DaemonProcess, tmp_path: Path, abstract: bool) -> None:
    address = f"@outrider-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if abstract else address)
        manager.settimeout(30)
        daemon.start(NOTIFY_SOCKET=address, WATCHDOG_USEC="400000")
        heard = [manager.recv(4096).decode() for _ in range(6)]
        assert heard[0].startswith("READY=1\nSTATUS=offline")
        assert sum(text.startswith("WATCHDOG=1") for text in heard) >= 3
        assert daemon.end() == 0
        manager.setblocking(False)
        while (text := manager.recv(4096).decode()) != "STOPPING=1":
            assert text.startswith("WATCHDOG=1")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/outrider/bin/outrider", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "Type=notify",
        "WatchdogSec=30",
        "KillMode=mixed",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "MemoryMax=75%",
    ):
        assert f"\n{line}\n" in UNIT.read_text()


def test_enrolment_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / "new"
    hub = f"http://127.0.0.1:{free_port()}"
    cases = [
        (["--hub", hub, "--token", "t", "--name", "press-9"], 75, "does not answer"),
        (["--hub", hub, "--name", "press-9"], 78, "not enrolled"),
        (["--hub", "nonsense", "--token", "t", "--name", "press-9"], 78, "not the address of a hub"),
        (["--hub", hub, "--token", "t", "--name", "Press 9"], 78, "device name"),
    ]
    for args, code, says in cases:
        done = _outrider("agent", "--state", str(state), *args)
        assert done.returncode == code, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert not state.exists()
    (tmp_path / "file").write_text("x")
    full = _outrider("agent", "--state", str(tmp_path / "file" / "x"), *cases[0][0])
    assert full.returncode == 70
    assert "not writable" in full.stderr


def test_a_task_from_the_command_line_shows_its_end_and_fails_aloud(daemon: DaemonProcess) -> None:
    daemon.start("--task-s", "0.5")
    asked = ("task", "how fast is line 1?", "--api", daemon.url)
    told = _outrider(*asked, OUTRIDER_TOKEN=daemon.token("operator"))
    assert (told.returncode, told.stderr) == (1, "")
    assert told.stdout.startswith("failed: ")
    listed = _outrider("task", "list", "--state", "failed", "--api", daemon.url, OUTRIDER_TOKEN=daemon.token("viewer"))
    id, state = listed.stdout.split()[:2]
    assert (state, "ada: how fast is line 1?" in listed.stdout) == ("failed", True)
    shown = _outrider("task", "show", id, "--api", daemon.url, OUTRIDER_TOKEN=daemon.token("viewer"))
    assert shown.stdout.splitlines()[0].split()[:2] == [id, "failed"]
    assert shown.stdout.splitlines()[-1].startswith("failed: ")
    assert '"state":"failed"' in _outrider(*asked, "--json", OUTRIDER_TOKEN=daemon.token("operator")).stdout
    stranger = _outrider(*asked, OUTRIDER_TOKEN="nonsense")
    assert stranger.returncode == 78
    assert "hint:" in stranger.stderr


def test_a_task_that_waits_its_turn_is_cancelled_from_the_command_line_by_who_may_give_one(
    daemon: DaemonProcess,
) -> None:
    daemon.start("--task-s", "60")
    _, waits = (daemon.ask("POST", "/v1/tasks", {"text": "how fast is line 1?"}).json()["id"] for _ in range(2))
    asked = ("task", "cancel", waits, "--api", daemon.url)
    assert "may not run:task" in _outrider(*asked, OUTRIDER_TOKEN=daemon.token("viewer")).stderr
    told = _outrider(*asked, OUTRIDER_TOKEN=daemon.token("operator"))
    assert (told.returncode, told.stdout, told.stderr) == (0, f"{waits}: cancelled\n", "")
    assert daemon.ask("GET", f"/v1/tasks/{waits}").json()["error"] == "cancelled by ada"
    assert "has cancelled already" in _outrider(*asked, OUTRIDER_TOKEN=daemon.token("operator")).stderr


def test_a_wrong_broker_is_refused_when_it_cannot_be_one_and_shown_when_it_does_not_answer(
    daemon: DaemonProcess,
) -> None:
    wrong = _outrider("agent", "--state", str(daemon.state), "--broker", "http://broker")
    assert wrong.returncode == 78
    assert "not a broker address" in wrong.stderr
    daemon.start("--broker", f"mqtt://127.0.0.1:{free_port()}")
    assert "is the broker running" in until("a reason", lambda: daemon.status()["link_error"])
    assert daemon.end() == 0


def test_the_health_page_is_open_and_nothing_else_is(shared: DaemonProcess) -> None:
    assert httpx.get(f"{shared.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{shared.url}/v1/status").status_code == 401
