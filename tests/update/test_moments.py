"""Updates wait for a good moment, say for which, and go on by themselves; what is installed never waits."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import Refused
from edge_agent.update import moments
from edge_agent.update.moments import REST_S, Facts, Hold, NotNow, Rules, check, held, rules
from tests.update.plant_hub import PlantHub, until
from tests.update.test_update import BIG, device


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


class Clock:
    """A wall clock that a test sets; it runs on."""

    def __init__(self, site: str, text: str) -> None:
        self._site = ZoneInfo(site)
        self.set(text)

    def set(self, text: str) -> None:
        now = datetime.fromisoformat(text).replace(tzinfo=self._site).timestamp()
        self._ahead = now - time.time()

    def __call__(self) -> float:
        return time.time() + self._ahead


NIGHT = {"time_zone": "Europe/Vienna", "download": ["20:00-06:00"], "activate": ["02:00-04:00"]}


async def test_download_and_activation_have_their_own_windows(hub: PlantHub, tmp_path: Path) -> None:
    clock = Clock("Europe/Vienna", "2026-03-28T18:00")
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, rules=NIGHT, clock=clock) as it:
        report = await it.wants(target, "waiting")
        assert "outside the download window (20:00-06:00, Europe/Vienna)" in report.error
        assert "it opens 2026-03-28 20:00" in report.error
        assert not hub.asked
        clock.set("2026-03-28T21:00")
        it.service._hurry()
        await until(lambda: "outside the activate window" in it.last.error)
        assert hub.fetched()
        assert it.running == []
        assert "it opens 2026-03-29 03:00" in it.last.error  # 02:00 is skipped that night
        fetched = len(hub.asked)
    async with device(tmp_path / "state", hub, rules=NIGHT, clock=clock) as it:  # a restart keeps what waits
        await it.wants(target, "waiting")
        clock.set("2026-03-29T03:10")
        it.service._hurry()
        await until(lambda: it.running == ["1"])
        assert len(hub.asked) == fetched
    clock.set("2026-03-29T12:00")
    async with device(tmp_path / "state", hub, rules=NIGHT, clock=clock) as it:
        await until(lambda: it.running == ["1"])  # a restart at noon runs what is installed


async def test_a_restart_keeps_the_version_that_waits_for_its_window(hub: PlantHub, tmp_path: Path) -> None:
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": BIG + b"2"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        await until(lambda: it.running == ["1"])
    shut: dict[str, Any] = {"rules": NIGHT | {"download": []}, "clock": Clock("Europe/Vienna", "2026-05-02T12:00")}
    async with device(tmp_path / "state", hub, **shut) as it:
        await it.wants(two, "waiting")
        fetched = len(hub.asked)
    async with device(tmp_path / "state", hub, **shut) as it:
        await until(lambda: it.running == ["1"])
        await it.wants(two, "waiting")
        shut["clock"].set("2026-05-03T03:00")
        it.service._hurry()
        await until(lambda: it.running == ["1", "2"])
        assert len(hub.asked) == fetched


async def test_a_window_that_closes_stops_a_download_and_the_next_goes_on_from_there(
    hub: PlantHub, tmp_path: Path
) -> None:
    clock = Clock("Europe/Vienna", "2026-05-01T21:00")
    target = hub.publish(
        "net", "1", {"model.bin": b"good" + bytes(itertools.islice(itertools.cycle(range(251)), 10**6))}, tmp_path
    )
    hub.gate.clear()
    async with device(tmp_path / "state", hub, rules=NIGHT | {"activate": []}, clock=clock) as it:
        await it.wants(target, "downloading")
        await until(lambda: bool(hub.fetched()))
        clock.set("2026-05-02T06:01")
        hub.gate.set()
        await until(lambda: it.last.state == "waiting")
        assert it.running == []
        clock.set("2026-05-02T20:00")
        it.service._hurry()
        await until(lambda: it.running == ["1"])


async def test_an_application_holds_updates_back_and_its_hold_survives_a_restart(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.service.hold(5, "batch 7 runs")
        report = await it.wants(target, "waiting")
        assert report.error.startswith("held: batch 7 runs")
    async with device(tmp_path / "state", hub) as it:
        await it.directed({"net": target})
        await until(lambda: bool(it.reports) and it.last.state == "waiting")
        await it.service.release()
        await until(lambda: it.running == ["1"])


async def test_a_hold_ends_by_itself(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.service.hold(0.01, "a moment")
        await it.wants(target, "waiting")
        await until(lambda: it.running == ["1"])


async def test_the_hubs_rules_go_before_the_devices_and_a_wrong_one_changes_nothing(
    hub: PlantHub, tmp_path: Path
) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    low = Facts(battery=20.0, celsius=90.0)
    async with device(tmp_path / "state", hub, rules={"min_battery": 50}, facts=lambda: low) as it:
        assert "battery at 20 %, 50 % are asked" in (await it.wants(target, "waiting")).error
        with pytest.raises(Refused, match="min_batery"):
            it.service.configure({"updates": {"min_batery": 1}})
        with pytest.raises(Refused, match="time zone"):
            it.service.configure({"updates": {"time_zone": "Mars/Base"}})
        it.service.configure({"updates": {"min_battery": 10, "max_celsius": 80}})
        await until(lambda: "90 °C, at most 80" in it.last.error)
        it.service.configure({"updates": {"min_battery": 10}})
        await until(lambda: it.running == ["1"])


@pytest.mark.parametrize("plan", ["hand-over", 3, ["canary"], {"trial": "shadow"}, {"policy": None}])
async def test_a_plan_that_is_no_table_is_refused_and_changes_nothing(hub: PlantHub, tmp_path: Path, plan: Any) -> None:
    """The document stays on the device's disk: what ended the daemon would end it at each start."""
    async with device(tmp_path / "state", hub) as it:
        with pytest.raises(Refused, match="activation"):
            it.service.configure({"updates": {"time_zone": "Europe/Vienna"}, "activation": {"net": plan}})
        assert it.service.time_zone == "UTC"


async def test_the_bundles_share_of_the_disk_is_a_setting_that_holds(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, budget=100_000) as it:
        report = await it.wants(target, "failed")
        assert "raise `bundles_mb`" in report.error
        assert not hub.fetched()


@given(st.lists(st.tuples(st.floats(0, 7200), st.floats(0.1, 1e4)), max_size=20), st.floats(1, 600))
def test_holds_that_follow_one_another_never_last_beyond_the_limit(
    asks: list[tuple[float, float]], limit: float
) -> None:
    now, hold, began = 1e9, None, 0.0
    for pause, minutes in asks:
        now += pause
        lapsed = hold is None or now >= hold.until + REST_S
        try:
            hold = held(hold, now, minutes, "busy", limit)
        except Refused:
            assert hold is not None
            assert now >= began + limit * 60
            continue
        began = now if lapsed else began
        assert now < hold.until <= began + limit * 60 + 1e-3
        assert hold.since == began


async def test_a_clock_that_is_put_back_prolongs_no_hold_beyond_its_limit(hub: PlantHub, tmp_path: Path) -> None:
    clock = Clock("UTC", "2036-01-01T00:00")  # before the first answer of a time server
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, clock=clock, rules={"max_hold_minutes": 600}) as it:
        await it.service.hold(30, "batch 7 runs")
        await it.wants(target, "waiting")
        clock.set("2026-01-01T00:00")
        it.service._hurry()
        await until(lambda: it.running == ["1"])
        again = await it.service.hold(1e5, "batch 8 runs")
        assert again.until - clock() <= 600 * 60
        clock.set("2025-12-31T23:59:58")  # a little is the daily work of a time server
        with pytest.raises(NotNow):
            it.service._timing.check_hold()


async def test_holds_of_several_applications_at_once_end_with_the_last(hub: PlantHub, tmp_path: Path) -> None:
    async with device(tmp_path / "state", hub) as it:
        await asyncio.gather(*(it.service.hold(minutes, f"line {minutes}") for minutes in (60, 5, 30, 90, 1)))
        holding = it.service.holding
        assert holding is not None
        assert holding.reason == "line 90"
        assert 89 * 60 < holding.until - time.time() <= 90 * 60
    async with device(tmp_path / "state", hub) as it:
        assert it.service.holding == holding


@given(st.floats(0, 100), st.floats(-20, 120), st.floats(0, 100), st.floats(1, 120))
def test_what_speaks_against_a_moment_is_said_or_nothing_does(
    battery: float, celsius: float, least: float, most: float
) -> None:
    asked, said = Rules(min_battery=least, max_celsius=most), ""
    try:
        check("activate", asked, Facts(battery, celsius), None, 0.0)
    except NotNow as error:
        said = str(error)
    assert ("battery" in said) == (battery < least)
    assert ("°C" in said) == (battery >= least and celsius > most)


def test_what_the_machine_cannot_tell_holds_nothing_up(tmp_path: Path) -> None:
    assert moments.facts(tmp_path) == Facts()
    check("download", Rules(min_battery=99, max_celsius=1), Facts(), None, 0.0)
    check("download", Rules(), Facts(), Hold(0.0, 1.0, "over"), 2.0)
    for name, content in {
        "power_supply/BAT0": {"type": "Battery", "status": "Discharging", "capacity": "41"},
        "power_supply/BAT1": {"type": "Battery", "status": "Charging", "capacity": "3"},
        "power_supply/AC": {"type": "Mains"},
        "thermal/thermal_zone0": {"temp": "45500"},
        "thermal/thermal_zone1": {"temp": "nonsense"},
    }.items():
        (tmp_path / name).mkdir(parents=True)
        for file, text in content.items():
            (tmp_path / name / file).write_text(f"{text}\n")
    assert moments.facts(tmp_path) == Facts(41.0, 45.5)


def test_a_hold_needs_minutes_and_a_reason() -> None:
    for minutes, reason in ((0, "x"), (-1, "x"), (float("nan"), "x"), (5, " "), (5, "x" * 201)):
        with pytest.raises(Refused, match="minutes and a reason"):
            held(None, 0.0, minutes, reason, 60)


def test_rules_name_what_is_wrong() -> None:
    assert rules({"time_zone": "Europe/Vienna"}, {"min_battery": 5}) == Rules("Europe/Vienna", min_battery=5)
    for wrong in ({"download": ["whenever"]}, {"activat": []}, {"time_zone": "x"}):
        with pytest.raises(Refused, match="a setting of updates is wrong"):
            rules(wrong)
