"""What a tool declares, the device holds it to: rate, permission, result, read-back, undo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

from edge_agent.agent import policy
from edge_agent.agent.act import Acts, Limited, perform, shaped, undoable, within_rate
from edge_agent.agent.calls import Call
from edge_agent.agent.tool import Check, Range, Tool, ToolError, Undo, tool
from edge_agent.agent.toolrunner import load
from edge_agent.agent.transcript import Task, Transcripts, migrations
from edge_agent.errors import Fatal, Refused
from edge_agent.store import Store
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed
from tests.fakes import LocalTools

ADA = Subject("ada", ["operator"], 1.0)
Celsius = Annotated[float, Range(-40, 125, "°C")]


class Reading(TypedDict):
    """A value and its unit."""

    value: Celsius
    unit: str


@pytest.fixture
async def transcripts(tmp_path: Path) -> AsyncIterator[Transcripts]:
    store = Store(tmp_path / "state.db", migrations)
    yield Transcripts(store)
    store.close()


class Valve:
    """A valve whose position can stick, and its tools."""

    def __init__(self, *, sticks: bool = False, moves_by: int = 100) -> None:
        self.position, self.sticks, self.moves_by, self.wanted = 0, sticks, moves_by, 0

    def tools(self, **declared: Any) -> list[Tool]:
        @tool()
        def read_valve(valve: int) -> dict:  # type: ignore[type-arg]
            """Read a valve."""
            self.position += max(-self.moves_by, min(self.moves_by, self.wanted - self.position))
            return {"value": self.position}

        @tool(risk="act", **declared)
        def set_valve(valve: int, percent: int) -> dict:  # type: ignore[type-arg]
            """Set a valve."""
            before = self.position
            if not self.sticks:
                self.wanted = percent
            return {"before": before}

        return [read_valve, set_valve]


READ_BACK = Check("read_valve", {"valve": "$valve"}, equals="$percent", within=1.0)
UNDO = Undo("set_valve", {"valve": "$valve", "percent": "$result.before"})


async def act(transcripts: Transcripts, tools: LocalTools, name: str, now: float = 100.0, **args: Any) -> Any:
    acts = Acts(tools, transcripts, lambda *_: True, lambda: now)
    task = await transcripts.add(Task("t", "do", ADA, 1.0))
    spec = next(spec for spec in await tools.specs() if spec.name == name)
    return await acts.act(task, spec, Call(name, args), 5.0)


async def test_a_rate_holds_over_tasks_and_a_restart_and_says_when(tmp_path: Path) -> None:
    tools = LocalTools(*Valve().tools(rate="2/min"))
    spec = (await tools.specs())[1]
    for now in (100.0, 130.0):
        store = Store(tmp_path / "state.db", migrations)
        assert (await act(Transcripts(store), tools, "set_valve", now, valve=1, percent=5)).ok
        store.close()
    store = Store(tmp_path / "state.db", migrations)
    transcripts = Transcripts(store)
    late = await act(transcripts, tools, "set_valve", 140.0, valve=1, percent=5)
    assert not late.ok
    assert late.text == (
        "set_valve may be called 2/min, and was (it may be called again in 20 s, at 1970-01-01 00:02:40 UTC)"
    )
    assert len(tools.calls) == 2
    task = await transcripts.get("t")
    assert task is not None
    assert [step.role for step in task.steps] == ["intent", "tool"] * 2 + ["tool"], "no intent of a call not made"
    with pytest.raises(Limited):
        await within_rate(transcripts, spec, 90.0)  # a clock set back frees nothing, and locks nothing for ever
    await within_rate(transcripts, spec, 150.1)
    assert (await act(transcripts, tools, "read_valve", 140.0, valve=1)).ok, "another tool has its own rate"
    store.close()


@pytest.mark.parametrize("rate", ["6/minute", "0/min", "six/min", "6"])
def test_a_rate_that_is_none_is_refused_when_it_is_declared(rate: str) -> None:
    with pytest.raises(TypeError, match="is not like 6/min"):
        Valve().tools(rate=rate)


def test_a_tools_own_permission_is_needed_beside_the_one_of_its_risk() -> None:
    spec = Valve().tools(permission="open:valve")[1].spec
    roles = {**SHIPPED_ROLES, "fitter": ["call:tool", "open:valve:set_*"], "opener": ["open:valve"]}
    grants = Grants(1, 0.0, 1e12, roles, [])

    def permit(subject: Subject, action: str, resource: str) -> bool:
        return allowed(grants, subject, action, resource, now=10.0)

    for role, may in (("fitter", True), ("admin", True), ("operator", False), ("opener", False)):
        subject = Subject("eve", [role], 1.0)
        assert policy.usable([spec], subject, permit) == ([spec] if may else [])
        if not may:
            with pytest.raises(policy.Forbidden, match=r"it needs (open:valve|call:tool) for set_valve"):
                policy.check(spec, subject, permit)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"value": 21, "unit": "°C"}, ""),
        ({"value": 400.0, "unit": "°C"}, "400 °C, out of its range -40 to 125: it is not used"),
        ({"value": 70.0, "unit": "°F"}, "is in '°F', where °C is declared"),
        ({"value": float("nan"), "unit": "°C"}, "which is no float"),
        ({"value": float("inf"), "unit": "°C"}, "which is no float"),
        ({"value": 10**400, "unit": "°C"}, "which is no float"),
        ({"unit": "°C"}, "has no value"),
    ],
)
async def test_a_result_out_of_its_declaration_is_an_error_for_tasks_too(
    transcripts: Transcripts, value: dict[str, Any], told: str
) -> None:
    @tool()
    def read_oven() -> Reading:
        """Read the oven."""
        return value  # type: ignore[return-value]

    step = await act(transcripts, LocalTools(read_oven), "read_oven")
    assert (step.ok, step.result is None) == (not told, bool(told))
    assert told in step.text


def test_lists_are_checked_to_their_last_item() -> None:
    @tool()
    def read_ovens() -> list[Celsius]:
        """Read all ovens."""
        return []

    assert shaped("read_ovens", read_ovens.spec.returns, [1, 2.5]) == [1.0, 2.5]
    with pytest.raises(ToolError, match="126 °C, out of its range"):
        shaped("read_ovens", read_ovens.spec.returns, [1, 126])


async def test_an_effect_that_does_not_read_back_is_an_error(transcripts: Transcripts) -> None:
    for valve, percent, told in (
        (Valve(), 40, ""),
        (Valve(sticks=True), 1, ""),  # within the tolerance
        (Valve(sticks=True), 40, "set_valve(valve=1, percent=40) was made, but read_valve value read back 0 where 40"),
    ):
        step = await act(transcripts, LocalTools(*valve.tools(check=READ_BACK)), "set_valve", valve=1, percent=percent)
        assert (step.ok, step.text.startswith(told)) == (not told, True)
        assert step.result == {"before": 0}, "what the tool gave is kept: its effect can be undone"


async def test_a_slow_effect_is_waited_for_and_a_reading_that_fails_is_told(transcripts: Transcripts) -> None:
    slow = Check("read_valve", {"valve": "$valve"}, equals="$percent", wait_s=5.0)
    step = await act(transcripts, LocalTools(*Valve(moves_by=15).tools(check=slow)), "set_valve", valve=1, percent=40)
    assert step.ok
    broken = LocalTools(*Valve().tools(check=READ_BACK), fail={"read_valve": ToolError("the line is cut")})
    step = await act(transcripts, broken, "set_valve", valve=1, percent=40)
    assert not step.ok
    assert "was made, but read_valve value cannot be read back: the line is cut" in step.text


async def test_a_direct_call_is_held_to_the_same(transcripts: Transcripts) -> None:
    tools = LocalTools(*Valve(sticks=True).tools(check=READ_BACK))
    spec, call = (await tools.specs())[1], Call("set_valve", {"valve": 1, "percent": 50})
    with pytest.raises(ToolError, match="read back 0 where 50 was set"):
        await perform(tools, spec, call, "k", ADA, 5.0)


async def test_a_tool_with_a_subject_is_told_who_asks(transcripts: Transcripts) -> None:
    @tool(risk="act")
    def sign(text: str, subject: dict[str, Any]) -> str:
        """Sign a text."""
        return f"{text} by {subject['name']}, {subject['roles'][0]}"

    assert [param.name for param in sign.spec.params] == ["text"], "the model cannot say who asks"
    assert (await act(transcripts, LocalTools(sign), "sign", text="done")).result == "done by ada, operator"


async def test_undo_takes_an_effect_back_once_from_the_last_on(transcripts: Transcripts) -> None:
    valve = Valve()
    tools = LocalTools(*valve.tools(undo=UNDO))
    for percent in (30, 70):
        await act(transcripts, tools, "set_valve", valve=1, percent=percent)
        valve.tools()[0].function(valve=1)
    task = await transcripts.get("t")
    assert task is not None
    acts, specs = Acts(tools, transcripts, lambda *_: True, lambda: 100.0), await tools.specs()
    assert undoable(task, specs) == [3, 1]
    step = await acts.undo(task, 3)
    assert (step.ok, step.call, valve.wanted) == (True, Call("set_valve", {"valve": 1, "percent": 30}), 30)
    assert await acts.undo(task, 3) == step
    assert undoable(task, specs) == [1]
    await acts.undo(task, 1)
    assert (valve.wanted, len(tools.calls), undoable(task, specs)) == (0, 4, [])
    for gone in (0, 3 + 2, 99):
        with pytest.raises(Refused, match="no effect that can be taken back"):
            await acts.undo(task, gone)


def test_undo_killed_at_every_point_takes_each_effect_back_exactly_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.tools.undo_points", str(tmp_path)]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], timeout=120, check=True, capture_output=True)
    found = json.loads(done.stdout)
    assert len(found) == 12, "two undone steps: before and after each write, and around each effect"
    for run in found:
        assert (run["killed"], run["again"], run["left"]) == (-9, 0, []), run
        assert run["undone"] == ["2", "1"], run
    assert any(run["calls"] > 2 for run in found), "no undo was made again: the key was not put to the test"


def orphans(state: Path, options: dict[str, str]) -> list[Tool]:
    """A pack whose tools name others that are not there, or that do more than read."""
    if options.get("kind") == "undo":
        return Valve().tools(undo=Undo("reset_valve", {}))
    return Valve().tools(check=Check("set_valve" if options.get("kind") == "acts" else "look", {}, equals=1))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("undo", "set_valve is undone by reset_valve, which is no tool"),
        ("acts", "set_valve is checked by set_valve, which is no reading tool"),
        ("look", "set_valve is checked by look, which is no reading tool"),
    ],
)
def test_a_pack_that_names_a_tool_that_is_not_there_does_not_load(tmp_path: Path, kind: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        load(f"{__name__}:orphans", tmp_path, {"kind": kind})


def test_a_hook_names_arguments_that_there_are() -> None:
    with pytest.raises(TypeError, match=r"\$pump is no argument of it: valve, percent"):
        Valve().tools(check=Check("read_valve", {"valve": "$pump"}, equals=1))
    with pytest.raises(TypeError, match="nothing to check or to undo"):
        tool(risk="read", undo=UNDO)(_reads)


def _reads(valve: int) -> int:
    """Read."""
    return valve
