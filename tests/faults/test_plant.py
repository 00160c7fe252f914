"""Faults of a plant of real processes: what was committed is right, whatever is killed, cut, slowed or set wrong."""

import asyncio
import base64
import contextlib
import json
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bench import virtual
from bench.fleet import until
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.session import Session
from edge_agent.wire.messages import JobState
from tests.faults.disk import Disk
from tests.faults.packets import Packets
from tests.faults.plant import Plant
from tests.sync.brokers import mosquitto

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto"),
]
Seen = Callable[[str, object], None]
YEARS = 20 * 365 * 86400.0


@pytest.mark.fault(
    "daemon: kill -9, three times while it sends",
    "each record at the hub once and in order",
    "real",
)
async def test_the_daemon_killed_at_any_moment_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for pause in (0.0, 0.13, 0.37):
        await site.beyond(3)
        await asyncio.sleep(pause)
        await site.device.process.kill()
        await site.start_device()
    record_property("seen", f"3 kills, {await site.settled()} records, each once and in order")


@pytest.mark.fault(
    "hub: kill -9, twice while it commits",
    "each record at the hub once and in order",
    "real",
)
async def test_the_hub_killed_at_any_moment_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for pause in (0.0, 0.13):
        await site.beyond(3)
        await asyncio.sleep(pause)
        await site.hub.process.kill()
        await site.beyond(3)
        await site.hub.start()
    record_property("seen", f"2 kills, {await site.settled()} records, each once and in order")


@pytest.mark.fault(
    "broker: kill -9 and its persistence deleted",
    "each record at the hub once and in order; retained state published again",
    "real",
)
async def test_a_broker_killed_and_robbed_of_all_it_had_kept_loses_nothing(site: Plant, record_property: Seen) -> None:
    await site.beyond(3)
    await asyncio.to_thread(site.site.stop, signal.SIGKILL, forget=True)
    await site.hub.client.put("/v1/roles/fitter", json={"permissions": ["read:device"]})  # nobody can be told now
    await site.beyond(10)
    await asyncio.to_thread(site.site.start)
    count = await site.settled()
    epoch = await _grants_epoch(site)

    async def told() -> bool | None:
        return True if (await site.device.status())["grants_epoch"] >= epoch else None

    await until("the retained grants again", 30, told)
    record_property("seen", f"{count} records, each once and in order; grants of epoch {epoch} came again")


@contextlib.asynccontextmanager
async def over_packets(site: Plant) -> AsyncIterator[Packets]:
    try:
        made = await (context := site.link.over_packets()).__aenter__()
    except OSError as error:
        pytest.skip(f"needs root and /dev/net/tun: {error}")
    try:
        yield made
    finally:
        await context.__aexit__(None, None, None)


async def _grants_epoch(site: Plant) -> int:
    text = (await site.hub.client.get("/v1/grants")).text.split(".")[1]
    epoch: int = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))["epoch"]
    return epoch


@pytest.mark.fault(
    "cable cut, three times",
    "each record at the hub once and in order",
    "a user-space link that cuts connections",
)
async def test_a_cut_cable_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for _ in range(3):
        site.link.cut()
        await site.beyond(5)
        site.link.mend()
        await site.beyond(2)
    record_property("seen", f"3 cuts, {await site.settled()} records, each once and in order")


@pytest.mark.fault(
    "half-open connection: nothing arrives, nothing is closed",
    "found within 90 s and made again",
    "a user-space link that stalls",
)
async def test_a_half_open_connection_is_found_and_made_again(site: Plant, record_property: Seen) -> None:
    await site.settled()
    began, before = time.monotonic(), (await site.device.status())["sync"]["connections"]
    site.link.stalled = True
    try:

        async def noticed() -> bool | None:
            return True if not (await site.device.status())["connected"] else None

        await until("the device to notice", 90, noticed)
        took = time.monotonic() - began
    finally:
        site.link.stalled = False
        site.link.cut()
        site.link.mend()
    count = await site.settled()
    assert (await site.device.status())["sync"]["connections"] > before
    record_property("seen", f"noticed after {took:.0f} s; {count} records, each once and in order")


@pytest.mark.fault(
    "2 s delay each way",
    "each record at the hub once and in order",
    "a user-space link",
)
async def test_two_seconds_each_way_lose_and_double_nothing(site: Plant, record_property: Seen) -> None:
    site.link.delay_s = 2.0
    try:
        site.link.cut()
        site.link.mend()
        await site.beyond(20)
        count = await site.settled()
    finally:
        site.link.delay_s = 0.0
    record_property("seen", f"{count} records, each once and in order")


@pytest.mark.fault(
    "30 % of all packets lost, each way",
    "each record at the hub once and in order",
    "real: `tc netem` where it works, else each packet passes a process; the kernel's TCP sends again",
)
async def test_a_third_of_all_packets_lost_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    async with over_packets(site) as packets:
        packets.loss = 0.3
        await site.beyond(25)

        async def enough() -> bool | None:
            return True if packets.dropped > 15 else None

        await until("16 lost packets", 180, enough)
        lost, carried = packets.dropped, packets.carried
        packets.loss = 0.0
        count = await site.settled()
    record_property(
        "seen", f"{lost} of {carried} packets lost by {packets.how}; {count} records, each once and in order"
    )


@pytest.mark.fault(
    "each packet 2 s late, each way",
    "each record at the hub once and in order",
    "real: `tc netem` where it works, else each packet passes a process",
)
async def test_packets_two_seconds_late_lose_and_double_nothing(site: Plant, record_property: Seen) -> None:
    async with over_packets(site) as packets:
        await site.settled()
        packets.delay_s = 2.0
        await site.beyond(20)
        count = await site.settled()
        assert packets.carried > 10
    record_property("seen", f"{count} records over a round trip of 4 s by {packets.how}, each once and in order")


@pytest.mark.fault(
    "partition: no packet passes for 60 s, and nobody is told",
    "found, connected again when packets pass; each record once and in order",
    "real: `tc netem` where it works, else each packet passes a process",
)
async def test_a_partition_is_found_and_healed(site: Plant, record_property: Seen) -> None:
    async with over_packets(site) as packets:
        await site.settled()
        began = time.monotonic()
        packets.loss = 1.0

        async def noticed() -> bool | None:
            return True if not (await site.device.status())["connected"] else None

        await until("the device to notice", 90, noticed)
        took = time.monotonic() - began
        await asyncio.sleep(max(0.0, 60 - took))
        packets.loss = 0.0
        count = await site.settled()
    record_property("seen", f"noticed after {took:.0f} s ({packets.how}); {count} records, each once and in order")


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


@pytest.mark.fault(
    "a revoked person at an online device",
    "refused within 2 s",
    "real",
)
async def test_a_revoked_person_is_out_at_an_online_device_within_two_seconds(
    site: Plant, record_property: Seen
) -> None:
    new = {"name": "ann", "password": "correct horse", "roles": ["operator"]}
    await site.hub.post("/v1/users", new)
    token = (await site.hub.post("/v1/login", {"user": "ann", "password": "correct horse"}))["access_token"]
    bearer = {"Authorization": f"Bearer {token}"}
    await site.settled()
    assert (await site.device.client.get("/v1/tasks", headers=bearer)).status_code == 200
    began = time.monotonic()
    assert (await site.hub.client.delete("/v1/users/ann")).status_code == 204

    async def out() -> bool | None:
        return True if (await site.device.client.get("/v1/tasks", headers=bearer)).status_code == 403 else None

    await until("the refusal", 10, out)
    took = time.monotonic() - began
    assert took < 2.0
    record_property("seen", f"refused {took:.2f} s after the order was given")


@pytest.mark.fault(
    "device clock +20 years, -20 years and back in one session",
    "records flow on; nothing stays expired",
    "`time.time` of the process is off",
)
async def test_a_clock_twenty_years_off_stops_nothing_and_leaves_nothing_expired(
    site: Plant, record_property: Seen
) -> None:
    statuses = []
    for offset in (YEARS, -YEARS, 0.0):
        site.step_clock(offset)
        statuses.append((await site.device.client.get("/v1/tasks")).status_code)
        site.link.cut()  # a new connection under the wrong clock
        site.link.mend()
        await asyncio.sleep(3)
    assert statuses[0] == 401, "past the end of every token and grant"
    assert statuses[1] == 200, "before the grants' own time the clock is not believed"
    assert statuses[2] == 200, "nothing stays expired"
    await site.beyond(5)
    record_property("seen", f"local API {statuses}; {await site.settled()} records, each once and in order")


@pytest.mark.fault(
    "hub clock +20 years, -20 years and back in one session",
    "records flow on; nobody is let in by it, nothing stays expired",
    "`time.time` of the process is off",
)
async def test_a_hub_clock_twenty_years_off_stops_no_record_and_leaves_nothing_expired(
    site: Plant, record_property: Seen
) -> None:
    statuses = []
    try:
        for offset in (YEARS, -YEARS, 0.0):
            site.hub.step_clock(offset)
            statuses.append((await site.hub.client.get("/v1/devices")).status_code)
            await site.beyond(5)
            await asyncio.sleep(12)  # past a renewal's and an anchor's tick
    finally:
        site.hub.step_clock(0.0)
    assert statuses[0] == 401, "past the end of every token"
    assert statuses[2] == 200, "nothing stays expired"
    count = await site.settled()
    answer = await site.hub.post("/v1/login", {"user": "admin", "password": site.hub.password})
    assert answer["access_token"]
    assert (await site.device.client.get("/v1/tasks")).status_code == 200
    record_property("seen", f"hub API {statuses}; {count} records, each once and in order")


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
    "device: kill -9 at every persisted step: outbox, jobs, reported and desired state, grants, acks",
    "each record once; each job's effect at most once, and its end told",
    "real: each step by its name, in a forked process",
)
async def test_a_device_killed_at_every_persisted_step_loses_and_doubles_nothing(
    site: Plant, record_property: Seen
) -> None:
    state = site.folder / "press-2"
    await virtual.enrol(site.hub, state, "press-2")
    setup = {
        "state": str(state), "broker": site.site.url, "points": str(site.folder / "device-points"),
        "give": f"{site.hub.url}/v1/devices/press-2/jobs", "bearer": f"Bearer {site.hub.token}",
        "body": {"kind": "tool", "body": {"tool": "stamp", "args": {}}},
    }  # fmt: skip
    names = await crash("device", setup)
    assert {"Outbox.append_many", "Inbox.accept", "Inbox._begin", "Inbox.report", "Outbox.ack", "Twin.report"} <= {
        name.split(":")[0] for name in names
    }, names
    books = virtual.books(state / "ledger", site.hub.data / "hub.db", "press-2")
    assert (books.lost, books.doubled, books.ordered) == (0, 0, True)
    jobs = await site.hub.get("/v1/jobs", device="press-2", limit=500)
    effects = Counter((state / "effects").read_text().split())
    assert set(effects.values()) == {1}, "no effect twice"
    for job in jobs:
        assert job["state"] in ("succeeded", "failed"), job
        assert job["state"] == "failed" or effects[job["id"]] == 1
    failed = sum(job["state"] == "failed" for job in jobs)
    told = f"{len(jobs)} jobs, {failed} of them told as interrupted, no effect twice"
    record_property("seen", f"{len(names)} kills; {books.promised} records, each once and in order; {told}")


@pytest.mark.fault(
    "hub: kill -9 at every step of ingest: transaction, rows, gap, job, reported, PUBACK, ack",
    "each record once and in order",
    "real: each step by its name, in a forked process",
)
async def test_a_hub_killed_at_every_step_of_ingest_loses_and_doubles_nothing(
    site: Plant, record_property: Seen
) -> None:
    state = site.folder / "press-3"
    await virtual.enrol(site.hub, state, "press-3")
    for _ in range(30):
        await site.hub.post("/v1/devices/press-3/jobs", {"kind": "tool", "body": {"tool": "stamp", "args": {}}})
    async with virtual.attached(state, site.site.url) as (outbox, session):
        await until("the jobs", 60, _some(session))
        await site.hub.process.kill()
        feeding = asyncio.create_task(_feed(outbox, session, state / "ledger"))
        setup = {"broker": site.site.url, "config": str(site.site.config), "data": str(site.hub.data)}
        names = await crash("hub", setup | {"points": str(site.folder / "hub-points")})
        feeding.cancel()
        await asyncio.wait([feeding])
        await site.hub.start()
        await virtual.until(lambda: outbox.depth == 0)
    assert {"before insert", "before gap", "before apply job", "before apply reported", "after PUBACK",
            "before the ack to a device", "Ingest._persist: before its commit"} <= set(names), names  # fmt: skip
    books = virtual.books(state / "ledger", site.hub.data / "hub.db", "press-3")
    assert (books.lost, books.doubled, books.ordered) == (0, 0, True)
    both = f"{await site.settled()} and {books.promised} records of two devices"
    record_property("seen", f"{len(names)} kills; {both}, each once and in order")


def _some(session: Session) -> Callable[[], Awaitable[bool | None]]:
    async def some() -> bool | None:
        return True if session.counters.jobs >= 20 else None

    return some


async def _feed(outbox: Outbox, session: Session, ledger: Path) -> None:
    """Records of every kind, until cancelled."""
    with ledger.open("a", buffering=1) as lines:
        while True:
            await outbox.append("audit", {"action": "outlived"}, ttl=0.0)
            content = virtual.body(outbox.last_seq + 1)
            lines.write(virtual.line(await outbox.append("telemetry", content), content))
            await session._twin.report({"last_seq": outbox.last_seq})
            if outbox.last_seq % 20 < 4:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await session._inbox.report((await session._inbox.next()).id, JobState.SUCCEEDED)
            await asyncio.sleep(0.2)


async def crash(whom: str, setup: dict[str, object]) -> list[str]:
    command = [sys.executable, "-m", "tests.faults.crash", whom, json.dumps(setup)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    said = await process.stdout.read()
    assert await process.wait() == 0
    names: list[str] = json.loads(said.splitlines()[-1])
    return names


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
