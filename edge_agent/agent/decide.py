"""One decision of the agent: which model says it, how sure that is, and whether untrusted text is what speaks.

Invariants: a decision is one step of the transcript (two where it was checked), saved before anything follows from it.
The models are asked in their order: the next one when one refuses, is late or too unsure; the surest says what counts.
An act that is proposed after untrusted text was read is decided again without that text (taint.py). What is still
unsure, or has only untrusted text as a reason where the policy lets a person decide that, says so: it needs approval.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import msgspec

from edge_agent.agent import chat, confidence, grammar, meant, parts, prompt, taint
from edge_agent.agent.act import Ended
from edge_agent.agent.calls import Call, CallError
from edge_agent.agent.recall import Recall
from edge_agent.agent.rules import Budget, Policy
from edge_agent.agent.said import added
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Step, Task, Transcripts
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import OutriderError, Refused, Retry

CALL_TOKENS = 96
LURED = "only text that somebody else wrote is a reason for it"


class Model(Protocol):
    """The language workers' client; `Generate.model` says which of the models is asked."""

    async def generate(self, request: Generate, timeout_s: float) -> Piece:
        """The whole completion as one piece. Raises Retry (later), Refused (never)."""
        ...


class Speaker(msgspec.Struct, frozen=True):
    """What speaks for the agent: the model's digest, the adapter as `Generate` names it and as people do, its prompt.

    An adapter that was trained on `signatures` needs no examples in the preamble; an `endpoint` is asked by messages.
    One that can say `several` calls at once is let do so where a request joins several things. `model` is its name;
    `cost` is of 1,000 tokens; one that takes longer than `latency_s` is given up (0: it may).
    """

    digest: str = ""
    adapter: str = ""
    title: str = ""
    shots: bool = True
    endpoint: bool = False
    several: bool = False
    model: str = ""
    calibration: confidence.Calibration = confidence.Calibration()
    cost: float = 0.0
    latency_s: float = 0.0


class _Question(NamedTuple):
    task: Task
    specs: Sequence[ToolSpec]
    fit: Sequence[ToolSpec]
    read: Sequence[prompt.Turn]
    role: Literal["model", "check"]
    deadline: float
    rules: Policy


class Decided(msgspec.Struct, frozen=True):
    """What is to be done, as text, by the decision at place `k`, with the tools as they `fit` the task; `why` a person
    has to approve the acts in it."""

    k: int
    text: str
    fit: Sequence[ToolSpec]
    why: str = ""


class Decider:
    """Asks the models of `speakers` for the decisions of tasks; `counts` is for the metrics."""

    def __init__(
        self,
        model: Model,
        transcripts: Transcripts,
        speakers: Callable[[], Sequence[Speaker]],
        clock: Callable[[], float],
        counts: Counter[str],
    ) -> None:
        self._model, self._transcripts, self._speakers = model, transcripts, speakers
        self._clock, self._counts = clock, counts
        self.recall = Recall(transcripts.store)

    async def decide(self, task: Task, specs: Sequence[ToolSpec], rules: Policy, deadline: float) -> Decided:
        """What the model says next, or has said and is not yet carried out. Raises Ended."""
        known, k, fit = {spec.name: spec for spec in specs}, undone(task), rules.fit(specs, task)
        if k is None:
            await self._ask(_Question(task, specs, fit, taint.turns(task, known), "model", deadline, rules))
            k = len(task.steps) - 1
        said = task.steps[k]
        if said.role == "model" and (len(task.steps) > k + 1 or not taint.steers(said.text, task, known)):
            return Decided(k, said.text, fit, _unsure(said, rules))
        held = rules.fit(specs, task, hide=True)
        if said.role == "model":
            self._counts["checks"] += 1
            await self._ask(_Question(task, specs, held, taint.turns(task, known, hide=True), "check", deadline, rules))
            k += 1
        proposed, checked = task.steps[k - 1], task.steps[k]
        if rules.untrusted == "ask" and _gives_up(checked.text) and len(taint.decisions(proposed.text)) == 1:
            new = [each for call in taint.acts(proposed.text, known) for each in added(call, specs, task)]
            return Decided(k, proposed.text, fit, f"{LURED}{', and says ' * bool(new)}{', '.join(new)}")
        return Decided(k, checked.text, held, _unsure(checked, rules))

    async def _ask(self, asked: _Question) -> None:
        """Append what the surest of the models says. Raises Ended."""
        task, deadline, rules = asked.task, asked.deadline, asked.rules
        check_budget(task, rules.budget, time.monotonic() >= deadline)
        pause = 0.1
        while True:
            answers, tried, errors = list[Step](), list[str](), list[OutriderError]()
            for speaker in self._order(errors):  # asked anew each time: what answers later may be another
                name = f"{speaker.model}: " if speaker.model else ""
                try:
                    async with asyncio.timeout(speaker.latency_s or None):
                        answers.append(await self._hear(asked, speaker))
                except TimeoutError:
                    errors.append(Retry(f"{name}it takes longer than {speaker.latency_s:g} s"))
                except OutriderError as error:
                    kind = Retry if isinstance(error, Retry) else Refused
                    errors.append(kind(f"{name}{error.message}", error.hint))
                else:
                    sure = answers[-1].confidence
                    if sure is None or sure >= rules.confidence.route:
                        break
                    tried.append(f"{name}{sure:.0%} sure")
            tried += [str(error)[:200] for error in errors]
            if answers:
                break
            if errors and not any(isinstance(error, Retry) for error in errors):
                raise Ended("failed", error=f"the language model refused: {'; '.join(tried)}")
            if time.monotonic() + pause >= deadline:
                raise Ended("failed", error=f"the language model does not answer: {'; '.join(tried)}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
        best = max(answers, key=lambda step: 1.0 if step.confidence is None else step.confidence)
        self._counts["routed"] += bool(tried)
        tokens, ms, cost = (sum(getattr(step, name) for step in answers) for name in ("tokens", "ms", "cost"))
        best = msgspec.structs.replace(best, ts=self._clock(), tried=tried, tokens=tokens, ms=ms, cost=cost)
        await self._transcripts.append(task, best, later=True)

    def _order(self, errors: list[OutriderError]) -> Sequence[Speaker]:
        try:
            return self._speakers()
        except Retry as error:
            errors.append(error)
            return []

    async def _hear(self, asked: _Question, speaker: Speaker) -> Step:
        """What one model says; below the threshold, what most of its samples say. Raises OutriderError."""
        task, specs, fit, read, role, deadline, policy = asked
        like = list[prompt.Turn]()
        if speaker.endpoint:  # told as they are declared: no grammar holds it, and a server keeps what it has read
            offered = {spec.name for spec in fit}
            fit = [spec for spec in specs if spec.name in offered]
            like = await self.recall.like(task, fit)
        request = next_call(speaker, specs, [*like, *read], calls=policy.calls, priority=task.priority, fit=fit)
        pieces = [await self._model.generate(request, max(0.1, deadline - time.monotonic()))]
        said, sure, votes = pieces[0], speaker.calibration.probability(pieces[0]), ""
        if sure is not None and sure < policy.confidence.ask:
            self._counts["votes"] += 1
            for seed in range(1, policy.confidence.samples + 1):
                sample = msgspec.structs.replace(request, temperature=policy.confidence.temperature, seed=seed)
                pieces.append(await self._model.generate(sample, max(0.1, deadline - time.monotonic())))
            said, sure, votes = confidence.vote(pieces, speaker.calibration)
        text = understood(said.text, speaker, fit, read, policy)
        read_and_said = sum(piece.prompt_tokens + piece.output_tokens for piece in pieces)
        return Step(
            role,
            text,
            ms=sum(piece.total_s for piece in pieces) * 1e3,
            first_token_ms=pieces[0].first_token_s * 1e3,
            prompt_tokens=said.prompt_tokens,
            cached_tokens=said.cached_tokens,
            tokens=sum(piece.output_tokens for piece in pieces),
            digest=speaker.digest,
            adapter=speaker.title,
            model=speaker.model,
            logprob=said.mean_logprob,
            confidence=sure,
            votes=votes,
            cost=speaker.cost * read_and_said / 1000,
            wrote=said.text if text != said.text else "",
            whole=speaker.endpoint,
        )


def understood(text: str, to: Speaker, specs: Sequence[ToolSpec], read: Sequence[prompt.Turn], policy: Policy) -> str:
    """What a model said, as `meant` by a small one; answers of the conversation are texts too, calls are none."""
    if to.endpoint or policy.unsaid == "act":
        return text
    asked = prompt.request_at(read)
    texts = [turn.text for n, turn in enumerate(read) if turn.role != "assistant" or n < asked]
    try:
        return meant.plain_text(text, specs, texts)
    except CallError:  # whoever carries it out says what is wrong with it
        return text


def next_call(
    speaker: Speaker,
    specs: Sequence[ToolSpec],
    turns: Sequence[prompt.Turn],
    max_tokens: int = CALL_TOKENS,
    calls: int = 1,
    priority: int = 1,
    fit: Sequence[ToolSpec] | None = None,
) -> Generate:
    """The request for the next calls, at most so many; `fit` are those of the tools that may be called (None: all)."""
    fit = specs if fit is None else fit
    turns = turns if speaker.endpoint else parts.asked(turns, taint.over)
    to = Generate("", "", model=speaker.model, priority=priority)
    request = turns[at].text if (at := prompt.request_at(turns)) >= 0 else ""
    if speaker.endpoint:
        asked = chat.chat(fit, turns, calls > 1, prompt.form(request))
        return msgspec.structs.replace(to, max_tokens=4 * max_tokens, chat=asked)
    plan = speaker.several and calls > 1 and prompt.joined(request)
    return msgspec.structs.replace(
        to,
        prefix=_preamble(tuple(specs), speaker.shots, plan),
        prompt=prompt.suffix(turns),
        grammar=_grammar(tuple(fit), calls if plan else 1),
        max_tokens=2 * max_tokens if plan else max_tokens,
        adapter=speaker.adapter,
    )


@lru_cache(16)
def _preamble(specs: tuple[ToolSpec, ...], shots: bool, plan: bool) -> str:
    """The same for every request with these tools."""
    return prompt.preamble(specs, prompt.SYSTEM_ALL if plan else prompt.SYSTEM, shots=shots)


@lru_cache(16)
def _grammar(specs: tuple[ToolSpec, ...], several: int) -> str:
    return grammar.build(specs, several=several, refs=several > 1)


def undone(task: Task) -> int | None:
    """The place of the last decision, when not all of its calls were made, and none failed."""
    steps = task.steps
    k = max((n for n, step in enumerate(steps) if step.role in ("model", "check")), default=None)
    if k is None:
        return None
    came = [step for step in steps[k + 1 :] if step.role == "tool"]
    parts = [step.at.startswith(f"{k}.") and step.ok for step in came]
    if taint.over(steps[k].text) and taint.left(task):
        return None
    calls = sum(isinstance(decision, Call) for decision in taint.decisions(steps[k].text))
    return k if all(parts) and (not came or len(came) < calls) else None


def check_budget(task: Task, budget: Budget, late: bool) -> None:
    """Raises Ended when the next decision would go past a limit."""
    used = {
        "time": (budget.seconds if late else -1.0, budget.seconds, " s"),
        "steps": (sum(map(_decides, task.steps)), budget.steps, ""),
        "tokens": (sum(step.tokens for step in task.steps), budget.tokens, ""),
        "energy": (task.joules, budget.joules or math.inf, " J"),
        "money": (sum(step.cost for step in task.steps), budget.cost or math.inf, ""),
    }
    for name, (spent, limit, unit) in used.items():
        if spent >= limit:
            raise Ended("failed", error=f"out of {name}: {limit:g}{unit}")


def _decides(step: Step) -> bool:
    """Whether it costs a step: the end of a part does not."""
    return step.role == "model" and not taint.over(step.text)


def _unsure(step: Step, rules: Policy) -> str:
    sure = step.confidence
    return "" if sure is None or sure >= rules.confidence.route else f"the model is only {sure:.0%} sure"


def _gives_up(said: str) -> bool:
    """Whether a model wants nothing done, or something with a hole where the text was."""
    return taint.over(said) or (taint.HIDDEN in said and bool(taint.decisions(said)))
