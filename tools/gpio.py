"""Lines of a Linux GPIO chip (character device, libgpiod 2), by the names that the pack's file gives them.

Invariants: an output is requested when it is first set and held from then on, so that it keeps its value while the tool
runner lives; what a line does when nobody holds it is up to the kernel's driver and the board. A set line is read back
by the device (the tool's `check`). `on` is the logical value: `active_low` turns it round.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import gpiod
import msgspec
from gpiod.line import Bias, Direction, Value
from msgspec import Meta

from edge_agent.agent.tool import Check, Param, Tool, ToolError, Undo, declare
from tools import settings

_BIAS = {"": Bias.AS_IS, "off": Bias.DISABLED, "up": Bias.PULL_UP, "down": Bias.PULL_DOWN}


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line by its offset or its name on a chip, in or out; `bias` pulls it up or down."""

    line: Annotated[int, Meta(ge=0)] | str
    output: bool = False
    active_low: bool = False
    bias: Literal["", "off", "up", "down"] = ""
    chip: str = "/dev/gpiochip0"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    lines: Annotated[dict[str, Line], Meta(min_length=1, max_length=64)]


class State(TypedDict):
    """A line's logical value."""

    on: bool


class Gpio:
    """The tools."""

    def __init__(self, lines: dict[str, Line]) -> None:
        self._lines, self._held = lines, dict[str, gpiod.LineRequest]()

    def read_line(self, name: str) -> State:
        """Read whether a line (a switch, a contact, an output) is on."""
        if name in self._held:
            return {"on": self._held[name].get_value(self._lines[name].line) == Value.ACTIVE}
        line = self._lines[name]
        way = Direction.AS_IS if line.output else Direction.INPUT
        with self._request(name, direction=way) as request:
            return {"on": request.get_value(line.line) == Value.ACTIVE}

    def set_line(self, name: str, on: bool) -> dict[str, Any]:
        """Switch an output line on or off."""
        before, value = self.read_line(name)["on"], Value.ACTIVE if on else Value.INACTIVE
        if name not in self._held:
            held = self._request(name, direction=Direction.OUTPUT, output_value=value)
            self._held[name] = held
            weakref.finalize(self, held.release)
        try:
            self._held[name].set_value(self._lines[name].line, value)
        except OSError as error:
            raise ToolError(f"{name} is not set: {error.strerror}") from error
        return {"on": on, "before": before}

    def _request(self, name: str, **how: Any) -> gpiod.LineRequest:
        line = self._lines[name]
        chosen = gpiod.LineSettings(active_low=line.active_low, bias=_BIAS[line.bias], **how)
        try:
            return gpiod.request_lines(line.chip, consumer="outrider", config={line.line: chosen})
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ToolError(f"{name} (line {line.line} of {line.chip}) cannot be had: {why}") from error


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`read_line`, and `set_line` where a line is an output. Raises ValueError."""
    given = settings.read("gpio", state, options, Settings)
    tools = Gpio(given.lines)
    made = [settings.choosing(declare(tools.read_line), name=given.lines)]
    if outputs := [name for name, line in given.lines.items() if line.output]:
        check = Check("read_line", {"name": "$name"}, equals="$on", value="on")
        undo = Undo("set_line", {"name": "$name", "on": "$result.before"})
        returns = settings.fields(Param("on", "bool"), Param("before", "bool"))
        # not idempotent: made again, it would take what it set for what was before, which an undo sets
        switch = declare(tools.set_line, risk="act", idempotent=False, check=check, undo=undo)
        made.append(settings.choosing(switch, returns, name=outputs))
    return made
