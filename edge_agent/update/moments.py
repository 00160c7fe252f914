"""May an update be downloaded or activated now? Rules and facts in, yes or the reason and when to ask again out.

Invariants: pure but for `facts`, which reads the machine; what cannot be read holds nothing up; an application's hold
ends by itself, and holds that follow one another count as one, so none lasts beyond its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from edge_agent.errors import Refused, Retry
from edge_agent.wire import windows
from edge_agent.wire.updates import Rules

ASK_AGAIN_S, REST_S = 60.0, 600.0
Step = Literal["download", "activate"]


def rules(*given: Mapping[str, Any]) -> Rules:
    """Raises Refused, naming the key."""
    try:
        return msgspec.convert({key: value for each in given for key, value in each.items()}, Rules)
    except msgspec.ValidationError as error:
        raise Refused(f"a setting of updates is wrong: {error}", "see docs/updates.md") from error


class Facts(NamedTuple):
    """Percent of a battery that discharges, degrees of the hottest zone; None: there is none."""

    battery: float | None = None
    celsius: float | None = None


class Hold(msgspec.Struct, frozen=True):
    """An application says not now; `since` is the start of the first of those that follow one another."""

    since: float
    until: float
    reason: str


class NotNow(Retry):
    """It waits, at most until `until`."""

    def __init__(self, message: str, hint: str, until: float) -> None:
        super().__init__(message, hint)
        self.until = until


def held(before: Hold | None, now: float, minutes: float, reason: str, limit: float) -> Hold:
    """A new hold, or a longer one. Raises Refused when nothing of the limit is left."""
    if not 0 < minutes < 1e6 or not 0 < len(reason.strip()) <= 200:
        raise Refused("a hold has minutes and a reason of at most 200 characters", "minutes 30, reason 'batch 7 runs'")
    since = before.since if before is not None and before.since <= now < before.until + REST_S else now
    until = min(now + minutes * 60, since + limit * 60)
    if until <= now:
        raise Refused(f"updates were held for {limit:g} minutes, no longer", "let them pass, or raise max_hold_minutes")
    if before is not None and before.until >= until:  # another application's, which lasts longer
        return before
    return Hold(since, until, reason.strip())


def check(step: Step, asked: Rules, facts: Facts, hold: Hold | None, now: float) -> None:
    """Raises NotNow with the first thing that speaks against it."""
    if hold is not None and now < hold.until:
        raise NotNow(f"held: {hold.reason}", f"until {_clock(hold.until, asked)} at the latest", hold.until)
    site, listed = windows.zone(asked.time_zone), getattr(asked, step)
    state, until = windows.moment(map(windows.parse, listed), site, now)
    if not state:
        what = f"outside the {step} window ({', '.join(listed)}, {asked.time_zone})"
        raise NotNow(what, f"it opens {_clock(until, asked)}", until)
    soon = now + ASK_AGAIN_S
    if facts.battery is not None and facts.battery < asked.min_battery:
        raise NotNow(f"battery at {facts.battery:.0f} %, {asked.min_battery:g} % are asked", "connect power", soon)
    if facts.celsius is not None and 0 < asked.max_celsius < facts.celsius:
        raise NotNow(f"{facts.celsius:.0f} °C, at most {asked.max_celsius:g} are asked", "let it cool down", soon)


def facts(root: Path = Path("/sys/class")) -> Facts:
    """Read from the kernel; blocks shortly."""
    batteries = [
        float(level)
        for supply in root.glob("power_supply/*")
        if _read(supply / "type") == "Battery" and _read(supply / "status") == "Discharging"
        if (level := _read(supply / "capacity")).isdecimal()
    ]
    zones = [_read(zone / "temp") for zone in root.glob("thermal/thermal_zone*")]
    hot = [float(text) / 1000 for text in zones if text.lstrip("-").isdecimal()]
    return Facts(min(batteries, default=None), max(hot, default=None))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _clock(at: float, asked: Rules) -> str:
    return datetime.fromtimestamp(at, windows.zone(asked.time_zone)).isoformat(" ", "minutes")
