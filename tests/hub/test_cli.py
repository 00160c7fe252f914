"""`outrider hub` as people use it: a process, its verbs, and its errors."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from hub.cli import app
from hub.devices_cli import _job_line
from models.publish import kept_token

COMMAND = [sys.executable, "-m", "hub"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """URL, generated admin password and data directory of a hub whose broker is not there."""
    data = tmp_path_factory.mktemp("hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        broker = f"mqtt://user:secret@127.0.0.1:{closed.getsockname()[1]}"
        arguments = ["--data", str(data), "--http", f"127.0.0.1:{port}", "--broker", broker, "--no-dashboard"]
        environment = {k: v for k, v in os.environ.items() if k != "OUTRIDER_ADMIN_PASSWORD"} | {
            "PYTHONUNBUFFERED": "1"
        }
        with subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            shown = process.stdout.readline() + process.stdout.readline()
            password = re.search(r"password (\S+) \(shown once\)", shown)
            assert password, shown
            url = f"http://127.0.0.1:{port}"
            pause = threading.Event()
            for _ in range(200):
                try:
                    httpx.get(f"{url}/healthz")
                    break
                except httpx.TransportError:
                    pause.wait(0.05)
            yield url, password[1], data
            process.terminate()
            assert process.wait(10) == 0


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    """Runs verbs in this process with a configuration folder of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("OUTRIDER_TOKEN", "OUTRIDER_HUB", "OUTRIDER_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    return CliRunner()


def call(shell: CliRunner, *arguments: str) -> Result:
    return shell.invoke(app, list(arguments))


def test_the_verbs_work_from_login_to_publishing(
    shell: CliRunner, served: tuple[str, str, Path], tmp_path: Path
) -> None:
    url, password, _ = served
    assert call(shell, "devices").stderr.startswith("outrider hub: not logged in")
    wrong = call(shell, "login", "--hub", url, "--password", "wrong")
    assert (wrong.exit_code, "wrong user or password" in wrong.stderr) == (1, True)
    assert call(shell, "login", "--hub", url, "--password", password).exit_code == 0
    assert (tmp_path / "config" / "outrider" / "hub.json").stat().st_mode & 0o077 == 0
    assert kept_token(url)
    assert kept_token("http://elsewhere") == ""
    assert call(shell, "token").stdout.strip() == kept_token(url)
    assert "no device x" in call(shell, "token", "x").stderr
    assert json.loads(call(shell, "devices", "--json").stdout) == []
    assert len(json.loads(call(shell, "enrol-token", "--json").stdout)["token"]) == 32
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.onnx").write_bytes(b"weights")
    assert "give --name" in call(shell, "publish", str(model)).stderr
    for _ in range(2):
        done = call(shell, "publish", str(model), "--name", "m", "--version", "1", "--kind", "onnx", "--json")
        assert json.loads(done.stdout)["name"] == "m"
    assert "no device x" in call(shell, "assign", "x", "m", "1").stderr
    assert "no device x" in call(shell, "task", "x", "stop line 2").stderr
    assert call(shell, "jobs").stdout == ""


def test_a_hub_that_is_not_there_is_one_clear_sentence(shell: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_TOKEN", "x")
    result = call(shell, "devices", "--hub", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "is the hub running there?" in result.stderr


def test_a_wrong_broker_is_told_by_readyz_while_the_hub_lives(served: tuple[str, str, Path]) -> None:
    url, _, _ = served
    answer = httpx.get(f"{url}/readyz")
    assert answer.status_code == 503
    assert "nothing listens there" in answer.text
    assert "secret" not in answer.text


def test_two_hubs_do_not_share_a_data_directory_or_a_port(served: tuple[str, str, Path], tmp_path: Path) -> None:
    url, _, data = served

    def start(*arguments: str) -> str:
        run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 1
        assert "Traceback" not in run.stderr
        return run.stderr

    assert "another hub uses" in start("--data", str(data), "--http", "127.0.0.1:0", "--no-dashboard")
    other = str(tmp_path / "other")
    assert "give another --http" in start("--data", other, "--http", url.removeprefix("http://"))
    for wrong in ("nonsense", "127.0.0.1:80990"):
        assert "is not an address" in start("--data", other, "--http", wrong)
    assert "not a broker address" in start(
        "--data", other, "--http", "127.0.0.1:0", "--broker", "http://x", "--no-dashboard"
    )


def test_a_job_is_listed_with_its_calls_and_how_it_ended() -> None:
    job = {"id": "1", "device": "press-1", "state": "succeeded", "body": {"text": "stop line 2"}, "error": ""}
    step = {"role": "tool", "call": "stop_line(line=2)", "text": "stopped: 2"}
    result = {"steps": [{"role": "model", "text": "stop_line(line=2)"}, step, "rubbish"], "answer": "line 2 stands"}
    assert _job_line(job | {"result": result}).split("\n    ")[1:] == [
        "stop_line(line=2) → stopped: 2",
        "line 2 stands",
    ]
    assert _job_line(job | {"result": {}, "error": "no such line"}).endswith("\n    no such line")


def test_a_start_that_fails_does_not_spend_the_password_shown_once(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OUTRIDER_ADMIN_PASSWORD"}
    wrong = [*COMMAND, "--data", str(tmp_path), "--http", "127.0.0.1:0", "--broker", "http://x", "--no-dashboard"]
    run = subprocess.run(wrong, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, "shown once" in run.stdout) == (1, False)
    with sqlite3.connect(tmp_path / "hub.db") as kept:
        assert kept.execute("SELECT count(*) FROM users").fetchone() == (0,)
