"""An alarm of the device's history starts the workflows that wait for it, when it begins and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.toolrunner import load
from edge_agent.agent.workflow_triggers import Library, Triggers
from edge_agent.errors import Retry
from edge_agent.wire.grants import Subject
from tests.agent.test_workflow import read_gauge
from tests.agent.test_workflow_run import GAUGE, HEAD, permit
from tests.tools.test_history import START, Device
from tests.tools.test_schedule import Clock, WithContext


async def test_an_alarm_that_begins_or_ends_starts_a_run_once_across_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, event in (("up", "alarm.raised:read_sensor/*/1"), ("down", "alarm.cleared"), ("not", "alarm.raised:x")):
        text = HEAD.replace("workflow: w", f"workflow: {name}")
        (tmp_path / f"{name}.yaml").write_text(f"{text}triggers: [{{event: '{event}'}}]\n{GAUGE}")
    device = Device(tmp_path, '[[limits]]\nseries = "read_sensor/*"\nabove = 70\n')
    clock, started = Clock(), list[tuple[str, str, Any]]()
    clock.now = device.ctx.time = START

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        if id not in [before for _, before, _ in started]:
            started.append((name, id, event))

    tools = WithContext(clock, read_gauge, *load("tools.history", tmp_path / "tools", {}))
    kept = tmp_path / "triggers.json"

    async def look(after: float, value: float | None) -> list[str]:
        clock.now = device.ctx.time = clock.now + after
        if value is not None:
            await device.measure(value)
        seen = len(started)
        await Triggers(Library(tmp_path), tools, permit, start, clock, kept).look()
        return [name for name, *_ in started[seen:]]

    assert await look(0, None) == [], "nothing was measured yet"
    assert "alarms: there is no history yet" in caplog.text
    assert await look(20, 60.0) == []
    assert await look(20, 80.0) == ["up"]
    assert (started[0][2]["series"], started[0][2]["worst"], started[0][2]["limit"]) == (
        "read_sensor/temperature/1", 80.0, 70.0,
    )  # fmt: skip
    assert await look(20, 60.0) == ["down"], "a minute later nothing is past the limit"
    kept.unlink()
    assert await look(5, 60.0) == []
    assert await look(600, 90.0) == ["up"]
    assert await look(600, None) == [], "nothing says that it is over"
    assert await look(20, 60.0) == ["down"]
    assert await look(1200, 91.0) == ["up"]
    assert await look(7200, None) == ["down"]
    assert {event["name"] for *_, event in started} == {event["series"] for *_, event in started}
    assert {event["name"] for *_, event in started} == {"read_sensor/temperature/1"}
    device.history.close()


async def test_alarms_are_looked_at_only_while_a_workflow_waits_for_one_and_not_at_each_look(tmp_path: Path) -> None:
    device = Device(tmp_path, '[[limits]]\nseries = "read_sensor/*"\nabove = 70\n')
    await device.measure(80.0)
    clock, started = Clock(), list[str]()
    clock.now = device.ctx.time

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        if len(tools.calls) == 1:
            raise Retry("the disk is full")
        started.append(event["kind"])

    tools = WithContext(clock, read_gauge, *load("tools.history", tmp_path / "tools", {}))
    triggers = Triggers(Library(tmp_path), tools, permit, start, clock)
    await triggers.look()
    assert tools.calls == []
    (tmp_path / "w.yaml").write_text(f"{HEAD}triggers: [{{event: alarm.raised}}]\n{GAUGE}")
    for _ in range(4):
        clock.now += 4
        await triggers.look()
        assert (len(tools.calls), started) in ((1, []), (2, ["alarm.raised"])), "the first time there was no room"
    assert len(tools.calls) == 2
    device.history.close()
