"""The tool pack of the simulated plant: `pack(state, options)` gives what an agent can call there.

Invariants: an action is in the journal before its tool answers; what a sensor or camera shows depends on the plant and
the context's clock alone; results are small, with units.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Literal, TypedDict, cast

from edge_agent.agent.tool import Context, Range, Tool, ToolError, declare
from tools.sim import camera as lens
from tools.sim import plant
from tools.sim.journal import Journal
from tools.vision.ocr import read_text

LineNumber = Annotated[int, Range(1, 3)]
Percent = Annotated[int, Range(0, 100, "%")]
_FIELDS = {
    "lot": re.compile(r"LOT\s*(\S+)"),
    "serial": re.compile(r"SN\s*(\S+)"),
    "expiry": re.compile(r"EXP\s*(\S+)"),
}


Unit = Literal["mm/s", "°C", "%"]


class Reading(TypedDict):
    """What a sensor of a line shows."""

    line: int
    sensor: plant.Sensor
    value: float
    unit: Unit


class Motion(TypedDict):
    """How a line runs after an action."""

    line: int
    running: bool
    target_percent: int


class Label(TypedDict, total=False):
    """What could be read of a label."""

    camera: int
    product: int
    lot: str
    serial: str
    expiry: str
    confidence: float


class Alarm(TypedDict):
    """A sensor at or above its limit."""

    line: int
    sensor: plant.Sensor
    value: float
    limit: float
    unit: Unit


class Alarms(TypedDict):
    """All there are."""

    alarms: list[Alarm]


class Plant:
    """The tools, over one journal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def read_sensor(self, sensor: plant.Sensor, line: LineNumber, ctx: Context) -> Reading:
        """Read one sensor of a production line: vibration, temperature, speed or wear."""
        value = plant.reading(self.journal.seed, self._line(line, ctx), sensor)
        return {"line": line, "sensor": sensor, "value": value, "unit": cast(Unit, plant.UNITS[sensor])}

    def set_speed(self, line: LineNumber, percent: Percent, ctx: Context) -> Motion:
        """Make a running line faster or slower: set its speed in percent of full speed."""
        if not self._line(line, ctx).running:
            raise ToolError(f"line {line} is stopped; start it first")
        return self._act(line, "set_speed", ctx, percent)

    def stop_line(self, line: LineNumber, ctx: Context) -> Motion:
        """Stop a production line."""
        return self._act(line, "stop", ctx)

    def start_line(self, line: LineNumber, ctx: Context) -> Motion:
        """Start a stopped production line again, at its last set speed."""
        return self._act(line, "start", ctx)

    def read_label(self, camera: LineNumber, ctx: Context) -> Label:
        """Look through a camera and read the printed product label: lot, serial number, expiry date."""
        product = self._line(camera, ctx).product
        lines = read_text(ctx, lens.frame(self.journal.seed, camera, product), side=384)
        text = "\n".join(line.text for line in lines)
        fields = {name: found[1] for name, pattern in _FIELDS.items() if (found := pattern.search(text))}
        if not fields:
            raise ToolError(f"camera {camera}: no readable label in the picture")
        confidence = round(min(line.confidence for line in lines), 3)
        label = {"camera": camera, "product": product, **fields, "confidence": confidence}
        return cast(Label, label)

    def list_alarms(self, ctx: Context) -> Alarms:
        """List the active alarms of all lines: what is wrong right now."""
        found = plant.alarms(self.journal.lines(ctx.now()).values())
        return {
            "alarms": [
                Alarm(
                    line=a.line, sensor=a.sensor, value=a.value, limit=a.limit, unit=cast(Unit, plant.UNITS[a.sensor])
                )
                for a in found
            ]
        }

    def _line(self, number: int, ctx: Context) -> plant.Line:
        lines = self.journal.lines(ctx.now())
        if number not in lines:
            raise ToolError(f"there is no line {number}; lines are 1 to {len(lines)}")
        return lines[number]

    def _act(self, number: int, verb: plant.Verb, ctx: Context, percent: float = 0.0) -> Motion:
        self._line(number, ctx)
        try:
            line = self.journal.act(number, verb, ctx.now(), percent)
        except OSError as error:
            raise ToolError(
                f"line {number} was left as it was: the action could not be recorded ({error.strerror})"
            ) from error
        return {"line": number, "running": line.running, "target_percent": round(line.setpoint)}


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    """The plant's tools. Options: `seed` (an integer, 1), `start` (seconds since the epoch, now when the plant is new).

    Raises ValueError for a wrong option, JournalError for a damaged plant or one of another seed.
    """
    if unknown := options.keys() - {"seed", "start"}:
        raise ValueError(f"the plant has no option {', '.join(sorted(unknown))}; it has seed and start")
    try:
        seed, start = int(options.get("seed", "1")), float(options.get("start", time.time()))
    except ValueError as error:
        raise ValueError(f"seed is an integer and start a number of seconds: {error}") from error
    tools = Plant(Journal(state, seed, start))
    return [
        declare(tools.read_sensor, examples=[
            ("how hot is line 3 running?", {"sensor": "temperature", "line": 3}),
            ("Is line 1 shaking more than it should?", {"sensor": "vibration", "line": 1}),
            ("check the wear on the second line", {"sensor": "wear", "line": 2}),
            ("read the speed of line 2", {"sensor": "speed", "line": 2}),
            ("temperature on line 1?", {"sensor": "temperature", "line": 1}),
        ]),
        declare(tools.set_speed, risk="act", examples=[
            ("bring line 2 down to 40 percent", {"line": 2, "percent": 40}),
            ("crank line 1 up to 85", {"line": 1, "percent": 85}),
            ("Run line 3 at 5 percent", {"line": 3, "percent": 5}),
            ("slow down line 1 to 12%", {"line": 1, "percent": 12}),
            ("line 2 should do 65 percent", {"line": 2, "percent": 65}),
        ]),
        declare(tools.stop_line, risk="act", examples=[
            ("shut down line 3", {"line": 3}),
            ("Line 1 sounds awful, halt it", {"line": 1}),
            ("stop line 2 now", {"line": 2}),
            ("switch line 1 off", {"line": 1}),
            ("line 3 has to stop", {"line": 3}),
        ]),
        declare(tools.start_line, risk="act", examples=[
            ("get line 2 going again", {"line": 2}),
            ("turn line 3 back on", {"line": 3}),
            ("start line 1 up", {"line": 1}),
            ("restart line 2", {"line": 2}),
            ("line 3 is fixed, resume it", {"line": 3}),
        ]),
        declare(tools.read_label, timeout_s=20.0, examples=[
            ("what's printed on the product at camera 2?", {"camera": 2}),
            ("give me the lot number camera 1 sees", {"camera": 1}),
            ("read the label with camera 3", {"camera": 3}),
            ("serial number at camera 2?", {"camera": 2}),
            ("what expiry date does camera 3 show?", {"camera": 3}),
        ]),
        declare(tools.list_alarms, examples=[
            ("anything wrong in the plant?", {}),
            ("show me all active alarms", {}),
            ("which alarms do we have?", {}),
            ("are there problems on the lines?", {}),
            ("report all warnings", {}),
        ]),
    ]  # fmt: skip
