"""Maintenance windows around changes of the clock."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.wire.windows import Moment, Window, moment, parse, zone

CHANGES = {  # an instant at which the clocks change, by zone
    "Europe/Vienna": [datetime(2026, 3, 29, 1, tzinfo=UTC), datetime(2026, 10, 25, 1, tzinfo=UTC)],
    "America/New_York": [datetime(2026, 3, 8, 7, tzinfo=UTC), datetime(2026, 11, 1, 6, tzinfo=UTC)],
    "Australia/Lord_Howe": [datetime(2026, 4, 4, 15, tzinfo=UTC), datetime(2026, 10, 3, 15, 30, tzinfo=UTC)],
    "Asia/Kolkata": [datetime(2026, 3, 29, 1, tzinfo=UTC)],
    "Africa/Cairo": [datetime(2026, 4, 23, 22, tzinfo=UTC)],  # midnight itself is skipped
}
SITES = st.sampled_from([(name, change) for name, changes in CHANGES.items() for change in changes])
EVERY = frozenset(range(7))
WINDOWS = st.builds(Window, st.just(EVERY), st.integers(0, 1439), st.integers(1, 1440))


def at(site: str, text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(site)).timestamp()


def spans(window: Window, site: ZoneInfo, begin: float, end: float) -> list[tuple[float, float]]:
    """The openings by asking when the answer changes, as a caller does."""
    found, now, opened = [], begin, None
    while now < end:
        state, until = moment([window], site, now)
        assert until > now
        if state:
            opened = now
        elif opened is not None:
            found.append((opened, now))
            opened = None
        now = until
    return found


@given(SITES, st.builds(Window, st.just(EVERY), st.integers(0, 1439), st.integers(1, 1200)))
def test_a_window_opens_once_a_day_whatever_the_clocks_do(where: tuple[str, datetime], window: Window) -> None:
    site, change = ZoneInfo(where[0]), where[1]
    local = change.astimezone(site).date()
    for day in range(-2, 3):
        noon = datetime.combine(local + timedelta(days=day), datetime.min.time())
        wall = noon + timedelta(minutes=window.start)
        start = wall.replace(tzinfo=site).timestamp()
        if day:  # on the day itself the wall shows the start, but where it is skipped
            assert moment([window], site, start).open
        assert not moment([window._replace(days=frozenset({(wall.weekday() + 3) % 7}))], site, start).open
    found = spans(window, site, change.timestamp() - 5 * 86400, change.timestamp() + 5 * 86400)
    assert 8 <= len(found) <= 11
    assert all(0 < end - start <= (window.minutes + 60) * 60 for start, end in found)


@given(SITES, WINDOWS, st.integers(-3 * 86400, 3 * 86400))
def test_away_from_the_change_the_wall_decides(where: tuple[str, datetime], window: Window, shift: int) -> None:
    site = ZoneInfo(where[0])
    now = where[1] + timedelta(seconds=shift)
    wall = now.astimezone(site)
    minute = wall.hour * 60 + wall.minute
    by_wall = (minute - window.start) % 1440 < window.minutes
    if abs(shift) > 36 * 3600:
        assert moment([window], site, now.timestamp()).open == by_wall


@given(SITES, st.lists(WINDOWS, min_size=1, max_size=4), st.integers(-3 * 86400, 3 * 86400))
def test_the_answer_holds_until_it_says_it_changes(where, windows, shift) -> None:  # type: ignore[no-untyped-def]
    site, now = ZoneInfo(where[0]), where[1].timestamp() + shift
    state, until = moment(windows, site, now)
    if until == math.inf or until - now > 2 * 86400:
        return
    for share in (0.1, 0.5, 0.99):
        assert moment(windows, site, now + share * (until - now)).open == state
    assert moment(windows, site, until).open != state


@pytest.mark.parametrize(
    ("window", "begins", "ends"),
    [
        ("22:00-06:00", "2026-03-28T22:00", "2026-03-29T06:00"),  # seven hours
        ("22:00-06:00", "2026-10-24T22:00", "2026-10-25T06:00"),  # nine
        ("02:15-02:45", "2026-03-29T03:15", "2026-03-29T03:45"),  # skipped: as much later
        ("02:00-03:00", "2026-03-29T03:00", "2026-03-29T04:00"),  # nothing left of it: it keeps its length
        ("01:00-02:30", "2026-10-25T01:00", "2026-10-25T02:30"),  # twice: the first
        ("00:00-24:00", "2026-03-29T00:00", "2026-03-30T00:00"),
    ],
)
def test_a_night_with_a_change_in_vienna(window: str, begins: str, ends: str) -> None:
    site, only = ZoneInfo("Europe/Vienna"), parse(window)
    begin, end = at("Europe/Vienna", begins), at("Europe/Vienna", ends)
    day = datetime.fromisoformat(begins).weekday()
    only = only._replace(days=frozenset({day}))
    assert moment([only], site, begin - 1) == Moment(False, begin)
    assert moment([only], site, begin) == Moment(True, end)
    assert not moment([only], site, end).open


def test_days_are_those_a_window_begins_on() -> None:
    site = ZoneInfo("Europe/Vienna")
    friday = parse("fri 22:00-05:00")
    assert moment([friday], site, at("Europe/Vienna", "2026-05-02T04:59")).open  # Saturday morning
    assert not moment([friday], site, at("Europe/Vienna", "2026-05-01T04:59")).open
    assert parse("fri-mon,wed 00:00-01:00").days == frozenset({4, 5, 6, 0, 2})
    assert moment([], site, 0.0) == Moment(True, math.inf)


@pytest.mark.parametrize("text", ["", "22:00", "25:00-26:00", "mon 22:00", "22:61-23:00", "someday 22:00-23:00"])
def test_what_is_no_window_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"window|days"):
        parse(text)


def test_a_zone_nobody_knows_is_refused() -> None:
    for name in ("Mars/Base", "../etc/passwd", ""):
        with pytest.raises(ValueError, match="time zone"):
            zone(name)
