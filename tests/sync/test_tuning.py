"""The hub configures a running device: whole tables, the last good one kept, over restarts too."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import Settings
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.sync.outbox import Limits, Outbox
from edge_agent.sync.twin import Twin
from edge_agent.telemetry import Telemetry
from edge_agent.tuning import Tuner, tune
from edge_agent.wire.messages import Desired
from tests.sync.brokers import until
from tests.sync.test_telemetry import Tools


class Device:
    """The parts that a table reaches, as the daemon joins them."""

    def __init__(self, twin: Twin, outbox: Outbox, folder: Path) -> None:
        self.twin, self.outbox = twin, outbox
        self.settings = self.now = Settings(state=folder, telemetry_s=3600)
        self.telemetry = Telemetry(Tools(folder), outbox, folder, 3600, 60)
        self.tuner = Tuner(self.settings, twin, self.apply)

    def apply(self, settings: Settings) -> None:
        self.telemetry.configure(settings.telemetry_s, settings.telemetry_ttl_s, settings.sample)
        self.outbox.limit(Limits(bytes=settings.outbox_mb << 20))
        self.now = settings

    async def desire(self, version: int, config: Any) -> dict[str, Any]:
        """What the device reports of it."""
        await self.twin.accept(Desired(version, 0.0, {"config": config}))
        await until(lambda: self.twin.reported.get("config", {}).get("version") == version)
        told: dict[str, Any] = self.twin.reported["config"]
        return told


@asynccontextmanager
async def device(store: Store, outbox: Outbox, folder: Path) -> AsyncIterator[Device]:
    made = Device(await Twin.open(store, outbox), outbox, folder)
    tasks = [asyncio.create_task(made.tuner.run()), asyncio.create_task(made.telemetry.run())]
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_shorter_interval_holds_at_once_though_the_next_sample_was_an_hour_away(
    store: Store, outbox: Outbox, tmp_path: Path
) -> None:
    async with device(store, outbox, tmp_path) as made:
        await until(lambda: outbox.last_seq > 1)
        before = outbox.last_seq
        await made.desire(1, {"telemetry_s": 0.1, "sample": ['read_sensor(sensor="speed", line=1)']})
        await until(lambda: outbox.last_seq > before + 8, 5)


async def test_a_bad_table_is_refused_whole_with_its_reason_and_the_last_good_one_holds(
    store: Store, outbox: Outbox, tmp_path: Path
) -> None:
    async with device(store, outbox, tmp_path) as made:
        assert await made.desire(1, {"outbox_mb": 7, "log": "debug"}) == {
            "version": 1,
            "asked": {"outbox_mb": 7, "log": "debug"},
        }
        for version, (config, says) in enumerate(
            [
                ({"outbox_mb": 8, "telemetry_s": 0}, "telemetry_s"),
                ({"outbox_mb": 8, "log": "loud"}, "loud"),
                ({"outbox_mb": 8, "sample": ["no call("]}, "no call("),
                ({"outbox_mb": 8, "telemtry_s": 3}, "did you mean 'telemetry_s'"),
                ("quick", "object"),
            ],
            2,
        ):
            told = await made.desire(version, config)
            assert says in told["error"], told
            assert told["asked"] == {"outbox_mb": 7, "log": "debug"}
            assert (made.now.outbox_mb, made.now.log) == (7, "debug")
        assert await made.desire(9, {"log": "error"}) == {"version": 9, "asked": {"log": "error"}}
        assert (made.now.outbox_mb, made.now.log) == (256, "error")


async def test_the_last_good_table_holds_after_a_restart_though_a_bad_one_is_desired(
    store: Store, outbox: Outbox, tmp_path: Path
) -> None:
    async with device(store, outbox, tmp_path) as made:
        await made.desire(1, {"outbox_mb": 7})
        await made.desire(2, {"outbox_mb": -1})
    async with device(store, outbox, tmp_path) as made:
        await until(lambda: made.now.outbox_mb == 7)
        assert "outbox_mb" in made.twin.reported["config"]["error"]


async def test_a_smaller_quota_lets_go_and_says_so(store: Store, outbox: Outbox) -> None:
    for _ in range(100):
        await outbox.append("telemetry", {"x": "y" * 1000}, 6)
    outbox.limit(Limits(bytes=50_000))
    await outbox.append("telemetry", {"x": "z"}, 6)
    assert outbox.size <= 50_000
    part = await outbox.batch(0)
    assert part is not None
    assert any(b'"kind":"loss"' in line for line in part.lines)


def test_a_table_takes_no_setting_that_needs_a_restart(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="'api'"):
        tune(Settings(state=tmp_path), {"api": "0.0.0.0:1"})
