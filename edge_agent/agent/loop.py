"""The agent: one request, one linear transcript, one step at a time: decide → policy → act → validate → finish.

Invariants: every step is on disk before what follows it changes anything (transcript.py); whatever the model says
becomes effects (see plan.py, act.py), a text for the model, or an `Ended`, never a crash; budgets, wrong calls and
repeats always end a task. Nothing here picks a tool: the calls are the model's or there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

from edge_agent.agent import condition, output, policy, prompt, taint
from edge_agent.agent.act import Acts, Ended, Tools
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Answer, Call, CallError, Nothing, UnknownTool, render
from edge_agent.agent.conversation import Conversations
from edge_agent.agent.decide import Decided, Decider, Model, Speaker, next_call
from edge_agent.agent.energy import Meter
from edge_agent.agent.plan import Plan, Untrusted, read
from edge_agent.agent.rules import Policy
from edge_agent.agent.said import unsaid
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Step, Task, Transcripts
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.wire.grants import Subject

MAX_RUNS = 3
NOT_HERE = "is not for this request: it only asks, its condition is not met, or a number was not said that this needs"
COUNTED = ("wrong_calls", "unknown_tools", "checks", "votes", "routed")


def request(text: str) -> str:
    """The text as it is kept. Raises Refused when it is empty or too long."""
    if not text.strip() or len(text) > prompt.MAX_REQUEST:
        raise Refused("a request is empty or too long", f"write 1 to {prompt.MAX_REQUEST} characters")
    return text.strip()


class AgentLoop:
    """Runs tasks; any number at a time, each `run` in its own asyncio task. `counts` is for the metrics."""

    def __init__(
        self,
        model: Model,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        *,
        rules: Callable[[], Policy] = Policy,
        clock: Callable[[], float] = time.time,
        speakers: Callable[[], Sequence[Speaker]] = lambda: [Speaker()],
        approvals: Approvals | None = None,
    ) -> None:
        self._model, self._tools, self._transcripts = model, tools, transcripts
        self._allowed, self._rules, self._clock, self._speakers = allowed, rules, clock, speakers
        self._acts = Acts(tools, transcripts, allowed, clock, approvals)
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
        self._decider = Decider(model, transcripts, speakers, clock, self.counts)
        self._conversations = Conversations(transcripts.store, model, speakers)
        self._meter = Meter(lambda: rules().watts)

    async def warm(self) -> None:
        """Have the model read the preamble of all tools, so that a first task finds it read; an endpoint is not asked.

        Raises Retry, Refused.
        """
        speaker = self._speakers()[0]
        if speaker.endpoint:
            return
        asked = next_call(speaker, await self._tools.specs(), [], max_tokens=1)
        await self._model.generate(asked, self._rules().budget.seconds)

    async def accept(self, id: str, text: str, subject: Subject, priority: int = 1, conversation: str = "") -> Task:
        """Save a new task; asking again with the same id gives the one there is. Raises Refused."""
        return await self._transcripts.add(self.task(id, text, subject, priority, conversation))

    def task(self, id: str, text: str, subject: Subject, priority: int = 1, conversation: str = "") -> Task:
        """A new task, to be saved. Raises Refused."""
        return Task(id, request(text), subject, self._clock(), priority=priority, conversation=conversation)

    async def undo(self, task: Task, n: int) -> Step:
        """Take the effect of an ended task's step back, once. Raises Refused, Retry."""
        try:
            return await self._acts.undo(task, n)
        except Ended as end:
            raise Refused(end.error, "look at the device") from None

    async def run(self, id: str, new: Task | None = None) -> Task:
        """Run an accepted (or `new`) task until it is over or waits, from wherever its transcript stands.

        Raises Refused for an unknown id.
        """
        task = await self._transcripts.begin(id, self._conversations.begin, new)
        if task is None:
            raise Refused(f"there is no task {id}", "accept it first")
        if task.state == "running":
            self._meter.since()
            deadline = time.monotonic() + self._rules().budget.seconds
            try:
                specs = await self._tools.specs()
                await self._resume(task, specs, deadline)
                while True:
                    await self._step(task, specs, deadline)
            except Ended as end:
                task.state, task.error = end.state, end.error
                task.answer, task.withheld = output.shown(end.answer, self._rules())
                task.result = None if task.withheld else task.result
            except OutriderError as error:
                task.state, task.error = "failed", str(error)
            task.joules += self._meter.since()
            task.finished = self._clock()
            await self._transcripts.save(task)
        if task.state != "waiting":
            with contextlib.suppress(Retry):  # a full disk: what is remembered of a task is no part of its end
                await self._remember(task)
        return task

    async def _remember(self, task: Task) -> None:
        if task.conversation and task.state != "waiting":
            await self._conversations.add(task)
            await self._conversations.fold(task, self._rules().window)
        if any(each.endpoint for each in self._speakers()):
            await self._decider.recall.keep(task)

    async def _step(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Decide → policy → act → validate. Raises Ended."""
        rules, usable = self._rules(), policy.usable(specs, task.subject, self._allowed)
        task.joules += self._meter.since()
        decided = await self._decider.decide(task, usable, rules, deadline)
        try:
            calls = conclude(task, decided, usable, rules)
        except UnknownTool as error:
            known = any(spec.name == error.name for spec in usable)
            return await self._wrong(task, CallError(f"{error.name} {NOT_HERE}") if known else error)
        except CallError as error:
            return await self._wrong(task, error)
        await self._carry(task, Plan(decided.k, calls, usable), decided.why, deadline)
        check_repeats(task, rules.repeats)

    async def _carry(self, task: Task, plan: Plan, why: str, deadline: float) -> None:
        """Make the calls of a decision: readings together, acts in order; one that is dangerous is shown with all."""
        if plan.dangers and not any(step.role == "plan" and step.at == str(plan.k) for step in task.steps):
            shown = "\n".join(f"{n}. {render(call)}" for n, call in enumerate(plan.calls, 1))
            await self._transcripts.append(task, Step("plan", shown, ts=self._clock(), at=str(plan.k)))
        while ready := plan.ready(task.steps):
            if time.monotonic() >= deadline:
                raise Ended("failed", error=f"out of time: {self._rules().budget.seconds:g} s")
            first, *beside = [self._call(task, plan, n, why, deadline) for n in ready]
            if not beside:
                await first  # no tasks of their own for the most frequent case
            for problem in await asyncio.gather(first, *beside, return_exceptions=True) if beside else ():
                if problem is not None:
                    raise problem

    async def _call(self, task: Task, plan: Plan, n: int, why: str, deadline: float) -> None:
        at = plan.at(n)
        try:
            call = plan.filled(n, task.steps)
        except Untrusted as error:
            if self._rules().untrusted != "ask":
                return await self._wrong(task, error, at)
            call, why = error.call, str(error)
        except CallError as error:
            return await self._wrong(task, error, at)
        spec = plan.specs[call.name]
        if spec.risk == "danger" and at:
            why = why or f"it is step {n} of {len(plan.calls)} of the plan"
        await self._act(task, spec, call, deadline, at, "" if spec.risk == "read" else why)

    async def _wrong(self, task: Task, error: CallError, at: str = "") -> None:
        """Tell the model. Raises Ended when it was wrong too often."""
        self.counts["unknown_tools" if isinstance(error, UnknownTool) else "wrong_calls"] += 1
        await self._transcripts.append(task, Step("tool", str(error), ok=False, ts=self._clock(), at=at), later=True)
        wrong = sum(step.role == "tool" and step.call is None for step in task.steps)
        if wrong >= self._rules().wrong_calls:
            raise Ended("failed", error=f"given up after {wrong} wrong calls, the last one: {error}")

    async def _resume(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Settle calls that waited, or that a crash cut off before their result. Raises Ended."""
        if task.runs > MAX_RUNS:
            raise Ended("failed", error=f"given up: it was cut off {MAX_RUNS} times")
        for step in {step.at: step for step in task.steps}.values():
            if step.role in ("intent", "ask", "approval") and (call := step.call):
                gone = ToolSpec(call.name, "", [], idempotent=False)
                spec = next((spec for spec in specs if spec.name == call.name), gone)
                await self._act(task, spec, call, deadline, step.at)

    async def _act(self, task: Task, spec: ToolSpec, call: Call, deadline: float, at: str, why: str = "") -> None:
        limit = max(0.1, min(spec.timeout_s, deadline - time.monotonic()))
        step = await self._acts.act(task, spec, call, limit, at, why)
        if step.ok:
            task.result = step.result


def conclude(task: Task, decided: Decided, specs: Sequence[ToolSpec], rules: Policy) -> list[Call]:
    """The calls to make. Raises CallError, and Ended when the model is done: failed if nothing worked or the last thing
    went wrong."""
    decisions = read(decided.text, decided.fit, rules.calls)
    if calls := [decision for decision in decisions if isinstance(decision, Call)]:
        return calls
    rounds = taint.rounds(task.steps)
    answers = [each.text for step, _ in rounds for each in taint.decisions(step.text) if isinstance(each, Answer)]
    said = " ".join(answers) if isinstance(decisions[0], Answer) else ""
    results = [step for step in task.steps if step.role == "tool"]
    wrong = [step for step in next((came for _, came in reversed(rounds) if came), []) if not step.ok]
    if wrong:
        raise Ended("failed", answer=said, error=wrong[0].text)
    if taint.left(task):
        return []
    if isinstance(decisions[0], Nothing) and not results:
        reads = prompt.only_asks(task.text) or condition.known(task, specs) == "unread"
        missing = [] if reads else unsaid(specs, decided.fit)
        hint = f" (was it not said: {', '.join(missing)}?)" if missing else ""
        raise Ended("failed", error=f"none of the tools does this{hint}")
    sure = [step.confidence for step, _ in rounds if step.confidence is not None]
    doubt = f" ({min(sure):.0%} sure)" if sure and min(sure) < rules.confidence.route else ""
    raise Ended("succeeded", answer=(said or "; ".join(step.text for step in results)) + doubt)


def check_repeats(task: Task, repeats: int) -> None:
    """Raises Ended when the last call gave the same result so many times."""
    done = [(step.call, step.text, step.ok) for step in task.steps if step.role == "tool" and step.call]
    if done and done.count(done[-1]) >= repeats:
        raise Ended("failed", error=f"{render(done[-1][0])} gave the same result {repeats} times")
