"""What a request makes an act depend on is held to the reading."""

from __future__ import annotations

import pytest

from edge_agent.agent.calls import Call
from edge_agent.agent.condition import known
from edge_agent.agent.rules import Policy
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Step, Task
from edge_agent.wire.grants import Subject

LINE = Param("line", "int", low=1, high=3)
READ = ToolSpec("read_sensor", "Read a sensor.", [Param("sensor", "str"), LINE])
STOP = ToolSpec("stop_line", "Stop a line.", [LINE], risk="act")
SPECS = [READ, STOP]


def task(text: str, *values: object, of: str = "read_sensor") -> Task:
    made = Task("t", text, Subject("ann", ["operator"], 0.0), 0.0)
    made.steps += [Step("tool", call=Call(of, {"sensor": "wear", "line": 2}), result=value) for value in values]
    return made


@pytest.mark.parametrize(
    ("text", "limit", "above"),
    [
        ("if line 2 is hotter than 60, stop it", 60, True),
        ("Stop line 1 if it's above sixty degrees.", 60, True),
        ("if the wear of 3 exceeds 80 % stop it", 80, True),
        ("stop 2 if it shakes > 3", 3, True),
        ("check how much line 2 shakes, over 3 mm/s and you stop it", 3, True),
        ("line 2 slower than 50? stop it", 50, False),
        ("Should the temperature be less than 45, stop line 2", 45, False),
        ("Falls Linie 2 unter 55 Grad hat, halte sie an", 55, False),
        ("Si la ligne 3 dépasse 65 degrés, arrête-la", 65, True),
        ("Si la línea 1 tiene un desgaste mayor del 50 %, párala", 50, True),
        ("if line 1 is at most 2.5 stop it, otherwise leave it alone", 2.5, False),
    ],
)
def test_an_act_waits_for_the_reading_and_is_not_made_where_it_does_not_hold(
    text: str, limit: float, above: bool
) -> None:
    yes, no = (limit + 1, limit - 1) if above else (limit - 1, limit + 1)
    assert known(task(text), SPECS) == "unread"
    assert known(task(text, {"sensor": "wear", "line": 2, "value": yes}), SPECS) == "met"
    assert known(task(text, {"sensor": "wear", "line": 2, "value": no}), SPECS) == "unmet"
    assert known(task(text, no, yes), SPECS) == "met"
    assert Policy().fit(SPECS, task(text)) == [READ]
    assert Policy().fit(SPECS, task(text, no)) == [READ]
    assert [spec.name for spec in Policy().fit(SPECS, task(text, yes))] == ["read_sensor", "stop_line"]
    assert STOP in Policy(conditions="act", unsaid="act").fit(SPECS, task(text, no))


@pytest.mark.parametrize(
    "text",
    [
        "stop line 2",
        "set line 2 to more than 50",
        "run line 1 at less than 40 %",
        "if you can, stop line 2",
        "if it's above 60 stop it, and if it's above 80 stop all of them",
    ],
)
def test_what_has_no_one_comparison_is_left_to_the_model(text: str) -> None:
    assert known(task(text), SPECS) == "none"


def test_what_else_is_to_be_done_is_open_once_it_was_read() -> None:
    text = "if line 2 is hotter than 60 stop it, otherwise stop line 1"
    assert known(task(text), SPECS) == "unread"
    assert known(task(text, 20), SPECS) == "met"


def test_both_have_to_hold_where_the_request_says_both() -> None:
    text = "if lines 1 and 2 are both under 60, stop line 3"
    assert known(task(text, 70, 50), SPECS) == "unmet"
    assert known(task(text, 55, 50), SPECS) == "met"


def test_only_one_number_that_a_reading_gave_counts() -> None:
    text = "if line 2 is hotter than 60, stop it"
    for value in ("90", True, None, [90], {"line": 2}, {"a": 90, "b": 91}):
        assert known(task(text, value), SPECS) == "unread"
    assert known(task(text, 90, of="stop_line"), SPECS) == "unread"
