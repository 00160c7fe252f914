"""The task that docs/agent.md shows step by step is what the loop does with those words of the model."""

from __future__ import annotations

import re
from pathlib import Path

from bench.plant_eval import NOW, World
from edge_agent.agent.calls import render
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.transcript import Step, Transcripts, migrations
from edge_agent.store import Store
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed
from models.toolcaller.evaluate.plant_cases import PlantCase
from tests.fakes import ScriptedModel

PAGE = Path(__file__).parents[2] / "docs/agent.md"


def shown(step: Step) -> tuple[str, str]:
    return step.role, render(step.call) if step.role == "intent" and step.call else step.text


async def test_the_trace_in_the_page_is_true(tmp_path: Path) -> None:
    block = re.findall(r"```trace\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    (_, text), *steps = [tuple(line.split(maxsplit=1)) for line in block.splitlines()]
    grants, store = Grants(1, 0.0, NOW + 1e9, SHIPPED_ROLES, []), Store(tmp_path / "s.db", migrations)
    loop = AgentLoop(
        ScriptedModel(*[said for role, said in steps if role in ("model", "check")]),
        World(tmp_path, PlantCase("single", text)),
        Transcripts(store),
        lambda subject, action, name: allowed(grants, subject, action, name, now=NOW),
    )
    await loop.accept("t", text, Subject("ada", ["operator"], 0.0))
    task = await loop.run("t")
    store.close()
    assert (task.state, [shown(step) for step in task.steps]) == ("succeeded", steps)
