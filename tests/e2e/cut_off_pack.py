"""A tool pack for a device that is cut off: a gauge, a valve that leaves a trace, a dangerous one."""

from pathlib import Path
from typing import Annotated, TypedDict

from edge_agent.agent.tool import Range, Tool, tool

Line = Annotated[int, Range(1, 3)]


class Gauge(TypedDict):
    value: float


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    def did(what: str) -> str:
        with (state / "effects").open("a") as file:
            file.write(what + "\n")
        return what

    @tool()
    def read_gauge(line: Line) -> Gauge:
        """Read the pressure of a line in bar."""
        return {"value": 8.5}

    @tool(risk="act", idempotent=False)
    def open_valve(line: Line) -> str:
        """Open the relief valve of a line."""
        return did(f"valve {line}")

    @tool(risk="danger", idempotent=False)
    def purge(line: Line) -> str:
        """Empty a whole line."""
        return did(f"purged {line}")

    return [read_gauge, open_valve, purge]
