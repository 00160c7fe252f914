"""A tool pack for the daemon's tests."""

from pathlib import Path
from typing import Annotated, Any, Literal

from edge_agent.agent.tool import Range, Tool, ToolError, tool


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    """A sensor, a counter that keeps its count on disk, a tool that fails and one that never ends."""

    @tool()
    def read_sensor(sensor: Literal["speed", "wear"], line: Annotated[int, Range(1, 2)]) -> dict[str, Any]:
        """Read a sensor."""
        return {"sensor": sensor, "line": line, "value": 7.5}

    @tool(risk="act", idempotent=False)
    def stamp(text: str) -> int:
        """Stamp a product and say how many were stamped."""
        with (state / "stamps").open("a") as file:
            file.write(text + "\n")
        return len((state / "stamps").read_text().splitlines())

    @tool()
    def jam() -> str:
        """Always fails."""
        raise ToolError("the feeder is jammed")

    @tool(timeout_s=0.5)
    def hang() -> str:
        """Never returns."""
        import threading

        threading.Event().wait()
        return ""

    return [read_sensor, stamp, jam, hang]
