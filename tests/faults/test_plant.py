"""Faults of a plant of real processes: what was committed is right, whatever is killed, cut, slowed or set wrong."""

import asyncio
import base64
import json
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from bench.fleet import until
from tests.faults.plant import Plant, plant
from tests.sync.brokers import mosquitto

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto"),
]
Seen = Callable[[str, object], None]
YEARS = 20 * 365 * 86400.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    async with plant(tmp_path_factory.mktemp("plant")) as made:
        yield made


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def mended(site: Plant) -> AsyncIterator[None]:
    await site.whole()
    yield
    site.link.mend()


async def test_the_daemon_killed_at_any_moment_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for pause in (0.0, 0.13, 0.37):
        await site.beyond(3)
        await asyncio.sleep(pause)
        await site.device.process.kill()
        await site.start_device()
    record_property("seen", f"3 kills, {await site.settled()} records, each once and in order")


async def test_the_hub_killed_at_any_moment_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for pause in (0.0, 0.13):
        await site.beyond(3)
        await asyncio.sleep(pause)
        await site.hub.process.kill()
        await site.beyond(3)
        await site.hub.start()
    record_property("seen", f"2 kills, {await site.settled()} records, each once and in order")


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


async def test_a_cut_cable_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    for _ in range(3):
        site.link.cut()
        await site.beyond(5)
        site.link.mend()
        await site.beyond(2)
    record_property("seen", f"3 cuts, {await site.settled()} records, each once and in order")


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


async def test_a_third_of_all_connections_lost_loses_and_doubles_nothing(site: Plant, record_property: Seen) -> None:
    site.link.lossy = 0.3
    try:
        for _ in range(8):
            site.link.cut()
            site.link.mend()
            await site.beyond(5)
        count = await site.settled()
    finally:
        site.link.lossy = 0.0
    record_property("seen", f"{site.link.lost} connections lost, {count} records, each once and in order")


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
