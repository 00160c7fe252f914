"""The agent: one request, one linear transcript, one step at a time: decide → policy → act → validate → finish.

Invariants: every step is saved before the next begins; whatever the model says becomes an effect (see act.py), a text
for the model, or an `Ended`, never a crash; budgets of steps, tokens and time always end a task. Nothing here picks a
tool: the call is the model's or there is none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from edge_agent.agent import chat, grammar, policy, prompt, taint
from edge_agent.agent.act import Acts, Ended, Tools
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Answer, Call, CallError, Decision, Nothing, parse, render, validate
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Step, Task, Transcripts
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.wire.grants import Subject

REPEATS = 3
MAX_RUNS = 3
CALL_TOKENS = 96


class Model(Protocol):
    """The language worker's client."""

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        """The whole completion as one piece. Raises Retry (later), Refused (never)."""
        ...


class Speaker(msgspec.Struct, frozen=True):
    """What speaks for the agent: the model's digest, the adapter as `Generate` names it and as people do, its prompt.

    An adapter that was trained on `signatures` needs no examples in the preamble; an `endpoint` is asked by messages.
    """

    digest: str = ""
    adapter: str = ""
    title: str = ""
    shots: bool = True
    endpoint: bool = False


class Budget(msgspec.Struct, frozen=True):
    """What one task may use: decisions, generated tokens, seconds since its run began."""

    steps: int = 8
    tokens: int = 512
    seconds: float = 120.0


def request(text: str) -> str:
    """The text as it is kept. Raises Refused when it is empty or too long."""
    if not text.strip() or len(text) > prompt.MAX_REQUEST:
        raise Refused("a request is empty or too long", f"write 1 to {prompt.MAX_REQUEST} characters")
    return text.strip()


class AgentLoop:
    """Runs tasks; any number at a time, each `run` in its own asyncio task."""

    def __init__(
        self,
        model: Model,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        *,
        budget: Budget = Budget(),  # noqa: B008
        clock: Callable[[], float] = time.time,
        speaker: Callable[[], Speaker] = Speaker,
        approvals: Approvals | None = None,
    ) -> None:
        self._speaker = speaker
        self._model, self._tools, self._transcripts = model, tools, transcripts
        self._allowed, self._budget, self._clock = allowed, budget, clock
        self._acts = Acts(tools, transcripts, allowed, clock, approvals)

    async def warm(self) -> None:
        """Have the model read the preamble of all tools, so that a first task finds it read. Raises Retry, Refused."""
        specs = await self._tools.specs()
        await self._model.generate(next_call(self._speaker(), specs, [], max_tokens=1), self._budget.seconds)

    async def accept(self, id: str, text: str, subject: Subject) -> Task:
        """Save a new task; asking again with the same id gives the one there is. Raises Refused."""
        return await self._transcripts.add(Task(id, request(text), subject, self._clock()))

    async def run(self, id: str) -> Task:
        """Run an accepted task until it is over or waits, from wherever its transcript stands.

        Raises Refused for an unknown id.
        """
        task = await self._transcripts.get(id)
        if task is None:
            raise Refused(f"there is no task {id}", "accept it first")
        if task.state in ("running", "waiting"):
            task.runs += task.state == "running"
            task.state = "running"
            await self._transcripts.save(task)
            deadline = time.monotonic() + self._budget.seconds
            try:
                specs = await self._tools.specs()
                await self._resume(task, specs, deadline)
                while True:
                    await self._step(task, specs, deadline)
            except Ended as end:
                task.state, task.answer, task.error = end.state, end.answer, end.error
            except OutriderError as error:
                task.state, task.error = "failed", str(error)
            task.finished = self._clock()
            await self._transcripts.save(task)
        return task

    async def _step(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Decide → policy → act → validate. Raises Ended."""
        usable = policy.usable(specs, task.subject, self._allowed)
        text = await self._decide(task, usable, deadline)
        try:
            call = validate(conclude(task, parse(text)), usable)
        except CallError as error:
            await self._transcripts.append(task, Step("tool", str(error), ok=False, ts=self._clock()))
            return
        await self._act(task, next(spec for spec in usable if spec.name == call.name), call, deadline)
        check_repeats(task)

    async def _resume(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Settle a call that waited, or that a crash cut off before its result. Raises Ended."""
        if task.runs > MAX_RUNS:
            raise Ended("failed", error=f"given up: it was cut off {MAX_RUNS} times")
        if task.steps and task.steps[-1].role in ("intent", "ask", "approval") and (call := task.steps[-1].call):
            gone = ToolSpec(call.name, "", [], idempotent=False)
            await self._act(task, next((spec for spec in specs if spec.name == call.name), gone), call, deadline)

    async def _act(self, task: Task, spec: ToolSpec, call: Call, deadline: float) -> None:
        step = await self._acts.act(task, spec, call, max(0.1, min(spec.timeout_s, deadline - time.monotonic())))
        if step.ok:
            task.result = step.result

    async def _decide(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> str:
        """What the model says; an act after untrusted text only when it says so without that text too."""
        last = task.steps[-1].role if task.steps else ""
        said = task.steps[-1].text if last in ("model", "check") else ""  # before a crash, not yet acted upon
        said = said or await self._ask(task, specs, turns(task), "model", deadline)
        if last == "check" or not taint.steers(said, task, specs):
            return said
        return await self._ask(task, specs, taint.turns(task, specs), "check", deadline)

    async def _ask(
        self,
        task: Task,
        specs: Sequence[ToolSpec],
        read: Sequence[prompt.Turn],
        role: Literal["model", "check"],
        deadline: float,
    ) -> str:
        check_budget(task, self._budget, time.monotonic() >= deadline)
        pause = 0.1
        while True:
            try:
                speaker = self._speaker()  # asked anew each time: what answers later may be another
                request = next_call(speaker, specs, read)
                piece = await self._model.generate(request, max(0.1, deadline - time.monotonic()))
                break
            except Retry as error:
                if time.monotonic() + pause >= deadline:
                    raise Ended("failed", error=f"the language model does not answer: {error}") from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)
            except OutriderError as error:
                raise Ended("failed", error=f"the language model refused: {error}") from error
        step = Step(
            role,
            piece.text,
            ts=self._clock(),
            ms=piece.total_s * 1e3,
            first_token_ms=piece.first_token_s * 1e3,
            prompt_tokens=piece.prompt_tokens,
            cached_tokens=piece.cached_tokens,
            tokens=piece.output_tokens,
            digest=speaker.digest,
            adapter=speaker.title,
        )
        await self._transcripts.append(task, step)
        return piece.text


def next_call(
    speaker: Speaker, specs: Sequence[ToolSpec], turns: Sequence[prompt.Turn], max_tokens: int = CALL_TOKENS
) -> Generate:
    """The request for the next call."""
    if speaker.endpoint:
        return Generate("", "", max_tokens=4 * max_tokens, chat=chat.chat(specs, turns))
    prefix = prompt.preamble(specs, shots=speaker.shots)
    return Generate(prefix, prompt.suffix(turns), grammar.build(specs), max_tokens, adapter=speaker.adapter)


def turns(task: Task) -> list[prompt.Turn]:
    """The transcript as the model reads it; an intent adds nothing to what the model said."""
    read = [prompt.Turn("user", task.text)]
    for step in taint.decided(task.steps):
        if step.role in ("model", "check"):
            read.append(prompt.Turn("assistant", step.text))
        elif step.role == "tool":
            read.append(prompt.Turn("tool", step.text if step.ok else prompt.error_text(step.text)))
    return read


def conclude(task: Task, decision: Decision) -> Call:
    """The call to make. Raises Ended when the model is done: failed if nothing worked or the last thing went wrong."""
    if isinstance(decision, Call):
        return decision
    results = [step for step in task.steps if step.role == "tool"]
    said = decision.text if isinstance(decision, Answer) else ""
    if results and not results[-1].ok:
        raise Ended("failed", answer=said, error=results[-1].text)
    if isinstance(decision, Nothing) and not results:
        raise Ended("failed", error="none of the tools does this")
    raise Ended("succeeded", answer=said or "; ".join(step.text for step in results))


def check_budget(task: Task, budget: Budget, late: bool) -> None:
    """Raises Ended when the next decision would go past a limit."""
    said = [step for step in task.steps if step.role == "model"]
    if late:
        raise Ended("failed", error=f"out of time: {budget.seconds:g} s")
    if len(said) >= budget.steps:
        raise Ended("failed", error=f"out of steps: {budget.steps}")
    if sum(step.tokens for step in task.steps) >= budget.tokens:
        raise Ended("failed", error=f"out of tokens: {budget.tokens}")


def check_repeats(task: Task) -> None:
    """Raises Ended when the last call gave the same result REPEATS times."""
    done = [(step.call, step.text, step.ok) for step in task.steps if step.role == "tool" and step.call]
    if done and done.count(done[-1]) >= REPEATS:
        raise Ended("failed", error=f"{render(done[-1][0])} gave the same result {REPEATS} times")
