"""The ten requests of the demo, and how each is judged: by the calls that were made and by the plant's own state.

Invariant: nothing of these sentences is known to the agent, its examples or its tests.
"""

from __future__ import annotations

from typing import Any

import msgspec


class DemoTask(msgspec.Struct, frozen=True):
    """A request, the call that does it, and what the result must show (a key and a value, or a key alone)."""

    text: str
    tool: str
    args: dict[str, Any]


TASKS = (
    DemoTask("What's the vibration on line 2 right now?", "read_sensor", {"sensor": "vibration", "line": 2}),
    DemoTask("Slow line 3 down to 40 percent.", "set_speed", {"line": 3, "percent": 40}),
    DemoTask("Stop line 1, please.", "stop_line", {"line": 1}),
    DemoTask("Maintenance is done, start line 1 again.", "start_line", {"line": 1}),
    DemoTask("Are there any alarms?", "list_alarms", {}),
    DemoTask("Read the label in front of camera 2.", "read_label", {"camera": 2}),
    DemoTask("How hot is line 1?", "read_sensor", {"sensor": "temperature", "line": 1}),
    DemoTask("Set the speed of line 2 to 75 percent.", "set_speed", {"line": 2, "percent": 75}),
    DemoTask("What does the label at camera 3 say?", "read_label", {"camera": 3}),
    DemoTask("Line 2 has to stop immediately!", "stop_line", {"line": 2}),
)
CUT_TASKS = (
    "What is the temperature of line 2?",
    "Read the label at camera 1.",
    "Set line 3 to 55 percent.",
    "Which alarms are active?",
    "What's the vibration of line 3?",
)
LONG_TASK = "Read the label in front of camera 1."
