"""Undoes two steps of a task, killed at its next point again and again, and then resumed.

`python -m tests.tools.undo_points DIR` prints one JSON object: for each point what was undone, in how many calls.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from edge_agent.agent.act import Acts, undoable
from edge_agent.agent.calls import Call
from edge_agent.agent.tool import Undo, tool
from edge_agent.agent.transcript import Step, Task, migrations
from edge_agent.store import Store
from tests.agent.kill_points import ADA, Journal, Points
from tests.fakes import LocalTools


async def work(folder: Path, at: int) -> None:
    point = Points(at)

    @tool(risk="act", idempotent=False)
    def release(number: int, key: str) -> str:
        """Release a button, once for each key."""
        with (folder / "calls").open("a") as calls:
            calls.write(f"{number}\n")
        point()
        file = folder / "undone"
        done = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
        if key not in done:
            with file.open("a") as effects:
                effects.write(f"{key} {number}\n")
        point()
        return f"released {number}"

    @tool(risk="act", idempotent=False, undo=Undo("release", {"number": "$number"}))
    def press(number: int) -> str:
        """Press a button."""
        return f"pressed {number}"

    store = Store(folder / "state.db", migrations)
    tools, journal = LocalTools(release, press), Journal(store, point)
    task = await journal.add(Task("t", "press", ADA, 1.0))
    for number in (1, 2)[len(task.steps) :]:  # done before: no point lies there
        await super(Journal, journal).append(task, Step("tool", "pressed", Call("press", {"number": number})))
    acts, specs = Acts(tools, journal, lambda *_: True, lambda: 1.0), await tools.specs()
    while left := undoable(task, specs):
        await acts.undo(task, left[0])
    (folder / "left").write_text(json.dumps(left))
    store.close()


def forked(folder: Path, at: int) -> int:
    """How the child ended: 0, or minus the signal."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            asyncio.run(work(folder, at))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path) -> None:
    found: list[dict[str, Any]] = []
    for at in itertools.count(1):
        folder = root / str(at)
        folder.mkdir()
        if not (killed := forked(folder, at)):
            break
        again = forked(folder, 0)
        undone = [line.split()[1] for line in (folder / "undone").read_text().splitlines()]
        left, calls = json.loads((folder / "left").read_text()), len((folder / "calls").read_text().split())
        found.append({"killed": killed, "again": again, "undone": undone, "left": left, "calls": calls})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
