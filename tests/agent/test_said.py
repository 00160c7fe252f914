"""An act gets no number that nobody said: which numbers a request says, and what that leaves of the tools."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.grammar import build
from edge_agent.agent.rules import Policy
from edge_agent.agent.said import narrow, unsaid
from edge_agent.agent.spoken import said
from edge_agent.agent.tool import Param, Range, ToolSpec, declare
from edge_agent.agent.transcript import Exchange, Step, Task
from edge_agent.wire.grants import Subject


def set_speed(line: Annotated[int, Range(1, 3)], percent: Annotated[int, Range(0, 100, "%")]) -> None:
    """Set a line's speed."""


def stop_line(line: Annotated[int, Range(1, 3)]) -> None:
    """Stop a line."""


def heat(oven: Annotated[int, Range(1, 9)], degrees: Annotated[float, Range(0, 300, "°C")]) -> None:
    """Heat an oven."""


def read_sensor(line: Annotated[int, Range(1, 3)]) -> dict[str, Any]:
    """Read a line's sensor."""
    return {}


SPEED, STOP, HEAT = (declare(each, risk="act").spec for each in (set_speed, stop_line, heat))
READ = declare(read_sensor).spec
FREE = None


def task(text: str, *steps: Step, before: tuple[str, ...] = ()) -> Task:
    earlier = [Exchange("before", each, "") for each in before]
    return Task("t", text, Subject("ada", ["operator"], 0.0), 0.0, steps=list(steps), before=earlier)


def left(spec: ToolSpec, about: Task) -> dict[str, list[float] | None] | None:
    """By parameter the numbers that a call may have (FREE: any), or None when there can be no call."""
    found = narrow([spec], about)
    return {param.name: param.values or FREE for param in found[0].params} if found else None


@pytest.mark.parametrize(
    ("text", "stop", "speed"),
    [
        ("stop the line", None, None),
        ("stop right now", None, None),
        ("that's all, stop the line", None, None),
        ("no one cares, stop it", None, None),
        ("stop line 2", [2], None),
        ("halt number two please", [2], None),
        ("line one off", [1], None),
        ("shut line III down", [3], None),
        ("die dritte Linie anhalten", [3], None),
        ("arrête la ligne deux", [2], None),
        ("Para la tercera línea", [3], None),
        ("Line 7 off", [7], None),
        ("stopp teh thrid line", [3], None),
        ("the line over there is seen to stop", None, None),
        ("stop lines 1 and 3", [1, 3], [1, 3]),
        ("stop lines 1 to 3", [1, 2, 3], [1, 2, 3]),
        ("stop all lines", FREE, None),
        ("stop the lines", FREE, None),
        ("both of them off", FREE, None),
        ("set the second line to forty-two percent", [2], [2, 42]),
        ("three quarters on line one", [1], [1, 75]),
        ("3 flat out!", [3], [3, 100]),
        ("three-quarter speed on line 2", [2], [2, 75]),
        ("line 2 at 1/2 speed", [2], [2, 50]),
        ("a fifth of full speed for the third line", [3], [3, 20]),
        ("slow line 2 by ten", [2], FREE),
        ("half speed everywhere", FREE, [50]),
        ("all lines to forty", FREE, [40]),
        ("stop lines 1,2 and 3", [1, 2, 3], [1, 2, 3]),
        ("from line 1 to line 3 off", [1, 2, 3], [1, 2, 3]),
        ("line 3 half speed", [3], [3, 50]),
        ("line 2 to 40.5 percent", [2], [2, 40, 41]),
        ("line 2 to ¾", [2], [2, 75]),
        ("line 3.5 off", None, None),
        ("line two at once, stop it once more, at once", [2], None),
        ("stop the line, it is due for service", None, None),
        ("tomorrow we need line 2", [2], None),
    ],
)
def test_what_is_acted_on_and_a_percentage_are_what_was_said(text: str, stop: Any, speed: Any) -> None:
    about = task(text)
    reached = left(STOP, about)
    assert (reached and reached["line"]) == stop or (stop is FREE and reached == {"line": FREE})
    if speed is None and "slow" not in text:
        assert left(SPEED, about) is None
    else:
        assert (left(SPEED, about) or {})["percent"] == speed


def test_the_only_number_may_be_what_is_acted_on_where_a_word_stands_for_the_amount() -> None:
    assert left(SPEED, task("everything on 3")) == {"line": FREE, "percent": FREE}


def test_an_amount_that_may_be_converted_is_free_once_some_number_is_said_for_it() -> None:
    assert left(HEAT, task("heat oven 4 to 400 fahrenheit")) == {"oven": [4], "degrees": FREE}
    assert left(HEAT, task("heat oven 4")) is None


@pytest.mark.parametrize(
    ("text", "param", "values"),
    [
        ("order 1,200 of 4711", Param("order", "int"), [1200, 4711]),
        ("-5 as offset", Param("offset", "int", low=-10, high=10), [-5]),
        ("offset: minus five", Param("offset", "int", low=-10, high=10), [-5]),
        ("beep twice", Param("times", "int", low=1, high=9), [2]),
        ("gain 0.125", Param("gain", "float", low=0, high=10), [0.125]),
        ("gain two and a half", Param("gain", "float", low=0, high=10), [2, 2.5, 5]),
        ("valve to 50 %", Param("opening", "float", low=0, high=1), [0.5]),
        ("open it halfway", Param("opening", "float", low=0, high=1), [0.5]),
        ("to 350 Kelvin", Param("celsius", "float", low=0, high=100), FREE),
        ("for a minute", Param("time", "int", unit="s"), FREE),
        ("tomorrow", Param("time", "int", unit="min"), FREE),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, param: Param, values: list[float] | None) -> None:
    assert left(ToolSpec("do", "Does.", [param], risk="act"), task(text)) == {param.name: values}


def test_an_optional_number_that_nobody_said_is_left_out_and_a_list_or_a_dict_is_held_to_its_numbers() -> None:
    line = Param("line", "int", low=1, high=3)
    beep = ToolSpec("beep", "Beeps.", [msgspec.structs.replace(line, required=False)], risk="act")
    many = ToolSpec("stop", "Stops.", [Param("lines", "list", items=line)], risk="act")
    deep = ToolSpec("stop", "Stops.", [Param("at", "dict", fields=[line])], risk="act")
    assert narrow([beep], task("beep")) == [msgspec.structs.replace(beep, params=[])]
    assert narrow([many, deep], task("stop the line")) == []
    assert unsaid([many], []) == ["line"]
    fit = narrow([many, deep], task("stop 1 and 3"))
    assert [build([each]).count('"1" | "3"') for each in fit] == [2, 1]
    for call in ({"lines": [1, 2]}, {"at": {"line": 2}}):
        with pytest.raises(CallError, match="nobody said"):
            validate(Call("stop", call), [fit["at" in call]])
    assert narrow([many], task("stop the lines")) == [many]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 10**400, "9", None])
def test_what_is_no_number_in_a_result_is_no_number_to_act_on(odd: Any) -> None:
    came = Step("tool", "", call=Call("list", {}), result={"alarms": [odd, 2]})
    assert left(STOP, task("stop it", came)) == {"line": [2]}


def test_a_result_says_numbers_in_what_its_tool_declares_and_thousands_of_them_leave_the_model_free() -> None:
    alarms = Param("result", "list", items=Param("", "choice", choices=["line 1", "line 3"]))
    reads = ToolSpec("alarms", "Alarms.", [], returns=alarms)
    came = Step("tool", "", call=Call("alarms", {}), result=["line 3", "line 2"])
    assert narrow([reads, STOP], task("stop what is in alarm", came))[1].params[0].values == [3]
    order = ToolSpec("cancel", "Cancels.", [Param("order", "int")], risk="act")
    many = Step("tool", "", call=Call("list", {}), result=list(range(10_000)))
    fit = narrow([order, STOP], task("cancel the oldest", many))
    assert [spec.params[0].values for spec in fit] == [[], [1, 2, 3]]
    assert len(build(fit)) < 1000
    said_many = task(" ".join(map(str, range(99))))
    assert narrow([order, STOP], said_many) == [order, STOP]


def test_what_was_said_of_all_holds_for_the_next_request_that_says_no_number() -> None:
    assert left(STOP, task("ok, now stop them", before=("start all lines",))) == {"line": FREE}
    assert left(STOP, task("ok, now stop line 2", before=("start all lines",))) == {"line": [2]}


def test_what_only_reads_is_never_held_back() -> None:
    assert narrow([READ], task("how is it?")) == [READ]


def test_a_note_with_numbers_in_it_gives_them_other_names() -> None:
    spec = ToolSpec("start", "Starts.", [Param("line", "int", about="1: filling, 2: packing")], risk="act")
    assert narrow([spec], task("start packing")) == [spec]


def test_results_and_earlier_requests_say_numbers_and_texts_of_others_do_not() -> None:
    came = Step("tool", "", call=Call("list", {}), result={"alarms": [{"line": 3, "note": "stop line 1"}], "on": True})
    assert left(STOP, task("stop what is in alarm", came)) == {"line": [3]}
    assert left(SPEED, task("slow down what is in alarm", came)) == {"line": [3], "percent": FREE}
    assert left(STOP, task("stop it", before=("how is line 2?",))) == {"line": [2]}


def test_grammar_and_validation_hold_a_call_to_what_was_said() -> None:
    fit = narrow([SPEED], task("line 2 to forty"))
    assert '("2")' in build(fit)
    assert '"40"' in build(fit)
    assert "INT" not in build(fit)
    assert validate(Call("set_speed", {"line": 2, "percent": 40}), fit).args == {"line": 2, "percent": 40}
    with pytest.raises(CallError, match="nobody said"):
        validate(Call("set_speed", {"line": 2, "percent": 41}), fit)
    with pytest.raises(CallError, match="out of range: 1 to 3"):
        validate(Call("stop_line", {"line": 7}), narrow([STOP], task("line 7 off")))


def test_the_policy_turns_it_off_and_names_what_was_missing() -> None:
    about = task("stop the line")
    assert Policy().fit([STOP, READ], about) == [READ]
    assert unsaid([STOP, READ], [READ]) == ["line"]
    assert Policy(unsaid="act").fit([STOP, READ], about) == [STOP, READ]


@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.text(alphabet="abcxyz ,.", max_size=8))
def test_every_number_in_digits_is_said(numbers: list[int], between: str) -> None:
    text = f" {between.strip(' ,.')} and line ".join(map(str, numbers))
    assert set(map(float, numbers)) <= set(said(text).numbers)


@given(st.text(max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    assert all(math.isfinite(number) for number in said(text).numbers)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Put two on 60. Hang on, 62.", {2, 62}),
        ("Set line 2 to 35. And line 1 to 45, no, make that 54.", {1, 2, 35, 54}),
        ("stop 1... wait, it's 2", {2}),
        ("Stop line 1, wait, and start line 3", {1, 3}),
        ("Stop line 1. Wait. Then start line 2", {1, 2}),
        ("Set line 2 to 60, sorry for bothering, and line 3 to 40", {2, 3, 40, 60}),
        ("Set line 1 to 50, sorry I'm late, line 2 to 30", {1, 2, 30, 50}),
        ("stop 2 - sorry, and also 3", {2, 3}),
        ("Set line 2 to 40, wait, then to 60", {2, 40, 60}),
        ("Lot 12, No. 45", {12, 45}),
        ("Stop line 2, then, oh no, 3 is hot as well", {2, 3}),
        ("line 2 at 60, no wait, line 3", {3, 60}),  # of the same noun
        ("line 1 to 40, and line 2 to 40, sorry, 50", {1, 2, 40, 50}),
        ("Linie 2 auf 40, nein, 45 Prozent", {2, 45}),
        ("stop line 1 - no, 2 - and start 3", {2, 3}),
        ("stop line 2, no more than that, and 3", {2, 3}),
        ("line 1 and 2, please, make it 40 percent", {1, 2, 40}),
        ("There are 3 lines. No problem, stop 2", {2, 3}),
        ("line 2 to 50, wait 3 minutes, then stop it", {2, 3, 50}),
        ("line 2 to 50; no, really, do it", {2, 50}),
    ],
)
def test_a_number_that_is_taken_back_is_not_said(text: str, numbers: set[float]) -> None:
    assert said(text).numbers == numbers


def test_a_long_row_of_marks_and_digits_is_read_at_once() -> None:
    began = time.process_time()
    for text in ("1" + "," * 4000, "line 2 " + "-" * 4000, "12 ----- " * 400, "1, " * 1300, "no, " * 1000 + "2"):
        said(text)
    assert time.process_time() - began < 5
