"""A handful of declared tools for the agent's tests; also a pack for the tool runner."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np

from edge_agent.agent.tool import Context, Range, Tool, ToolError, tool
from edge_agent.wire.tensor import Tensor

Line = Annotated[int, Range(1, 3)]


class Reading(TypedDict):
    """What a sensor shows."""

    sensor: Literal["vibration", "temperature"]
    line: int
    value: float


@tool(examples=[("how hot is line 2", {"sensor": "temperature", "line": 2})])
def read_sensor(sensor: Literal["vibration", "temperature"], line: Line) -> Reading:
    """Read a sensor of a production line."""
    return {"sensor": sensor, "line": line, "value": 41.5}


@tool(risk="act", examples=[("run line 1 at 40 percent", {"line": 1, "percent": 40.0})])
def set_speed(line: Line, percent: Annotated[float, Range(0, 100, "%")], note: str = "") -> str:
    """Set the speed of a line."""
    return f"line {line} runs at {percent:g} % {note}".strip()


@tool(risk="act", idempotent=False)
def stamp(text: str, times: int = 1, hard: bool = False) -> str:
    """Stamp a text on the next product."""
    return f"stamped {text} {times}"


@tool(risk="danger", idempotent=False)
def purge() -> str:
    """Empty the whole line."""
    return "gone"


@tool()
def jam() -> str:
    """Always fails in an ordinary way."""
    raise ToolError("the feeder is jammed")


@tool()
def crash() -> str:
    """Always fails with a bug."""
    raise ZeroDivisionError("a bug")


@tool()
def double(value: float, ctx: Context) -> float:
    """Double a number with a network."""
    data = np.array([value], np.float32)
    out = ctx.infer("doubler", {"x": Tensor("float32", [1], data.tobytes())})["y"]
    return float(np.frombuffer(out.data, np.float32)[0])


@tool(timeout_s=0.3)
def hang() -> str:
    """Never returns."""
    import threading

    threading.Event().wait()
    return ""


_two = threading.Barrier(2)


@tool(concurrent=True)
def meet() -> int:
    """Waits until two are here."""
    return _two.wait(5)


@tool()
def nap() -> str:
    """Takes a while."""
    time.sleep(0.25)
    return "rested"


@tool()
def flood() -> str:
    """Returns more than anyone wants."""
    return "x" * 100_000


ALL = [read_sensor, set_speed, stamp, purge, jam, crash, double, hang, meet, nap, flood]


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    """The pack; `only` names one tool."""
    return [item for item in ALL if options.get("only", item.spec.name) == item.spec.name]
