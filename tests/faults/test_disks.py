"""Disks and files that are not as they should be, and processes that say so."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.db import Database
from tests.e2e.daemon_process import DaemonProcess


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[DaemonProcess]:
    """An enrolled device whose state directory is mounted read-only."""
    daemon = DaemonProcess(tmp_path / "state")
    state = str(daemon.state)
    if subprocess.run(["mount", "--bind", state, state], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", state], check=True)
    yield daemon
    subprocess.run(["umount", "-l", state], check=True)


@pytest.mark.fault(
    "device: database on a read-only file system",
    "refused with the reason, exit 78, nothing changed",
    "real: a read-only mount",
)
def test_a_read_only_state_directory_is_refused_with_its_reason(read_only: DaemonProcess) -> None:
    command = [sys.executable, "-m", "edge_agent.cli", "agent", "--state", str(read_only.state)]
    before = sorted(path.name for path in read_only.state.iterdir())
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 78, ended.stderr
    assert "hint" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in read_only.state.iterdir()) == before


@pytest.mark.fault(
    "hub: database page overwritten",
    "the hub does not start and says why",
    "real",
)
def test_a_damaged_hub_database_is_said_at_the_start(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path / 'hub.db'}").close()
    content = bytearray((tmp_path / "hub.db").read_bytes())
    content[:4096] = bytes(range(256)) * 16
    (tmp_path / "hub.db").write_bytes(content)
    command = [sys.executable, "-m", "hub", "--data", str(tmp_path), "--http", "127.0.0.1:0", "--no-dashboard"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "the database cannot be opened" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "hub.db").read_bytes() == bytes(content)
