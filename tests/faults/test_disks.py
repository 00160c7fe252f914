"""Disks and files that are not as they should be, and processes that say so."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.fleet import Device, Hub, until
from hub.db import Database
from tests.e2e.daemon_process import DaemonProcess
from tests.e2e.test_daemon_hub import enrolled, seqs
from tests.faults.disk import Disk


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


@pytest.mark.fault(
    "hub: database on a read-only file system",
    "the hub does not start and says why, nothing changed",
    "real: a read-only mount",
)
def test_a_hub_whose_directory_is_read_only_says_so_at_the_start(tmp_path: Path) -> None:
    data = tmp_path / "hub"
    data.mkdir()
    Database(f"sqlite:///{data / 'hub.db'}").close()
    if subprocess.run(["mount", "--bind", data, data], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
    try:
        command = [sys.executable, "-m", "hub", "--data", str(data), "--http", "127.0.0.1:0", "--no-dashboard"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 1
        assert "Read-only file system" in ended.stderr
        assert "--data" in ended.stderr, "the hint"
        assert "Traceback" not in ended.stderr
        assert [path.name for path in data.iterdir()] == ["hub.db"]
    finally:
        subprocess.run(["umount", "-l", data], check=True)


@pytest.mark.fault(
    "hub: file system turns read-only while it runs",
    "no ack from then on, the reason in its log; mended and started again, each record once and in order",
    "real: ext4 gives up its journal (remount,abort) under the running hub",
)
async def test_a_hub_whose_disk_turns_read_only_acks_nothing_and_loses_nothing(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    try:
        disk = Disk(tmp_path / "hub")
    except OSError as error:
        pytest.skip(f"needs the right to mount a loop device: {error}")
    hub = Hub(tmp_path)
    device = None
    try:
        await hub.start()
        device = await enrolled(hub, tmp_path, "press-1")
        await until("some acks", 60, _acked, device, 5)
        disk.turn_read_only()
        with pytest.raises(OSError, match="Read-only"):
            (disk.folder / "probe").touch()
        await until("records meanwhile", 60, _made, device, (await device.status())["last_seq"] + 30)
        stuck = (await device.status())["acked"]
        await until("records meanwhile", 60, _made, device, (await device.status())["last_seq"] + 20)
        assert (await device.status())["acked"] == stuck
        hub.process.check()
        log = hub.process.log.read_text()
        assert "the database cannot commit" in log
        assert "the database takes nothing" in (await hub.client.get("/readyz")).text
        await hub.process.kill()
        disk.unmount()
        disk.mount()
        await hub.start()
        last = (await device.status())["last_seq"]
        await until("all of it", 60, _acked, device, last)
        found = await seqs(hub, "press-1")
        assert found == list(range(1, found[-1] + 1))
        record_property(
            "seen", f"no ack after seq {stuck} while it lasted; then {len(found)} records, each once, in order"
        )
    finally:
        if device is not None:
            await device.stop()
        await hub.stop()
        disk.unmount()


async def _acked(device: Device, seq: int) -> bool | None:
    return (await device.status())["acked"] >= seq or None


async def _made(device: Device, seq: int) -> bool | None:
    return (await device.status())["last_seq"] >= seq or None
