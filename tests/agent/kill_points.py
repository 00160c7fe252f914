"""Does the same six-step work again and again, each time killed at its next point and then resumed.

`python -m tests.agent.kill_points DIR workflow|parallel|task|plan|danger|asks|denied` prints one JSON object: for each
point how the work ended, what effects there were, how many calls were made. A point lies before and after each write
of the journal and each effect. `danger` is a task of three dangerous calls that are approved as they are asked for,
`denied` a workflow whose dangerous step is denied and whose `on_error` presses instead, `parallel` one with three acts
at a time, `plan` a task with three calls in each decision, `asks` one with three dangerous calls in one. The children
are forked, so that Python starts once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from edge_agent.agent.approval import Approvals
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.rules import Budget, Policy
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.agent.workflow_run import Runner
from edge_agent.engines.base import Generate, Piece
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey
from tests.fakes import LocalTools

STEPS = 6
ADA = Subject("ada", ["operator"], 1.0)
FLOW = 'workflow: press\nversion: "1"\nsteps:\n' + "".join(
    f"  - {{id: s{n}, tool: press, args: {{number: {n}}}, depends_on: [{f's{n - 1}' if n > 1 else ''}]}}\n"
    for n in range(1, STEPS + 1)
)
DENIED = """workflow: denied
version: "1"
steps:
  - {id: s1, tool: press, args: {number: 1}}
  - {id: blow, tool: explode, depends_on: [s1], on_error: instead, retry: {times: 3, delay_s: 0}}
  - {id: instead, tool: press, args: {number: 2}}
  - {id: s3, tool: press, args: {number: 3}, depends_on: [blow]}
"""
PARALLEL = """workflow: parallel
version: "1"
parallel: 3
steps:
  - {id: a, tool: press, args: {number: 1}}
  - {id: b, tool: press, args: {number: 2}}
  - {id: c, tool: press, args: {number: 3}}
  - {id: d, tool: press, depends_on: [a], for_each: "[4, 5]", args: {number: "${item}"}}
  - {id: e, tool: press, depends_on: [b, c, d], args: {number: 6}}
"""
FLOWS = {"workflow": FLOW, "denied": DENIED, "parallel": PARALLEL}


class Points:
    """Kills this process at the point it is told."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Journal(Transcripts):
    def __init__(self, store: Store, point: Points) -> None:
        super().__init__(store)
        self._point = point

    async def append(self, task: Task, step: Step, later: bool = False) -> None:
        self._point()
        await super().append(task, step, later)
        self._point()


class Says:
    """One press after the other, by what stands in the transcript."""

    def __init__(self, steps: int, at_once: int = 1) -> None:
        self._steps, self._at_once = steps, at_once

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        n = request.prompt.count("press(number=") + 1
        calls = [f"press(number={m})" for m in range(n, min(n + self._at_once, self._steps + 1))]
        return Piece("\n".join(calls) or "none()", done=True, finish="stop", output_tokens=5)


async def work(kind: str, folder: Path, at: int) -> None:
    point = Points(at)

    @tool(risk="danger" if kind in ("danger", "asks") else "act", idempotent=False)
    def press(number: int, key: str) -> str:
        """Press a button, once for each key."""
        with (folder / "calls").open("a") as calls:
            calls.write(f"{number}\n")
        point()
        file = folder / "effects"
        done = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
        if key not in done:
            with file.open("a") as effects:
                effects.write(f"{key} {number}\n")
        point()
        return f"pressed {number}"

    @tool(risk="danger", idempotent=False)
    def explode() -> str:
        """Press everything at once."""
        with (folder / "effects").open("a") as effects:
            effects.write("- exploded\n")
        return "gone"

    store = Store(folder / "state.db", migrations)
    tools, journal = LocalTools(press, explode), Journal(store, point)
    approvals = Approvals(SigningKey.from_seed(bytes(32)), lambda *_: True)
    if kind in ("task", "danger", "plan", "asks"):
        loop = AgentLoop(
            Says(3 if kind in ("danger", "asks") else STEPS, 3 if kind in ("plan", "asks") else 1),
            tools,
            journal,
            lambda *_: True,
            rules=lambda: Policy(budget=Budget(steps=20)),
            approvals=approvals,
        )
        await loop.accept("t", "press all", ADA)
        while (task := await loop.run("t")).state == "waiting":
            step = approvals.give(task, task.steps[-1].text, True, ADA, time.time())
            await journal.append(task, step)
    else:
        runner = Runner(tools, journal, lambda *_: True, approvals=approvals)
        await runner.accept("t", FLOWS[kind], {}, ADA)
        while (task := await runner.run("t")).state == "waiting":
            step = approvals.give(task, task.steps[-1].text, False, ADA, time.time())
            await journal.append(task, step)
    (folder / "end").write_text(f"{task.state} {task.error}".strip())
    store.close()


def forked(kind: str, folder: Path, at: int) -> int:
    """How the child ended: 0, or minus the signal."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            asyncio.run(work(kind, folder, at))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path, kind: str) -> None:
    found: list[dict[str, Any]] = []
    for at in itertools.count(1):
        folder = root / str(at)
        folder.mkdir()
        if not (ended := forked(kind, folder, at)):
            break
        again = forked(kind, folder, 0)
        effects = [line.split()[1] for line in (folder / "effects").read_text().splitlines()]
        calls = (folder / "calls").read_text().split()
        end = (folder / "end").read_text()
        found.append({"at": at, "killed": ended, "again": again, "end": end, "effects": effects, "calls": len(calls)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
