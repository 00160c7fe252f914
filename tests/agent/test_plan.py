"""Several calls of one decision: what runs together, what waits for what, what is kept when one of them fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import llguidance
import pytest

from edge_agent.agent import grammar
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import CallError, Ref, parse_all, render_all
from edge_agent.agent.chat import chat, said
from edge_agent.agent.decide import Speaker, next_call
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.plan import read
from edge_agent.agent.prompt import SYSTEM_ALL, Turn
from edge_agent.agent.rules import Budget, Policy
from edge_agent.agent.taint import turns
from edge_agent.agent.tool import ToolError, tool
from edge_agent.agent.transcript import Task, Transcripts, migrations
from edge_agent.engines.base import Piece
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey
from tests.agent.plant import Line
from tests.fakes import LocalTools, ScriptedModel

ADA = Subject("ada", ["admin"], 1.0)


class Fastest(TypedDict):
    line: int
    state: Literal["calm", "loud"]
    name: str


@tool()
def find_fastest() -> Fastest:
    """Find the fastest line."""
    return {"line": 3, "state": "loud", "name": "stop_line(line=1)"}


@tool()
def read_speed(line: Line) -> int:
    """Read a speed."""
    return 10 * line


@tool()
def broken(line: Line) -> int:
    """Never works."""
    raise ToolError("the sensor is off")


@tool(risk="act", idempotent=False)
def stop_line(line: Line, why: str = "") -> bool:
    """Stop a line."""
    return True


@tool(risk="danger", idempotent=False)
def purge(line: Line) -> bool:
    """Empty a line."""
    return True


TOOLS = (find_fastest, read_speed, broken, stop_line, purge)
SPECS = [each.spec for each in TOOLS]


class Timed(LocalTools):
    """Tools whose calls take a moment; keeps how many ran together, and the order in which they ended."""

    def __init__(self, takes_s: float = 0.02) -> None:
        super().__init__(*TOOLS)
        self.takes_s, self.now, self.together, self.ended = takes_s, 0, 0, list[str]()

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        self.now += 1
        self.together = max(self.together, self.now)
        try:
            await asyncio.sleep(self.takes_s)
            return await super().call(name, args, timeout_s)
        finally:
            self.now -= 1
            self.ended.append(f"{name}{args.get('line', '')}")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(tmp_path / "state.db", migrations)
    yield made
    made.close()


async def run(store: Store, *says: str, **policy: Any) -> tuple[Task, Timed, ScriptedModel]:
    tools, model = Timed(policy.pop("takes_s", 0.02)), ScriptedModel(*says)
    rules = Policy(**policy)
    approvals = Approvals(SigningKey.from_seed(bytes(32)), lambda *_: True)
    parts: Any = (model, tools, Transcripts(store), lambda *_: True)
    loop = AgentLoop(*parts, rules=lambda: rules, approvals=approvals)
    await loop.accept("t", "do it all", ADA)
    return await loop.run("t"), tools, model


async def test_readings_run_together_and_acts_in_their_order(store: Store) -> None:
    plan = "read_speed(line=1)\nread_speed(line=2)\nread_speed(line=3)\nstop_line(line=2)\nstop_line(line=1)"
    task, tools, model = await run(store, plan + "\nread_speed(line=2)\nread_speed(line=1)")
    assert task.state == "succeeded"
    assert tools.together == 3
    assert tools.ended == ["read_speed1", "read_speed2", "read_speed3", "stop_line2", "stop_line1"], (
        "said twice is once"
    )
    assert [step.at for step in task.steps if step.role == "tool"] == ["0.1", "0.2", "0.3", "0.4", "0.5"]
    assert model.asked[1].prompt.count("<|im_start|>tool") == 5


async def test_a_reading_after_an_act_sees_its_effect(store: Store) -> None:
    _, tools, _ = await run(store, "stop_line(line=2)\nread_speed(line=2)")
    assert tools.ended == ["stop_line2", "read_speed2"]
    assert tools.together == 1


async def test_a_reference_takes_a_typed_field_of_an_earlier_result(store: Store) -> None:
    task, tools, _ = await run(store, "find_fastest()\nread_speed(line=$1.line)\nstop_line(line=$1.line)")
    assert [call for call in tools.calls if call[0] != "find_fastest"] == [
        ("read_speed", {"line": 3}),
        ("stop_line", {"line": 3}),
    ]
    assert task.state == "succeeded"


async def test_no_act_takes_a_text_that_somebody_else_wrote_but_by_approval(store: Store) -> None:
    plan = "find_fastest()\nstop_line(line=2, why=$1.name)"
    task, tools, _ = await run(store, plan)
    assert tools.calls == [("find_fastest", {})]
    assert "why of stop_line would be text that somebody else wrote" in task.error
    task = Task("x", "do it all", ADA, 0.0, steps=task.steps[:-1])
    hidden = turns(task, {spec.name: spec for spec in SPECS}, hide=True)
    assert not any("stop_line(line=1)" in turn.text for turn in hidden)


async def test_where_the_policy_lets_a_person_decide_it_waits_for_one(store: Store) -> None:
    task, tools, _ = await run(store, "find_fastest()\nstop_line(line=2, why=$1.name)", untrusted="ask")
    assert (task.state, task.steps[-1].role, task.steps[-1].at) == ("waiting", "ask", "0.2")
    assert tools.calls == [("find_fastest", {})]


async def test_a_failure_keeps_what_succeeded_drops_what_depends_and_asks_again(store: Store) -> None:
    plan = "read_speed(line=1)\nbroken(line=2)\nread_speed(line=$2)\nstop_line(line=3)"
    task, tools, model = await run(store, plan, *["stop_line(line=3)"] * 2)
    assert sorted(tools.ended) == ["broken2", "read_speed1", "stop_line3"]
    told = [turn for turn in model.asked[1].prompt.split("<|im_start|>") if turn.startswith("tool")]
    assert [text.split("\n")[1].removesuffix("<|im_end|>") for text in told] == [
        "10",
        "error: the sensor is off",
        "error: not done",
        "error: not done",
    ]
    assert task.state == "succeeded"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("read_speed(line=1)\nlaunch()", "unknown tool launch"),
        ("read_speed(line=$1)", "0 calls stand before it"),
        ("read_speed(line=1)\nstop_line(line=$2)", "1 calls stand before it"),
        ("find_fastest()\nread_speed(line=$1.speed)", "the fields of find_fastest are: line, state, name"),
        ("read_speed(line=1)\nread_speed(line=9)", "out of range"),
        ("read_speed(line=1)\nread_speed(lane=$1)", "no argument lane"),
        ("\n".join(f"read_speed(line={n})" for n in range(9)), "at most 8 calls"),
    ],
)
async def test_a_plan_with_one_wrong_call_is_not_begun(store: Store, text: str, told: str) -> None:
    with pytest.raises(CallError, match=told):
        read(text, SPECS, 8)
    task, tools, model = await run(store, text)
    assert (tools.calls, task.state) == ([], "failed")
    assert model.asked[1].prompt.count("<|im_start|>tool") == text.count("\n") + 1


async def test_a_field_that_is_not_there_or_does_not_fit_stops_there(store: Store) -> None:
    task, tools, _ = await run(store, "find_fastest()\nread_speed(line=$1.state)")
    assert tools.calls == [("find_fastest", {})]
    assert "line of read_speed is a whole number, not 'loud'" in task.error


async def test_a_plan_with_a_dangerous_call_is_shown_before_it_is_asked_for(store: Store) -> None:
    task, tools, _ = await run(store, "read_speed(line=1)\nstop_line(line=1)\npurge(line=1)")
    shown = [step for step in task.steps if step.role == "plan"]
    assert [step.text for step in shown] == ["1. read_speed(line=1)\n2. stop_line(line=1)\n3. purge(line=1)"]
    assert (task.state, task.steps[-1].role) == ("waiting", "ask")
    assert task.error == "waits for an approval of purge(line=1): it is step 3 of 3 of the plan"
    assert [name for name, _ in tools.calls] == ["read_speed", "stop_line"]


async def test_three_wrong_calls_end_a_task_and_are_counted(store: Store) -> None:
    model = ScriptedModel("launch()", "gibberish", "read_speed(line=7)", "read_speed(line=1)")
    loop = AgentLoop(model, Timed(), Transcripts(store), lambda *_: True)
    await loop.accept("t", "do it all", ADA)
    task = await loop.run("t")
    assert task.error.startswith("given up after 3 wrong calls, the last one: line of read_speed is out of range")
    assert (loop.counts["unknown_tools"], loop.counts["wrong_calls"]) == (1, 2)


def test_the_grammar_takes_several_calls_with_references_and_parsing_gives_them_back() -> None:
    text = 'find_fastest()\nstop_line(line=$1.line, why="x")\nread_speed(line=$2)'
    lark = grammar.build(SPECS, several=8, refs=True)
    tokens = llguidance.LLTokenizer("byte")
    assert llguidance.LLMatcher(tokens, lark).consume_tokens(list(text.encode()))
    assert not llguidance.LLMatcher(tokens, grammar.build(SPECS, several=8)).consume_tokens(list(text.encode()))
    assert render_all(parse_all(text)) == text
    assert parse_all(text)[1].args["line"] == Ref(1, "line")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Stop line 1 and start line 2.", True),
        ("Stop line 1, then start line 2", True),
        ("Stop line 1.", False),
        ("If line 1 is hot, stop it and start line 2.", False),
    ],
)
def test_a_model_that_can_is_asked_for_all_calls_of_a_request_that_joins_several(text: str, whole: bool) -> None:
    for several in (True, False):
        asked = next_call(Speaker(several=several, shots=False), SPECS, [Turn("user", text)], calls=8)
        assert (SYSTEM_ALL in asked.prefix) == (whole and several)
        assert ("REF" in asked.grammar) == (whole and several)


def test_an_endpoint_is_told_of_calls_and_results_one_by_one_and_may_refer_too() -> None:
    piece = Piece("", done=True, calls=[("find_fastest", "{}"), ("stop_line", '{"line": "$1.line", "why": "$5 off"}')])
    text = said(piece)
    assert text == 'find_fastest()\nstop_line(line=$1.line, why="$5 off")'
    assert said(Piece("", done=True, calls=[("stop_line", '{"why": "$1"}')])) == 'stop_line(why="$1")'
    made = chat(SPECS, [Turn("user", "x"), Turn("assistant", text), Turn("tool", "a"), Turn("tool", "b")], several=True)
    assert made["parallel_tool_calls"] is True
    asked, one, two = made["messages"][2:]
    assert [call["id"] for call in asked["tool_calls"]] == [one["tool_call_id"], two["tool_call_id"]]
    assert (one["content"], two["content"]) == ("a", "b")
    assert '"$1.line"' in asked["tool_calls"][1]["function"]["arguments"]


async def test_no_act_of_a_plan_begins_after_the_tasks_time(store: Store) -> None:
    plan = "stop_line(line=1)\nstop_line(line=2)\nstop_line(line=3)"
    task, tools, _ = await run(store, plan, budget=Budget(seconds=0.5), takes_s=0.4)
    assert task.error == "out of time: 0.5 s"
    assert 1 <= len(tools.calls) < 3
