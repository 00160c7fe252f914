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
        ('if the 2" line is hotter than 60, stop it and the 3" valve', 60, True),
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
        "If you can, set line 2 to at most 55",
        "Line 2 should run under 60, set it to 55",
        "it once ran over 60; set line 2 to 50",
        "When you start line 2, keep it under 40 percent",
        "If it is past 10, stop line 2",
        "if it runs for more than 3 hours stop line 2",
        "if line 2 is hot, set line 1 to more than 30",
        "if line 2 isn't hotter than 60, start it",
        "if the wear is no longer above 60, start it",
        "If the pressure is over 1,200 stop line 2",  # a thousand, or one and a bit?
        "If the pressure is over 1 200 stop line 2",
        "Remember: if the press is hotter than 80, call Ann",
        "the note says 'stop line 2 if it is hotter than 60', start line 3",
        "'stop line 2 if it's hotter than 60' says the note, start line 3",
    ],
)
def test_what_is_no_plain_condition_is_left_to_the_model(text: str) -> None:
    assert known(task(text), SPECS) == "none"


def test_what_else_is_to_be_done_is_open_once_it_was_read() -> None:
    for text in (
        "if line 2 is hotter than 60 stop it, otherwise stop line 1",
        "stop each line if it is hotter than 60",
        "check them; if one of the lines is hotter than 60 stop it",
    ):
        assert known(task(text), SPECS) == "unread"
        assert known(task(text, 20), SPECS) == "met"
    assert known(task("if line 2 is hotter than 60 stop it, otherwise ignore it", 20), SPECS) == "unmet"


def test_every_reading_has_to_hold_until_an_act_was_done() -> None:
    asked = task("if line 2 is hotter than 60, stop it", 45)
    asked.steps.append(Step("tool", call=Call("read_sensor", {"sensor": "speed", "line": 2}), result=80))
    assert known(asked, SPECS) == "unmet"
    asked = task("if line 2 is over 60, stop it, check it, then start line 3", 65)
    asked.steps.append(Step("tool", call=Call("stop_line", {"line": 2}), result=None))
    asked.steps.append(Step("tool", call=Call("read_sensor", {"sensor": "speed", "line": 2}), result=0))
    assert known(asked, SPECS) == "met"


def test_a_number_that_is_taken_back_is_no_limit() -> None:
    text = "if line 2 is above 60, no, 65, stop it"
    assert known(task(text, 62), SPECS) in ("none", "unmet")


def test_at_least_takes_the_number_itself_and_above_does_not() -> None:
    for text, met in (
        ("above 60", False),
        ("at least 60", True),
        ("> 60", False),
        (">= 60", True),
        ("under 60", False),
    ):
        assert (known(task(f"if line 2 is {text} stop it", 60), SPECS) == "met") is met


def test_a_reading_that_is_no_one_number_leaves_it_to_the_model() -> None:
    text = "if line 2 is hotter than 60, stop it"
    for value in ("90", True, None, [90], {"line": 2}, {"a": 90, "b": 91}):
        assert known(task(text, value), SPECS) == "none"
    assert known(task(text, {"value": 70, "age_s": 3}), SPECS) == "met"
    assert known(task(text, 90, of="stop_line"), SPECS) == "unread"


def test_what_is_said_for_later_is_judged_then() -> None:
    later = ToolSpec("schedule_request", "Later.", [Param("text", "str", later=True)], risk="act")
    fit = Policy().fit([*SPECS, later], task("At 22:00 stop line 2 if it is hotter than 60"))
    assert [spec.name for spec in fit] == ["read_sensor", "schedule_request"]
