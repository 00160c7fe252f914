"""A replay asks what was asked then, of whom it is told, and does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.decide import Speaker
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.replay import Replay
from edge_agent.agent.rules import Policy
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.agent import plant
from tests.fakes import LocalTools, ScriptedModel

ADA = Subject("ada", ["operator"], 1.0)


@tool()
def read_label(camera: int) -> str:
    """Read a label."""
    return "lot A7"


class Bench:
    def __init__(self, store: Store, *says: str) -> None:
        self.transcripts, self.tools = Transcripts(store), LocalTools(read_label, plant.set_speed, plant.read_sensor)
        self.then = ScriptedModel(*says)
        self._loop = AgentLoop(self.then, self.tools, self.transcripts, lambda *_: True)

    async def did(self) -> Task:
        await self._loop.accept("t", "read the label, then line 2 at 40", ADA)
        return await self._loop.run("t")

    def replay(self, model: ScriptedModel, allowed: Any = lambda *_: True) -> Replay:
        def named(name: str) -> Speaker:
            return Speaker(model=name or "first")

        return Replay(model, self.tools, self.transcripts, allowed, Policy, named)


SAYS = ("read_label(camera=2)", "set_speed(line=2, percent=40.0)", "set_speed(line=2, percent=40.0)", "none()")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = Store(tmp_path / "s.db", migrations)
    yield Bench(store, *SAYS)
    store.close()


async def test_the_same_model_is_asked_the_same_and_decides_the_same_with_nothing_done(bench: Bench) -> None:
    task = await bench.did()
    assert (task.state, [step.role for step in task.steps if step.role in ("model", "check")]) == (
        "succeeded",
        ["model", "model", "check", "model"],
    )
    calls, again = list(bench.tools.calls), ScriptedModel(*SAYS)
    told = await bench.replay(again).run("t")
    assert (told.same, len(told.decisions), bench.tools.calls) == (4, 4, calls)
    assert [(r.prefix, r.prompt, r.grammar) for r in again.asked] == [
        (r.prefix, r.prompt, r.grammar) for r in bench.then.asked
    ]
    assert {request.priority for request in again.asked} == {3}


async def test_a_decision_is_asked_again_with_the_numbers_that_were_known_then(tmp_path: Path) -> None:
    says = ('read_sensor(sensor="vibration", line=2)', "set_speed(line=2, percent=40.0)", "none()")
    with contextlib.closing(Store(tmp_path / "s.db", migrations)) as store:
        bench, again = Bench(store, *says), ScriptedModel(*says)
        await bench.did()
        await bench.replay(again).run("t")
        assert [request.grammar for request in again.asked] == [request.grammar for request in bench.then.asked]
        assert len({request.grammar for request in again.asked}) > 1


async def test_what_differs_is_told_and_changes_nothing_of_what_is_asked_next(bench: Bench) -> None:
    await bench.did()
    other = ScriptedModel("read_label( camera = 2 )", "stop_line(line=2)", "gibberish", "none()")
    told = await bench.replay(other).run("t", "other")
    assert (told.model, told.same) == ("other", 2)
    assert [(each.role, each.same, each.says) for each in told.decisions] == [
        ("model", True, "read_label( camera = 2 )"),
        ("model", False, "stop_line(line=2)"),
        ("check", False, "gibberish"),
        ("model", True, "none()"),
    ]
    assert [request.prompt for request in other.asked] == [request.prompt for request in bench.then.asked]


async def test_only_a_task_that_ended_and_was_decided_by_a_model_is_replayed(bench: Bench) -> None:
    replay = bench.replay(ScriptedModel())
    with pytest.raises(Refused, match="no task that has ended"):
        await replay.run("t")
    await bench.transcripts.add(Task("w", "workflow w", ADA, 1.0, "succeeded"))
    task = await bench.transcripts.get("w")
    assert task is not None
    await bench.transcripts.append(task, Step("plan", "workflow: w"))
    with pytest.raises(Refused, match="no model decided anything"):
        await replay.run("w")
