"""The cable of a plant cut, stalled and slow, and its packets lost: every record comes once and in order."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from bench.fleet import until
from tests.faults.packets import Packets
from tests.faults.plant import PLANT, Plant, Seen

pytestmark = PLANT


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
