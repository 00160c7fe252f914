"""A workflow tried without a device: the device's own runner, over tools that answer with samples or as they are told.

Invariants: no call is made; approvals and interlocks are the device's own code, asked of the simulated tools. How long
a run takes is worked out, not waited for: by what calls of each tool are known to take, in the order that the runner
begins them; the longest time is the sum of all timeouts.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.agent import policy
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import render
from edge_agent.agent.interlock import Interlocked
from edge_agent.agent.rules import PolicyFile
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.transcript import Step as Entry
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.agent.workflow import Workflow, sample
from edge_agent.agent.workflow_run import AT, Runner, alone, begins, slots
from edge_agent.store import Store
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey


class Told(msgspec.Struct, frozen=True):
    """What the simulation is told: inputs, what a step's tool (or a tool that an interlock looks at) gives, steps that
    fail and with what, whether dangerous calls are approved, the policy file, seconds that calls of each tool take, and
    the event that starts it."""

    inputs: dict[str, Any] = {}
    results: dict[str, Any] = {}
    fail: dict[str, str] = {}
    approve: bool = True
    policy: Path | None = None
    times: Mapping[str, float] = {}
    event: dict[str, Any] = {}


class _Simulated:
    def __init__(self, flow: Workflow, specs: Sequence[ToolSpec], told: Told) -> None:
        held = {"check": None, "rate": ""}  # samples do not read back, and nothing is called in truth
        self._specs, self._told = [msgspec.structs.replace(spec, **held) for spec in specs], told
        self._tools = {step.id: step.tool for step in flow.steps}

    async def specs(self) -> Sequence[ToolSpec]:
        return self._specs

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        at, told = AT.get(), self._told
        step = at.partition("[")[0]
        own = self._tools.get(step) == name
        if own and step in told.fail:
            raise ToolError(told.fail[step])
        returns = next(spec.returns for spec in self._specs if spec.name == name)
        value = sample(returns)
        if value is None and returns is not None:  # what is in it is not declared
            value = {"dict": {}, "list": []}.get(returns.kind)
        value = value | {key: args[key] for key in args.keys() & value.keys()} if isinstance(value, dict) else value
        given = told.results.get(at, told.results.get(step, value)) if own else told.results.get(name, value)
        return value | given if isinstance(value, dict) and isinstance(given, dict) else given


async def simulate(
    flow: Workflow, text: str, specs: Sequence[ToolSpec], told: Told, subject: Subject, allowed: policy.Allowed
) -> dict[str, Any]:
    """Path, calls by risk, and times in seconds of one simulated run; `about_s` is None where nothing is known of any
    call, `unknown` counts those that nothing is known of. Raises Refused."""
    slept = list[tuple[str, float]]()

    async def sleep(seconds: float) -> None:
        slept.append((AT.get(), seconds))

    boss = Subject("simulate", ["admin"], 0.0)
    rules = PolicyFile(told.policy or Path("/nonexistent"))
    with tempfile.TemporaryDirectory(prefix="simulate-") as state:
        store = Store(Path(state) / "runs.db", migrations)
        transcripts, tools = Transcripts(store), Interlocked(_Simulated(flow, specs, told), rules)
        approvals = Approvals(SigningKey.generate(), lambda *_: True)
        runner = Runner(tools, transcripts, allowed, clock=time.time, sleep=sleep, approvals=approvals)
        await runner.accept("simulated", text, told.inputs, subject, told.event)
        while (task := await runner.run("simulated")).state == "waiting":
            step = approvals.give(task, task.steps[-1].text, told.approve, boss, time.time())
            await transcripts.append(task, step)
        store.close()
    by_name, by_id = {spec.name: spec for spec in specs}, {step.id: step for step in flow.steps}
    calls, took, worst, unknown = Counter[str](), dict[str, list[float]](), 0.0, 0
    for at, seconds in slept:
        took.setdefault(at.partition("[")[0], []).append(seconds)
        worst += seconds
    for entry in (entry for entry in task.steps if entry.role == "intent" and entry.call):
        spec, id = by_name[entry.call.name], entry.at.partition("[")[0]  # type: ignore[union-attr]
        known = told.times.get(spec.name, spec.typical_s)
        took.setdefault(id, []).append(known)
        unknown += not known
        calls[spec.risk] += 1
        worst += by_id[id].timeout_s or spec.timeout_s
    about = estimate(flow, by_name, took)
    return {
        "workflow": flow.workflow,
        "version": flow.version,
        "state": task.state,
        "error": task.error,
        "result": task.result,
        "path": [_shown(entry) for entry in task.steps if entry.role in ("tool", "approval")],
        "calls": dict(calls),
        "about_s": round(about, 3) if about or not unknown else None,
        "unknown": unknown,
        "worst_s": min(worst, flow.timeout_s),
    }


def _shown(entry: Entry) -> dict[str, Any]:
    state = "skipped" if entry.call is None else "succeeded" if entry.ok else "failed"
    if entry.role == "approval":
        state = "approved" if entry.ok else "denied"
    call, text = render(entry.call) if entry.call else "", entry.text if entry.role == "tool" else ""
    return {"step": entry.at, "state": state, "call": call, "text": text, "result": entry.result}


def estimate(flow: Workflow, specs: Mapping[str, ToolSpec], took: Mapping[str, Sequence[float]]) -> float:
    """Seconds that a run takes whose steps make calls of so many seconds each; a step that is not there makes none."""
    left, over, now = flow.order(), set[str](), 0.0
    running = dict[str, float]()  # when each ends
    by_id = {step.id: step for step in flow.steps}
    while left or running:
        for step in begins(flow, specs, left, [by_id[id] for id in running], over):
            left.remove(step)
            beside = 1 if alone(flow, specs, step) else slots(flow)
            running[step.id] = now + _packed(took.get(step.id, ()), beside) + sum(took.get(step.on_error, ()))
        ended = min(running, key=running.__getitem__)
        now = running.pop(ended)
        over.add(ended)
    return now


def _packed(calls: Sequence[float], beside: int) -> float:
    free = [0.0] * beside
    for seconds in calls:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)
