"""No act is made while an interlock forbids it or cannot be asked, and every other act is."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.agent.interlock import Interlocked
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.rules import PolicyFile
from edge_agent.agent.tool import Range, ToolError, tool
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.agent.workflow_run import Runner
from edge_agent.errors import Refused, Retry
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.agent.test_work import rig
from tests.fakes import LocalTools, ScriptedModel

ADA = Subject("ada", ["operator"], 1.0)
GUARD = """
approval_s = 60
[[interlocks]]
name = "guard-open"
tools = ["start_*"]
look.guard = { tool = "read_guard", args = { line = "${args.line}" } }
never = "guard.open"
hint = "close the guard"
"""


class Plant:
    """Lines with guards; what a guard shows may be anything."""

    def __init__(self, path: Path, text: str, guards: dict[int, Any]) -> None:
        path.write_text(text)
        self.started: list[int] = []

        @tool()
        def read_guard(line: int) -> dict:  # type: ignore[type-arg]
            """Read a guard."""
            if isinstance(guards[line], Exception):
                raise guards[line]
            return {"open": guards[line]}

        @tool(risk="act")
        def start_line(line: int) -> str:
            """Start a line."""
            self.started.append(line)
            return "started"

        self.inner = LocalTools(read_guard, start_line)
        self.tools = Interlocked(self.inner, PolicyFile(path))


async def start(tools: Interlocked, line: int) -> bool:
    try:
        return await tools.call("start_line", {"line": line}, 1.0) == "started"
    except Refused as refused:
        return "interlock guard-open" not in refused.message


states = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.booleans(), max_size=2),
    st.sampled_from([ToolError("no signal"), Retry("the runner died"), Refused("busy")]),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(1, 3), states, min_size=3, max_size=3), st.lists(st.integers(1, 3), max_size=8))
def test_a_line_starts_only_when_its_own_guard_is_seen_to_be_closed(guards: dict[int, Any], asked: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = Plant(Path(folder) / "policy.toml", GUARD, guards)

        async def all_of_them() -> list[bool]:
            return [await start(made.tools, line) for line in asked]

        wanted = [guards[line] is False for line in asked]
        assert asyncio.run(all_of_them()) == wanted
        assert made.started == [line for line, may in zip(asked, wanted, strict=True) if may]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("interlocks = 3", r"Expected `array`"),
        ("[[interlocks]]\nname='a'\ntools=['*']\nnever='1 +'", "Failed to parse"),
        ("[[interlocks]]\nname='a'\ntools=['*']\nnevr='true'", "nevr"),
        ("[[interlocks", "cannot be used: Expected"),
        ("[[interlocks]]\nname='a'\ntools=['*']\nnever='args.line + 1'", "neither true nor false"),
        (
            "[[interlocks]]\nname='a'\ntools=['*']\nnever='x'\nlook.x={tool='start_line', args={line=1}}",
            "more than read",
        ),
        ("[[interlocks]]\nname='a'\ntools=['*']\nnever='x'\nlook.x={tool='gone'}", "unknown tool gone"),
    ],
)
async def test_a_file_or_a_rule_that_cannot_be_used_forbids_acts_and_holds_up_no_reading(
    tmp_path: Path, text: str, told: str
) -> None:
    made = Plant(tmp_path / "policy.toml", text, {1: False})
    with pytest.raises(Refused, match=told):
        await made.tools.call("start_line", {"line": 1}, 1.0)
    assert await made.tools.call("read_guard", {"line": 1}, 1.0) == {"open": False}
    (tmp_path / "policy.toml").unlink()
    assert await start(made.tools, 1)


class Heat(TypedDict):
    """A reading."""

    value: Annotated[float, Range(-40.0, 400.0, "°C")]
    unit: str


@pytest.mark.parametrize(
    ("value", "unit", "starts"),
    [(60.0, "°C", True), (90.0, "°C", False), (-999.0, "°C", False), (70.0, "°F", False), ("off", "°C", False)],
)
async def test_a_reading_that_breaks_what_its_tool_declares_is_no_reason_to_start(
    tmp_path: Path, value: Any, unit: str, starts: bool
) -> None:
    """A thermocouple that is not connected gives -999, which is not below 80."""

    @tool()
    def read_heat() -> Heat:
        """Read the heat."""
        return {"value": value, "unit": unit}

    @tool(risk="act")
    def start_line(line: int) -> str:
        """Start a line."""
        return "started"

    rule = "name='interlock guard-open'\ntools=['*']\nnever='heat.value > 80.0'\nlook.heat={tool='read_heat'}"
    (tmp_path / "policy.toml").write_text(f"[[interlocks]]\n{rule}")
    tools = Interlocked(LocalTools(read_heat, start_line), PolicyFile(tmp_path / "policy.toml"))
    assert await start(tools, 1) is starts


async def test_the_rule_stands_before_tasks_workflows_and_direct_calls(tmp_path: Path) -> None:
    made = Plant(tmp_path / "policy.toml", GUARD, {1: True})
    store = Store(tmp_path / "t.db", migrations)
    model = ScriptedModel("start_line(line=1)")
    loop = AgentLoop(model, made.tools, Transcripts(store), lambda *_: True)
    await loop.accept("t", "start line 1", ADA)
    task = await loop.run("t")
    assert task.error.startswith("start_line is not done: the interlock guard-open forbids it (close the guard)")
    assert "guard-open forbids it" in model.asked[1].prompt
    runner = Runner(made.tools, Transcripts(store), lambda *_: True)
    text = 'workflow: w\nversion: "1"\nsteps:\n  - {id: s, tool: start_line, args: {line: 1}}\n'
    await runner.accept("r", text, {}, ADA)
    assert "guard-open forbids it" in (await runner.run("r")).error
    store.close()
    async with rig(tmp_path / "s.db") as device:
        device.work._tools = made.tools
        with pytest.raises(Refused, match="guard-open forbids it"):
            await device.work.call("start_line", {"line": 1}, ADA)
    assert made.started == []


def test_how_long_an_ask_stands_is_in_the_same_file(tmp_path: Path) -> None:
    file = PolicyFile(tmp_path / "policy.toml")
    assert file.now().approval_s == 3600.0
    (tmp_path / "policy.toml").write_text(GUARD)
    assert file.now().approval_s == 60.0
