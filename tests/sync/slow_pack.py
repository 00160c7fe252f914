"""A tool that never ends by itself, and says that it has begun and whether it went on."""

from pathlib import Path

from edge_agent.agent.tool import Tool, tool


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    @tool(risk="act", idempotent=False, timeout_s=60)
    def press() -> str:
        """Press for ever."""
        import threading

        (state / "began").touch()
        threading.Event().wait()
        return ""

    @tool()
    def look() -> str:
        """Look."""
        return "calm"

    return [press, look]
