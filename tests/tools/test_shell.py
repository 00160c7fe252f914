"""A command runs in a sandbox with bounds, or not at all."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import gettempdir

import pytest

from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal
from tools.shell import Settings, Shell

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bwrap: apt-get install bubblewrap")


@pytest.fixture
def shell() -> Shell:
    return Shell(Settings(timeout_s=60, memory_mb=128, cpu_s=1, processes=16, tmp_mb=4, output=2000))


def run(shell: Shell, command: str) -> str:
    return shell.run_command(command)["output"]


def test_the_tool_is_dangerous_and_its_file_is_checked(tmp_path: Path) -> None:
    (made,) = load("tools.shell", tmp_path, {})
    assert (made.spec.name, made.spec.risk, made.spec.idempotent) == ("run_command", "danger", False)
    (tmp_path / "shell.toml").write_text("memory_mb = 99999")
    with pytest.raises(Fatal, match=r"<= 4096 - at `\$.memory_mb`"):
        load("tools.shell", tmp_path, {})


@needs_bwrap
def test_a_command_gives_its_status_and_output(shell: Shell) -> None:
    assert shell.run_command("echo one; echo two >&2; exit 3") == {"status": 3, "output": "one\ntwo\n"}
    assert shell.run_command("kill -TERM $$")["status"] == 128 + 15
    with pytest.raises(ToolError, match="there is no command"):
        shell.run_command(" ")


@needs_bwrap
def test_it_sees_nothing_of_the_device(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_TOKEN", "secret")
    (tmp_path / "key").write_text("the device's key")
    tmp_path.chmod(0o755)
    for command in (f"cat {tmp_path}/key", "cat /etc/passwd", "ls /root /home /var /run /sys", f"ls {Path.cwd()}"):
        assert shell.run_command(command)["status"] != 0, command
    assert "secret" not in run(shell, "env; cat /proc/*/environ")
    seen = run(shell, "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done")
    assert "pytest" not in seen
    shared = Shell(Settings(read=[str(tmp_path)]))
    for folder in [tmp_path, *tmp_path.parents]:
        if folder == Path(gettempdir()):
            break
        folder.chmod(0o755)
    assert run(shared, f"cat {tmp_path}/key") == "the device's key"
    assert shared.run_command(f"echo x > {tmp_path}/key")["status"] != 0
    assert (tmp_path / "key").read_text() == "the device's key"


@needs_bwrap
def test_it_has_no_network_and_no_rights(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "ConnectionRefused" in run(shell, f'/usr/bin/python3 -c "{code}"')
    assert run(shell, "id -u").strip() == "65534" or os.geteuid() != 0
    status = run(shell, "grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status").split()
    assert status == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
    for command in ("mount -t tmpfs none /usr", "unshare -Ur true", "echo x > /usr/x", "mknod /tmp/x b 8 0"):
        assert shell.run_command(command)["status"] != 0, command


@needs_bwrap
def test_past_its_time_the_whole_tree_is_killed() -> None:
    shell, mark = Shell(Settings(timeout_s=2)), f"{os.getpid()}.4321"
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"not over after 2 s and was killed; its output began: here"):
        shell.run_command(f"echo here; (setsid sleep {mark} &) ; sleep {mark}")
    assert time.monotonic() - began < 20
    assert gone(mark)


@needs_bwrap
def test_what_it_leaves_in_the_background_ends_with_it(shell: Shell) -> None:
    mark = f"{os.getpid()}.8765"
    assert run(shell, f"(setsid sleep {mark} &); echo done") == "done\n"
    assert gone(mark)


def gone(mark: str) -> bool:
    """No process has the mark in its command line, a moment later at most."""
    for _ in range(500):
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += [entry] if mark.encode() in entry.read_bytes() else []
            except OSError:
                continue
        if not found:
            return True
        time.sleep(0.02)
    return False


@needs_bwrap
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("head -c 300000000 /dev/zero | tail -c 300000000 | wc -c", "exhausted|[Cc]annot allocate|Killed|^0"),
        ("dd if=/dev/zero of=/tmp/x bs=1M count=64 2>&1; echo ended", "[Nn]o space|File size limit|ended"),
        ("for i in $(seq 60); do sleep 3 & done; wait", "[Rr]esource temporarily|Cannot fork|can't fork"),
    ],
)
def test_memory_disk_and_processes_are_bounded(shell: Shell, command: str, told: str) -> None:
    import re

    ended = shell.run_command(command)
    assert re.search(told, ended["output"]), ended
    assert "300000000" not in ended["output"]


@needs_bwrap
def test_processor_time_and_output_are_bounded(shell: Shell) -> None:
    assert shell.run_command("while :; do :; done")["status"] in (128 + 9, 128 + 24)
    with pytest.raises(ToolError, match="it wrote more than 2000 bytes and was killed; its output began: y"):
        shell.run_command("yes")


def test_without_bubblewrap_it_refuses_and_says_what_to_install(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ToolError, match=r"no command is run without a sandbox: there is no bwrap .*apt-get install bubb"
    ):
        shell.run_command("touch /tmp/never")


@needs_bwrap
def test_where_the_kernel_allows_no_namespaces_it_refuses_and_runs_nothing(tmp_path: Path) -> None:
    code = "from tools.shell import *; Shell(Settings()).run_command('echo ran')"
    inside = ["bwrap", "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", "--proc", "/proc", "--"]
    done = subprocess.run(
        [*inside, sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert "no command is run without a sandbox: bubblewrap makes no sandbox here" in done.stderr
    assert "ran" not in done.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_the_drop_in_goes_with_the_unit(tmp_path: Path) -> None:
    deploy = Path(__file__).parents[2] / "deploy"
    unit = tmp_path / "outrider-agent.service"
    unit.write_text((deploy / unit.name).read_text().replace("/opt/outrider/bin/outrider", "/bin/true"))
    (tmp_path / f"{unit.name}.d").mkdir()
    shutil.copy(deploy / "shell.conf", tmp_path / f"{unit.name}.d")
    argv = ["systemd-analyze", "verify", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"})
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / f"{unit.name}.d" / "shell.conf").write_text("[Service]\nSystemCallFilter=@no-such-group\n")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"})
    assert "no-such-group" in done.stderr, "the drop-in is read"
