"""Disks and databases of a plant held, full, damaged or without power: nothing that was promised is lost."""

import asyncio
import contextlib
import sqlite3

import pytest

from bench.fleet import until
from tests.faults.disk import Disk
from tests.faults.plant import PLANT, Plant, Seen

pytestmark = PLANT


@pytest.mark.fault(
    "hub: database held by another process for 12 s",
    "no ack meanwhile, then each record at the hub once and in order",
    "real",
)
async def test_a_database_held_by_somebody_else_holds_the_acks_back(site: Plant, record_property: Seen) -> None:
    holder = sqlite3.connect(site.hub.data / "hub.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    acked = (await site.device.status())["acked"]
    await site.beyond(20)
    assert (await site.device.status())["acked"] <= acked + 20  # what was committed just before
    await asyncio.sleep(12)  # longer than SQLite waits
    holder.execute("ROLLBACK")
    holder.close()
    record_property("seen", f"no ack while it lasted; then {await site.settled()} records, each once and in order")


def disk(site: Plant, name: str) -> Disk:
    if name not in site.disks:
        pytest.skip("needs the right to mount a loop device")
    return site.disks[name]


def fill(full: Disk, database: str) -> None:
    with contextlib.closing(sqlite3.connect(full.folder / database, timeout=30)) as opened:
        opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the log has room of its own for a while
    full.fill()


@pytest.mark.fault(
    "hub: disk full for 10 s",
    "no ack meanwhile, then each record once and in order",
    "real: an ext4 image of 48 MiB filled to the last block",
)
async def test_a_full_disk_at_the_hub_holds_the_acks_back(site: Plant, record_property: Seen) -> None:
    await site.settled()
    fill(full := disk(site, "hub"), "hub.db")
    await site.beyond(30)
    await asyncio.sleep(10)
    status = await site.device.status()
    assert status["acked"] < status["last_seq"] - 30
    full.free()
    record_property("seen", f"seq {status['acked']} acked of {status['last_seq']} while full; then "
                            f"{await site.settled()} records, each once and in order")  # fmt: skip


@pytest.mark.fault(
    "device: disk full for 15 s",
    "nothing is taken that is not kept; the daemon lives and goes on by itself",
    "real: an ext4 image of 48 MiB filled to the last block",
)
async def test_a_full_disk_at_the_device_loses_nothing_that_was_taken(site: Plant, record_property: Seen) -> None:
    await site.settled()
    fill(disk(site, "press-1"), "outrider.db")
    await asyncio.sleep(10)
    stuck = (await site.device.status())["last_seq"]
    await asyncio.sleep(5)
    site.device.process.check()
    assert (await site.device.status())["last_seq"] == stuck, "nothing is taken while nothing can be kept"
    disk(site, "press-1").free()
    await site.beyond(10)
    record_property(
        "seen", f"nothing taken after seq {stuck}; when it had room {await site.settled()}, each once and in order"
    )


@pytest.mark.fault(
    "hub: power fails while it commits",
    "what was acked is there; each record once and in order",
    "real: ext4 shut down with no flush of its journal, then mounted again",
)
async def test_power_lost_at_the_hub_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    await site.beyond(5)
    disk(site, "hub").lose_power()
    acked = (await site.device.status())["acked"]
    await site.hub.process.kill()
    disk(site, "hub").unmount()
    disk(site, "hub").mount()
    await site.hub.start()
    count = await site.settled()
    record_property("seen", f"{acked} were acked when it failed; {count} records, each once and in order")


@pytest.mark.fault(
    "device: power fails while it sends",
    "every seq that the hub has is known; each record once and in order",
    "real: ext4 shut down with no flush of its journal, then mounted again",
)
async def test_power_lost_at_the_device_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    await site.beyond(5)
    status = await site.device.status()
    disk(site, "press-1").lose_power()
    await site.device.process.kill()
    disk(site, "press-1").unmount()
    disk(site, "press-1").mount()
    await site.start_device()
    count = await site.settled()
    after = await site.device.status()
    assert after["epoch"] == status["epoch"], "nothing that left the device was forgotten"
    assert count >= status["last_seq"]
    record_property(
        "seen", f"epoch kept, {status['last_seq']} records made before are there; {count}, once and in order"
    )


@pytest.mark.fault(
    "device: a database page overwritten",
    "exit 70 with a hint, the file untouched; moved aside, a new epoch",
    "real",
)
async def test_a_damaged_database_page_is_said_and_a_new_epoch_begins(site: Plant, record_property: Seen) -> None:
    await site.settled()
    old = (await site.device.status())["epoch"]
    await site.device.process.stop()
    path = site.device.state / "outrider.db"
    damaged = bytearray(path.read_bytes())
    damaged[4096:8192] = bytes(range(256)) * 16
    path.write_bytes(damaged)
    await site.start_device()

    async def ended() -> bool | None:
        process = site.device.process._process
        return True if process is not None and process.returncode is not None else None

    await until("the end of the daemon", 60, ended)
    process = site.device.process._process
    assert process is not None
    assert process.returncode == 70
    assert "is damaged" in site.device.process.log.read_text()
    assert path.read_bytes() == bytes(damaged), "it is left as evidence"
    for file in site.device.state.glob("outrider.db*"):
        file.rename(file.with_name(f"aside-{file.name}"))
    await site.start_device()
    count = await site.settled()
    assert (await site.device.status())["epoch"] > old
    record_property("seen", f"exit 70 with a hint, file untouched; moved aside, {count} records of a new epoch")
