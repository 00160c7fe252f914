"""What waits grows old by the time that passes, and by no clock that is set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import Retry
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.messages import Record

DAY_S, YEAR_S = 86400.0, 366 * 86400.0


class Life:
    """An outbox over restarts, its machine's clock, its steady one, and the hub's."""

    def __init__(self, path: Path) -> None:
        self.path, self.clock, self.steady, self.hub = path, 1.7e9, 100.0, 1.7e9 + 5
        self.store: Store | None = None

    async def start(self) -> None:
        """Again, on what the process before has left."""
        self.close()
        self.store = Store(self.path)
        self.outbox = await Outbox.open(self.store, clock=lambda: self.clock, steady=lambda: self.steady)

    async def on(self, seconds: float) -> None:
        """Time passes, and records that live for ever are made."""
        self.clock, self.steady, self.hub = self.clock + seconds, self.steady + seconds, self.hub + seconds
        await self.outbox.append("audit", {})

    async def off(self, seconds: float) -> None:
        self.clock, self.steady, self.hub = self.clock + seconds, 3.0, self.hub + seconds
        await self.start()

    async def hear(self) -> None:
        """As the session does: where the hub stands, then what time it is there."""
        await self.outbox.settle(self.outbox.epoch, 0)
        await self.outbox.hear(self.hub)

    async def kinds(self) -> set[str]:
        """Of what waits, none of it handed out."""
        assert self.store is not None
        await self.outbox.expire()
        blocks = await self.store.read(lambda db: db.execute("SELECT lines FROM outbox").fetchall())
        lines = (line for (lines,) in blocks for line in lines.splitlines())
        return {msgspec.json.decode(line, type=Record).kind for line in lines}

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    made = Life(tmp_path / "s.db")
    yield made
    made.close()


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_clock_set_forward_by_a_year_expires_nothing_that_waits(
    life: Life, restarted: bool, heard: bool
) -> None:
    await life.start()
    await life.hear()
    await life.outbox.append("telemetry", {}, ttl=7 * DAY_S)
    life.clock += YEAR_S
    if restarted:
        await life.off(3600)
    if heard:
        await life.hear()
    await life.on(6 * DAY_S)
    assert "telemetry" in await life.kinds()
    await life.on(DAY_S)
    assert await life.kinds() == {"audit", "loss"}


async def test_a_clock_that_comes_right_after_the_start_expires_nothing_that_was_made_before(life: Life) -> None:
    """A machine with no battery for its clock begins in 1970, until the network tells it the time."""
    life.clock = 60.0
    await life.start()
    await life.outbox.append("telemetry", {}, ttl=DAY_S)
    life.clock = life.hub
    await life.hear()
    await life.on(10.0)
    await life.hear()
    assert "telemetry" in await life.kinds()


async def test_a_hub_whose_clock_is_set_forward_expires_nothing_on_its_devices(life: Life) -> None:
    await life.start()
    await life.hear()
    await life.outbox.append("telemetry", {}, ttl=DAY_S)
    for set_by in (YEAR_S, -YEAR_S, YEAR_S):
        life.hub += set_by
        await life.hear()
        await life.off(60.0)
        await life.hear()
        assert "telemetry" in await life.kinds()


async def test_what_is_old_goes_however_often_the_device_restarted_and_its_clock_was_set_back(life: Life) -> None:
    await life.start()
    await life.outbox.append("telemetry", {}, ttl=DAY_S)
    for _ in range(5):
        await life.on(DAY_S / 5)
        life.clock -= DAY_S
        await life.off(0.0)
    assert await life.kinds() == {"audit", "loss"}


async def test_the_time_a_device_was_off_counts_when_its_clock_and_the_hubs_agree(life: Life) -> None:
    await life.start()
    await life.on(100.0)
    await life.hear()
    await life.outbox.append("telemetry", {}, ttl=7 * DAY_S)
    await life.off(30 * DAY_S)
    await life.outbox.append("log", {}, ttl=DAY_S)
    assert await life.kinds() == {"audit", "telemetry", "log"}, "its clock alone says so"
    await life.hear()
    assert await life.kinds() == {"audit", "log", "loss"}, "what was made since the start is not older by that"
    await life.hear()
    await life.on(DAY_S)
    assert await life.kinds() == {"audit", "loss"}


async def test_a_full_disk_keeps_no_ack_back_and_the_hub_is_heard_when_there_is_room(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    await life.start()
    await life.hear()
    await life.outbox.append("telemetry", {}, ttl=DAY_S)
    await life.off(2 * DAY_S)

    def full(*_: object) -> None:
        raise Retry("cannot write", "the disk is full")

    with monkeypatch.context() as disk:
        disk.setattr(life.outbox._ages, "write", full)
        await life.hear()
    assert await life.kinds() == {"telemetry"}
    await life.hear()
    assert await life.kinds() == {"loss"}
