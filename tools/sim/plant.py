"""The simulated plant: three lines whose state is a pure function of seed, start, actions and now.

Invariants: nothing here reads a clock, a file or a global random state. Between two actions speed ramps linearly and
everything else has a closed form, so a state costs the same after a second or a year, and the physical world does not
depend on how often it is looked at. Time never runs backwards: an earlier `now` sees the latest action's instant.
Units: speed and wear %, vibration mm/s, temperature °C, time seconds since the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random
from typing import Literal

import msgspec

LINES = (1, 2, 3)
RAMP = 4.0  # % of speed per second
WEAR_RATE = 0.5 / 3600 / 100  # % of wear per (% of speed x second): half a percent an hour at full speed
AMBIENT, HEAT, TAU = 22.0, 0.5, 240.0  # °C, °C per % of speed, seconds
PRODUCT = 3000.0  # % x seconds of travel from one product to the next: 30 s at full speed

Verb = Literal["set_speed", "start", "stop"]
Sensor = Literal["vibration", "temperature", "speed", "wear"]
UNITS: dict[Sensor, str] = {"vibration": "mm/s", "temperature": "°C", "speed": "%", "wear": "%"}
LIMITS: dict[Sensor, float] = {"vibration": 7.1, "temperature": 68.0, "wear": 80.0}
_NOISE: dict[Sensor, float] = {"vibration": 0.08, "temperature": 0.3, "speed": 0.0, "wear": 0.0}


class Action(msgspec.Struct, frozen=True):
    """Something done to a line; `percent` is for set_speed."""

    at: float
    line: int
    verb: Verb
    percent: float = 0.0


class Line(msgspec.Struct, frozen=True):
    """A line at the instant `at`. `travel` is the integral of speed since the start."""

    number: int
    at: float
    running: bool
    setpoint: float
    speed: float
    wear: float
    temperature: float
    travel: float = 0.0

    @property
    def vibration(self) -> float:
        share = self.speed / 100
        return 0.3 + 2.0 * share + 8.0 * share**2 * self.wear / 100

    @property
    def product(self) -> int:
        """The number of the product under the line's camera."""
        return int(self.travel // PRODUCT)

    def value(self, sensor: Sensor) -> float:
        return float(getattr(self, sensor))


class Alarm(msgspec.Struct, frozen=True):
    """A sensor at or above its limit."""

    line: int
    sensor: Sensor
    value: float
    limit: float


def initial(seed: int, start: float) -> list[Line]:
    """The lines at the start: running and settled, one of them worn."""
    dice = Random(f"{seed}/lines")
    worn = dice.choice(LINES)
    lines = []
    for number in LINES:
        speed = float(round(55 + 20 * dice.random()))
        wear = (76 if number == worn else 8) + 14 * dice.random()
        lines.append(Line(number, start, True, speed, speed, wear, AMBIENT + HEAT * speed))
    return lines


def fold(lines: Iterable[Line], actions: Iterable[Action]) -> list[Line]:
    """Each line just after its own last action: all that matters of the past."""
    current = {line.number: line for line in lines}
    for action in actions:
        current[action.line] = act(current[action.line], action)
    return list(current.values())


def state(lines: Iterable[Line], actions: Iterable[Action], now: float) -> dict[int, Line]:
    """The lines at `now`, after `actions` in their order."""
    current = fold(lines, actions)
    latest = max([now, *(line.at for line in current)])
    return {line.number: advance(line, latest) for line in current}


def act(line: Line, action: Action) -> Line:
    """The line just after an action."""
    line = advance(line, action.at)
    if action.verb == "set_speed":
        return msgspec.structs.replace(line, setpoint=min(max(action.percent, 0.0), 100.0))
    return msgspec.structs.replace(line, running=action.verb == "start")


def advance(line: Line, now: float) -> Line:
    """The line at a later instant, with nothing done to it in between."""
    target = line.setpoint if line.running else 0.0
    ramp = abs(target - line.speed) / RAMP
    elapsed = max(0.0, now - line.at)
    line = _segment(line, math.copysign(RAMP, target - line.speed), min(elapsed, ramp))
    if elapsed >= ramp:
        line = _segment(msgspec.structs.replace(line, speed=target), 0.0, elapsed - ramp)
    return msgspec.structs.replace(line, at=max(line.at, now))


def _segment(line: Line, slope: float, seconds: float) -> Line:
    """Speed changes by `slope` a second; temperature follows it with a first-order lag, solved exactly."""
    speed = line.speed + slope * seconds
    travelled = (line.speed + speed) / 2 * seconds
    settled = AMBIENT + HEAT * (line.speed - slope * TAU)
    temperature = settled + HEAT * slope * seconds + (line.temperature - settled) * math.exp(-seconds / TAU)
    return msgspec.structs.replace(
        line,
        at=line.at + seconds,
        speed=min(max(speed, 0.0), 100.0),
        wear=min(100.0, line.wear + WEAR_RATE * travelled),
        temperature=temperature,
        travel=line.travel + travelled,
    )


def reading(seed: int, line: Line, sensor: Sensor) -> float:
    """What the sensor shows: the value with a second's noise, rounded."""
    noise = 2 * Random(f"{seed}/{line.number}/{sensor}/{int(line.at)}").random() - 1
    return round(max(0.0, line.value(sensor) + _NOISE[sensor] * noise), 2)


def alarms(lines: Iterable[Line]) -> list[Alarm]:
    """Every sensor at or above its limit now."""
    return [
        Alarm(line.number, sensor, round(line.value(sensor), 2), limit)
        for line in lines
        for sensor, limit in LIMITS.items()
        if line.value(sensor) >= limit
    ]
