"""Clocks of a plant far off, and trust that ends: nothing stays expired, nobody gets in."""

import asyncio
import time

import pytest

from bench.fleet import until
from tests.faults.plant import PLANT, Plant, Seen

pytestmark = PLANT
YEARS = 20 * 365 * 86400.0


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
