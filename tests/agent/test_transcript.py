"""When a step is on disk: before what follows it changes anything, and with what the audit is told of it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.errors import Retry
from edge_agent.store import Connection, Store
from edge_agent.wire.grants import Subject
from tests.fakes import LocalTools, ScriptedModel

ADA = Subject("ada", ["admin"], 1.0)


class Full(Store):
    """Its disk is full while `full`; `writes` counts."""

    full, writes = False, 0

    async def write(self, work: Callable[[Connection], Any]) -> Any:
        self.writes += 1
        if self.full:
            await asyncio.sleep(0)
            raise Retry("the disk is full")
        return await super().write(work)


@tool()
def look(number: int) -> int:
    """Look at a gauge."""
    return number


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Full]:
    store = Full(tmp_path / "state.db", migrations)
    yield store
    store.close()


async def test_what_was_read_is_on_disk_before_an_act_and_its_intent_with_it(store: Full) -> None:
    seen: list[str] = []

    @tool(risk="act", idempotent=False)
    def press(number: int) -> str:
        """Press a button."""
        with sqlite3.connect(store.path) as beside:
            rows = beside.execute("SELECT body ->> 'role' FROM task_steps ORDER BY n")
            seen.extend(role for (role,) in rows)
        beside.close()
        return "pressed"

    model = ScriptedModel("look(number=1)", "look(number=2)", "press(number=2)", "none()")
    loop = AgentLoop(model, LocalTools(look, press), Transcripts(store), lambda *_: True)
    await loop.accept("t", "look, then press", ADA)
    assert (await loop.run("t")).state == "succeeded"
    assert seen == ["model", "intent", "tool"] * 2 + ["model", "intent"]


async def test_the_decision_after_a_reading_does_not_wait_for_its_commit(store: Full) -> None:
    transcripts = Transcripts(store)
    task = await transcripts.add(Task("t", "x", ADA, 1.0))
    for n in range(20):
        await transcripts.append(task, Step("tool", str(n)), later=True)
    assert store.writes == 1, "the event loop was not given up, so nothing was written"
    await transcripts.save(task)
    assert store.writes < 22, "what came meanwhile is written together"
    assert await Transcripts(store).get("t") == task


async def test_a_reading_that_found_the_disk_full_is_written_with_the_next_step_and_told_once(store: Full) -> None:
    transcripts, told = Transcripts(store), list[str]()
    transcripts.beside = lambda _db, _task, step: told.append(step.text)
    task = await transcripts.add(Task("t", "x", ADA, 1.0))
    store.full = True
    await transcripts.append(task, Step("tool", "read"), later=True)
    await asyncio.sleep(0.02)
    assert store.writes == 2
    with pytest.raises(Retry):
        await transcripts.append(task, Step("intent", "never"))
    assert [step.text for step in task.steps] == ["read"], "an intent that is not on disk is none"
    store.full = False
    await transcripts.append(task, Step("intent", "now"))
    kept = await Transcripts(store).get("t")
    assert kept is not None
    assert [step.text for step in kept.steps] == ["read", "now"] == told


async def test_what_came_of_an_act_stays_when_the_disk_is_full_and_is_told_when_it_no_longer_is(store: Full) -> None:
    transcripts, told = Transcripts(store), list[str]()
    transcripts.beside = lambda _db, _task, step: told.append(step.text)
    task = await transcripts.add(Task("t", "x", ADA, 1.0))
    await transcripts.append(task, Step("intent", "press"))
    store.full = True
    with pytest.raises(Retry):
        await transcripts.append(task, Step("tool", "pressed"))
    store.full = False
    seen = await transcripts.get("t")
    assert seen is not None
    assert [step.text for step in seen.steps] == ["press", "pressed"]
    await transcripts.save(seen)
    assert await Transcripts(store).get("t") == seen
    assert told == ["press", "pressed"]


async def test_whoever_asks_meanwhile_sees_every_step_once(store: Full) -> None:
    transcripts = Transcripts(store)
    task = await transcripts.add(Task("t", "x", ADA, 1.0))
    for n in range(30):
        await transcripts.append(task, Step("tool" if n % 2 else "model", str(n)), later=True)
        seen = await transcripts.get("t")
        assert seen is not None
        assert [step.text for step in seen.steps] == [str(n) for n in range(n + 1)]
