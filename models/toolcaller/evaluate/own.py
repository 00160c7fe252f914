"""How often a site's own requests are answered right, by each of several adapters in turn.

Invariants: the requests are asked one by one and the adapters take turns at each, so every request switches; a story
is right when each of its steps is, given the right steps before it; the order of several calls does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from edge_agent.agent import grammar, prompt
from edge_agent.agent.calls import Call, CallError, render
from edge_agent.agent.tool import ToolSpec
from edge_agent.engines.base import Generate, LanguageModel
from models.toolcaller.data.written import Group, Request
from models.toolcaller.evaluate import figures
from models.toolcaller.evaluate.run import MAX_TOKENS, SEVERAL, understood

KINDS = ("one", "several", "none", "story")


class Outcome(msgspec.Struct, frozen=True):
    """What an adapter made of a request."""

    adapter: str
    kind: str
    right: bool
    ms: float
    text: str
    said: list[str]


def kind(request: Request) -> str:
    """Which of KINDS a request is."""
    return "story" if request.story else ("none", "one", "several")[min(len(request.calls), 2)]


def evaluate(
    model: LanguageModel, groups: Sequence[Group], adapters: Sequence[str], step: Callable[[], None] = lambda: None
) -> Iterator[Outcome]:
    """Ask every request of every group of each loaded adapter; an empty name is the base model."""
    for group in groups:
        for request in group.requests:
            for adapter in adapters:
                began = time.perf_counter()
                steps = list(_steps(request))
                said = [_decide(model, group.tools, turns, adapter, alone) for turns, alone, _ in steps]
                right = all(
                    _same(got, turns, wanted, group.tools) for got, (turns, _, wanted) in zip(said, steps, strict=True)
                )
                ms = (time.perf_counter() - began) * 1e3
                yield Outcome(adapter, kind(request), right, ms, request.text, said)
                step()


def _steps(request: Request) -> Iterator[tuple[list[prompt.Turn], bool, list[Call]]]:
    """Each decision of a request: the turns before it, whether it is one call at a time, and the right calls."""
    turns = [prompt.Turn("user", request.text)]
    if not request.story:
        yield turns, False, request.calls
        return
    for call, told in request.story:
        yield list(turns), True, [call]
        turns += [prompt.Turn("assistant", render(call)), prompt.Turn("tool", told)]
    yield turns, True, []


def _decide(
    model: LanguageModel, tools: Sequence[ToolSpec], turns: list[prompt.Turn], adapter: str, alone: bool
) -> str:
    rules = grammar.build(tools, answer=False, several=1 if alone else SEVERAL)
    prefix = prompt.preamble(tools, prompt.SYSTEM if alone else prompt.SYSTEM_ALL)
    ask = Generate(prefix, prompt.suffix(turns), rules, max_tokens=MAX_TOKENS, adapter=adapter)
    return "".join(piece.text for piece in model.generate(ask, lambda: False))


def _same(text: str, read: Sequence[prompt.Turn], wanted: Sequence[Call], tools: Sequence[ToolSpec]) -> bool:
    try:
        made = understood(text, tools, [turn.text for turn in read if turn.role != "assistant"])
    except CallError:
        return False
    return sorted(map(render, made)) == sorted(map(render, wanted))


def rows(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """A row an adapter and kind, then one for all with the median time of a request."""
    for adapter in dict.fromkeys(outcome.adapter for outcome in outcomes):
        of = [outcome for outcome in outcomes if outcome.adapter == adapter]
        for name in (*KINDS, "all"):
            some = [outcome for outcome in of if name in (outcome.kind, "all")]
            row = figures.share_row(name, sum(outcome.right for outcome in some), len(some))
            row |= {"adapter": adapter or "none"}
            yield row | ({"ms": round(figures.median([o.ms for o in some]) or 0, 1)} if name == "all" else {})
