"""The agent: one request, one linear transcript, one step at a time: decide → policy → act → validate → finish.

Invariants: every step is saved before the next begins and the intent of a call before its effect; a call whose effect
is unknown is made again by `resume` after a crash, only when the tool is idempotent or takes the call's key (the same
both times), and never otherwise; whatever the model says becomes an effect, a text for the model, or an `Ended`, never
a crash; budgets of steps, tokens and time always end a task. Nothing here picks a tool: the call is the model's or
there is none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from edge_agent.agent import chat, grammar, policy, prompt, taint
from edge_agent.agent.calls import Answer, Call, CallError, Decision, Nothing, parse, render, validate
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.transcript import State, Step, Task
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


class Tools(Protocol):
    """The tool runner's client."""

    async def specs(self) -> Sequence[ToolSpec]:
        """The tools there are, once the runner serves. Raises Retry."""
        ...

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        """The JSON result. Raises ToolError (ordinary failure), Refused (not made), Retry (effect unknown)."""
        ...


class Transcripts(Protocol):
    """Where tasks are kept; see `transcript.Transcripts`."""

    async def add(self, task: Task) -> Task: ...
    async def get(self, id: str) -> Task | None: ...
    async def unfinished(self) -> list[Task]: ...
    async def append(self, task: Task, step: Step) -> None: ...
    async def save(self, task: Task) -> None: ...


class Budget(msgspec.Struct, frozen=True):
    """What one task may use: decisions, generated tokens, seconds since its run began."""

    steps: int = 8
    tokens: int = 512
    seconds: float = 120.0


class Ended(Exception):
    """The task is over; carries its final state."""

    def __init__(self, state: State, *, answer: str = "", error: str = "") -> None:
        super().__init__(state, answer, error)
        self.state, self.answer, self.error = state, answer, error


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
    ) -> None:
        self._speaker = speaker
        self._model, self._tools, self._transcripts = model, tools, transcripts
        self._allowed, self._budget, self._clock = allowed, budget, clock

    async def warm(self) -> None:
        """Have the model read the preamble of all tools, so that a first task finds it read. Raises Retry, Refused."""
        specs = await self._tools.specs()
        await self._model.generate(next_call(self._speaker(), specs, [], max_tokens=1), self._budget.seconds)

    async def accept(self, id: str, text: str, subject: Subject) -> Task:
        """Save a new task; asking again with the same id gives the one there is. Raises Refused."""
        return await self._transcripts.add(Task(id, request(text), subject, self._clock()))

    async def unfinished(self) -> list[Task]:
        """Tasks to `run` after a start."""
        return await self._transcripts.unfinished()

    async def run(self, id: str) -> Task:
        """Run an accepted task to its end, from wherever its transcript stands. Raises Refused for an unknown id."""
        task = await self._transcripts.get(id)
        if task is None:
            raise Refused(f"there is no task {id}", "accept it first")
        if task.state == "running":
            task.runs += 1
            await self._transcripts.save(task)
            deadline = time.monotonic() + self._budget.seconds
            try:
                specs = await self._specs()
                await self._resume(task, specs, deadline)
                while True:
                    await self._step(task, specs, deadline)
            except Ended as end:
                task.state, task.answer, task.error = end.state, end.answer, end.error
            task.finished = self._clock()
            await self._transcripts.save(task)
        return task

    async def _step(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Decide → policy → act → validate. Raises Ended."""
        usable = policy.usable(specs, task.subject, self._allowed)
        text = await self._decide(task, usable, deadline)
        try:
            call = validate(conclude(task, parse(text)), usable)
            spec = next(spec for spec in usable if spec.name == call.name)
            policy.check(spec, task.subject, self._allowed)
        except CallError as error:
            await self._transcripts.append(task, Step("tool", str(error), ok=False, ts=self._clock()))
            return
        except Refused as refused:
            raise Ended("failed", error=str(refused)) from refused
        await self._transcripts.append(task, Step("intent", call=call, ts=self._clock()))
        await self._act(task, spec, call, deadline)
        check_repeats(task)

    async def _specs(self) -> Sequence[ToolSpec]:
        try:
            return await self._tools.specs()
        except OutriderError as error:
            raise Ended("failed", error=f"the tools are not there: {error}") from error

    async def _resume(self, task: Task, specs: Sequence[ToolSpec], deadline: float) -> None:
        """Settle a call that a crash cut off between its intent and its result. Raises Ended."""
        if task.runs > MAX_RUNS:
            raise Ended("failed", error=f"given up: it was cut off {MAX_RUNS} times")
        last = task.steps[-1] if task.steps else None
        if last is None or last.role != "intent" or last.call is None:
            return
        spec = next((spec for spec in specs if spec.name == last.call.name), None)
        if spec is None or not spec.repeatable:
            await self._unknown(task, last.call)
        else:
            try:
                policy.check(spec, task.subject, self._allowed)
            except Refused as refused:
                raise Ended("failed", error=str(refused)) from refused
            await self._act(task, spec, last.call, deadline)

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

    async def _act(self, task: Task, spec: ToolSpec, call: Call, deadline: float) -> None:
        started = time.monotonic()
        value, text, ok = None, "", True
        try:
            limit = max(0.1, min(spec.timeout_s, deadline - started))
            key = f"{task.id}:{sum(step.role == 'intent' for step in task.steps)}"
            value = await self._tools.call(call.name, spec.keyed_args(call.args, key), limit)
            text = prompt.result_text(value)
        except (ToolError, Refused) as error:
            text, ok = str(error), False
        except OutriderError as error:
            if not spec.repeatable:
                await self._unknown(task, call)
            text, ok = f"{call.name} did not finish: {error}", False
        ms = (time.monotonic() - started) * 1e3
        await self._transcripts.append(task, Step("tool", text, call, value, ok, self._clock(), ms))
        if ok:
            task.result = value

    async def _unknown(self, task: Task, call: Call) -> None:
        reason = f"interrupted: effect unknown of {render(call)}"
        await self._transcripts.append(task, Step("tool", reason, call, ok=False, ts=self._clock()))
        raise Ended("failed", error=f"{reason} (look at the device before you ask again)")


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
