"""Processes of a plant that are killed: what was committed is right, whenever it happens."""

import asyncio
import base64
import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from bench import virtual
from bench.fleet import until
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.session import Session
from edge_agent.wire.messages import JobState
from tests.faults.plant import PLANT, Plant, Seen

pytestmark = PLANT


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


async def _grants_epoch(site: Plant) -> int:
    text = (await site.hub.client.get("/v1/grants")).text.split(".")[1]
    epoch: int = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))["epoch"]
    return epoch


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
    assert {"Outbox._commit", "Inbox.accept", "Inbox._begin", "Inbox.report", "Outbox.ack", "Twin.report"} <= {
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
