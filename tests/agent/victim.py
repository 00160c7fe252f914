"""Runs one task whose tool kills its own process right after its effect: `python victim.py DIR TOOL`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from tests.agent import plant
from tests.fakes import LocalTools, ScriptedModel

SAYS = {"stamp": 'stamp(text="x")', "read_sensor": 'read_sensor(sensor="vibration", line=1)'}


class Deadly(LocalTools):
    def __init__(self, folder: Path) -> None:
        super().__init__(*plant.ALL)
        self._folder = folder

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        with (self._folder / "effects").open("a") as effects:
            effects.write(f"{name}\n")
        if not (self._folder / "spare").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().call(name, args, timeout_s)


async def main(folder: Path, tool: str) -> None:
    store = Store(folder / "state.db", migrations)
    model = ScriptedModel(*([] if await left(store) else [SAYS[tool]]))
    loop = AgentLoop(model, Deadly(folder), Transcripts(store), lambda *_: True)
    await loop.accept("t1", "do it", Subject("ada", ["admin"], 1.0))
    task = await loop.run("t1")
    (folder / "end").write_text(f"{task.state}\n{task.error}\n{task.runs}")
    store.close()


async def left(store: Store) -> bool:
    """A decision is on disk; that of a reading call is made again, as the call is."""
    task = await Transcripts(store).get("t1")
    return task is not None and bool(task.steps)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
