"""A task's decisions asked again, of the same model or another: where would it have decided otherwise?

Invariants: nothing is read and nothing is done: what the model reads at each decision is the transcript up to there,
with the results that came then, so one decision that differs changes nothing of what the next one is asked. Tools are
those of the task's subject as they are now; earlier tasks that an endpoint is shown as examples are left out, as this
one may be among them by now. Such requests go after everybody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from edge_agent.agent import policy, taint
from edge_agent.agent.act import Tools
from edge_agent.agent.decide import Model, Speaker, next_call, understood
from edge_agent.agent.rules import Policy
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Task, Transcripts
from edge_agent.errors import Refused

TIMEOUT_S = 60.0
PRIORITY = 3


class Again(msgspec.Struct, frozen=True):
    """A decision at step `n` of the transcript: what was said then, what is said now, and whether it comes to the same.

    Times are in ms.
    """

    n: int
    role: str
    said: str
    says: str
    same: bool
    ms: float
    ms_now: float


class Replayed(msgspec.Struct, frozen=True):
    """How often a model decided as before."""

    task: str
    model: str
    adapter: str
    digest: str
    same: int
    decisions: list[Again]


class Replay:
    """Replays finished tasks; `named` gives what speaks under a name (empty: what speaks now), or raises Refused."""

    def __init__(
        self,
        model: Model,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        rules: Callable[[], Policy],
        named: Callable[[str], Speaker],
    ) -> None:
        self._model, self._tools, self._transcripts = model, tools, transcripts
        self._allowed, self._rules, self._named = allowed, rules, named

    async def run(self, id: str, name: str = "") -> Replayed:
        """Raises Refused (no such task, not over, no decisions, no such model), Retry."""
        task = await self._transcripts.get(id)
        if task is None or task.state in ("running", "waiting"):
            raise Refused(f"{id} is no task that has ended", "outrider task list")
        speaker, rules = self._named(name), self._rules()
        usable = policy.usable(await self._tools.specs(), task.subject, self._allowed)
        found = []
        for n, step in enumerate(task.steps):
            if step.role in ("model", "check"):
                found.append(await self._again(task, n, usable, speaker, rules))
        if not found:
            raise Refused(f"no model decided anything in {id}", "a workflow has its decisions in its file")
        same = sum(each.same for each in found)
        return Replayed(id, speaker.model, speaker.title, speaker.digest, same, found)

    async def _again(self, task: Task, n: int, specs: Sequence[ToolSpec], speaker: Speaker, rules: Policy) -> Again:
        step, until = task.steps[n], msgspec.structs.replace(task, steps=task.steps[:n])
        read = taint.turns(until, {spec.name: spec for spec in specs}, hide=step.role == "check")
        fit = rules.fit(specs, until, hide=step.role == "check")
        asked = next_call(speaker, specs, read, calls=rules.calls, priority=PRIORITY, fit=fit)
        piece = await self._model.generate(asked, TIMEOUT_S)
        says = understood(piece.text, speaker, fit, read, rules)
        return Again(n, step.role, step.text, says, _calls(step.text) == _calls(says), step.ms, piece.total_s * 1e3)


def _calls(said: str) -> Any:
    return taint.decisions(said) or said.strip()
