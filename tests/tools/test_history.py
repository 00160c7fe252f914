"""What the device measured is there to be asked, bounded, with its gaps; alarms of the past are found."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_agent import history
from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.history import History
from tests.tools.conftest import EngineContext

START = 1_800_000_000.0


class Device:
    """A history that is written and read, at a time set by hand."""

    def __init__(self, folder: Path, limits: str = "") -> None:
        self.ctx = EngineContext({}, START)
        self.file = folder / "history.db"
        self.history = History(self.file, lambda: self.ctx.time)
        (folder / "tools").mkdir(exist_ok=True)
        (folder / "tools" / "history.toml").write_text(limits)
        self.tools = {tool.spec.name: tool.function for tool in load("tools.history", folder / "tools", {})}

    async def measure(self, value: float, sensor: str = "temperature", line: int = 1) -> None:
        result = {"line": line, "sensor": sensor, "value": value, "unit": "°C"}
        body = {"tool": "read_sensor", "args": {"sensor": sensor, "line": line}, "result": result}
        await self.history.keep([body])

    def read(self, series: str = "read_sensor/temperature/1", minutes: int = 60) -> Any:
        return self.tools["read_history"](series=series, minutes=minutes, ctx=self.ctx)


@pytest.fixture
def device(tmp_path: Path) -> Any:
    made = Device(
        tmp_path,
        '[[limits]]\nseries = "read_sensor/temperature/*"\nabove = 70\n'
        '[[limits]]\nseries = "health/disk*"\nbelow = 100',
    )
    yield made
    made.history.close()


async def test_a_window_has_least_mean_most_and_last(device: Device) -> None:
    with pytest.raises(ToolError, match="there is no history yet"):
        device.tools["list_history"]()
    for value in (20.0, 22.0, 40.0, 30.0):
        await device.measure(value)
        device.ctx.time += 20
    assert device.read() == {
        "series": "read_sensor/temperature/1", "count": 4, "min": 20.0, "mean": 28.0, "max": 40.0, "last": 30.0,
        "age_s": 20.0, "unit": "°C",
    }  # fmt: skip
    device.ctx.time += 3600
    assert device.read(minutes=120)["count"] == 4
    with pytest.raises(ToolError, match="was not measured in the last 5 minutes"):
        device.read(minutes=5)
    with pytest.raises(ToolError, match=r"no series 'temperature 1'; there is read_sensor/temperature/1"):
        device.read("temperature 1")


async def test_health_and_plain_numbers_are_series_too_and_texts_are_none(device: Device) -> None:
    await device.history.keep([{"health": {"load": 0.5, "disk_free_mb": 90}}])
    await device.history.keep([{"tool": "count", "args": {}, "result": 7}])
    await device.history.keep([{"tool": "state", "args": {}, "result": {"open": True, "name": "x"}}])
    assert device.tools["list_history"]() == {"series": ["count", "health/disk_free_mb", "health/load", "state/open"]}
    assert device.read("state/open")["last"] == 1.0


async def test_alarms_are_stretches_past_a_limit(device: Device) -> None:
    for minute in range(60):
        await device.measure(80.0 + minute / 100 if 10 <= minute < 20 or minute >= 58 else 60.0)
        await device.measure(20.0, line=2)
        device.ctx.time += 60
    await device.history.keep([{"health": {"disk_free_mb": 42}}])
    found = device.tools["past_alarms"](hours=2, ctx=device.ctx)["alarms"]
    assert [(a["series"], a["minutes_ago"], a["minutes"], a["worst"], a["active"]) for a in found] == [
        ("health/disk_free_mb", 0, 1, 42.0, True),
        ("read_sensor/temperature/1", 2, 2, 80.59, True),
        ("read_sensor/temperature/1", 50, 10, 80.19, False),
    ]


async def test_it_is_bounded_in_time_and_series(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(history, "MAX_SERIES", 3)
    for hour in range(0, 100 * 24, 6):
        device.ctx.time = START + 3600 * hour
        await device.measure(float(hour))
    for line in range(2, 6):
        await device.measure(1.0, line=line)
    assert len(device.tools["list_history"]()["series"]) == 3
    assert caplog.text.count("history keeps 3 series") == 1
    with sqlite3.connect(device.file) as db:
        spans = dict(db.execute("SELECT span, count(*) FROM buckets WHERE series = 1 GROUP BY span"))
    db.close()
    assert spans == {60: 2 * 4 + 1, 3600: 90 * 4 + 1}
    month = device.read(minutes=60 * 24 * 30)
    assert (month["count"], month["max"]) == (30 * 4 + 1, 100 * 24 - 6)


async def test_a_history_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = History(tmp_path)  # a folder is no file
    for _ in range(3):
        await broken.keep([{"health": {"load": 1.0}}])
    assert caplog.text.count("history is not kept") == 1
