"""Fifty requests to the plant's agent, and the call each one asks for.

Invariant: nothing of these sentences is known to the agent, its examples, its training or its tests.
"""

from typing import Any

from bench.demo_tasks import DemoTask

_PHRASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Tell me how strongly line {line} vibrates.", "read_sensor", {"sensor": "vibration"}),
    ("What temperature does line {line} have at the moment?", "read_sensor", {"sensor": "temperature"}),
    ("How fast is line {line} going?", "read_sensor", {"sensor": "speed"}),
    ("How worn is the tool of line {line}?", "read_sensor", {"sensor": "wear"}),
    ("I want to know the wear of line {line}.", "read_sensor", {"sensor": "wear"}),
    ("Is line {line} getting warm? Give me its temperature.", "read_sensor", {"sensor": "temperature"}),
    ("Let line {line} run at 35 percent.", "set_speed", {"percent": 35}),
    ("Please reduce line {line} to 20 %.", "set_speed", {"percent": 20}),
    ("Speed line {line} up to 90 percent.", "set_speed", {"percent": 90}),
    ("Line {line}: 60 percent of full speed from now on.", "set_speed", {"percent": 60}),
    ("Bring line {line} to a halt.", "stop_line", {}),
    ("You can put line {line} back into operation.", "start_line", {}),
    ("Somebody is at line {line}, stop it at once.", "stop_line", {}),
    ("Everybody is clear, get line {line} moving again.", "start_line", {}),
)
_LABELS = ("Which lot number is on the label at camera {camera}?", "Have a look at the label of camera {camera}.")
TASKS = (
    *(
        DemoTask(text.format(line=n), tool, {**args, "line": n} if tool == "read_sensor" else {"line": n, **args})
        for n in (1, 2, 3)
        for text, tool, args in _PHRASES
    ),
    *(DemoTask(text.format(camera=n), "read_label", {"camera": n}) for text in _LABELS for n in (1, 2, 3)),
    DemoTask("Does any line report an alarm?", "list_alarms", {}),
    DemoTask("Show what is out of limits in the plant.", "list_alarms", {}),
)
assert len(TASKS) == 50
