"""Maintenance windows: when something may happen, by the clock on the wall of a site.

    22:00-05:00          every night, past midnight
    mon-fri 12:00-13:00  on weekdays; `sat,sun 00:00-24:00` at weekends, `fri-mon …` past the end of the week

Invariants: pure, standard library only. A window opens exactly once for each of its days (the day it begins on) and
always for some time, also where the clocks change: a time that comes twice means the first, one that is skipped means
as much later, and a window that the change leaves nothing of keeps its length. Instants are seconds since the epoch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM = re.compile(r"(?:([a-z,-]+) +)?(\d\d):(\d\d)-(\d\d):(\d\d)")


class Window(NamedTuple):
    """Days of the week (0 is Monday), the minute of the day it begins at, how many minutes on it ends on the wall."""

    days: frozenset[int]
    start: int
    minutes: int


class Moment(NamedTuple):
    """Whether a window is open, and when that changes or is to be asked again: infinite for never."""

    open: bool
    until: float


def parse(text: str) -> Window:
    """Raises ValueError, saying how it is written."""
    found = _FORM.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"window {text!r} is not like '22:00-05:00' or 'mon-fri 12:00-13:00'")
    start, end = (int(found[at]) * 60 + int(found[at + 1]) for at in (2, 4))
    if start >= 1440 or end > 1440 or int(found[3]) > 59 or int(found[5]) > 59:
        raise ValueError(f"window {text!r}: times go from 00:00 to 24:00")
    return Window(_days(found[1] or "mon-sun"), start, end - start if end > start else end - start + 1440)


def zone(name: str) -> ZoneInfo:
    """A time zone by its IANA name. Raises ValueError."""
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:  # not found is a KeyError
        raise ValueError(f"time zone {name!r} is not known here: names are like Europe/Vienna") from error


def moment(windows: Iterable[Window], site: ZoneInfo, at: float) -> Moment:
    """What the windows of a site say at an instant; no windows are always open."""
    spans = sorted(span for window in windows for span in _openings(window, site, at))
    if not spans:
        return Moment(True, math.inf)
    until = at
    for start, end in spans:  # those that touch are one
        if start <= until < end:
            until = end
    if until > at:
        return Moment(True, until)
    return Moment(False, min((start for start, _ in spans if start > at), default=math.inf))


def _openings(window: Window, site: ZoneInfo, at: float) -> Iterator[tuple[float, float]]:
    today = datetime.fromtimestamp(at, UTC).astimezone(site).date()
    for shift in range(-2, 9):
        day = today + timedelta(days=shift)
        if day.weekday() in window.days:
            start, end = (_instant(site, day, minute) for minute in (window.start, window.start + window.minutes))
            yield start, end if end > start else start + window.minutes * 60


def _instant(site: ZoneInfo, day: date, minute: int) -> float:
    wall = datetime.combine(day, time()) + timedelta(minutes=minute)
    return wall.replace(tzinfo=site).timestamp()


def _days(text: str) -> frozenset[int]:
    days: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"days {text!r}: use {', '.join(DAYS)}, lists and ranges of them")
        begin, count = DAYS.index(first), (DAYS.index(last or first) - DAYS.index(first)) % 7
        days |= {(begin + step) % 7 for step in range(count + 1)}
    return frozenset(days)
