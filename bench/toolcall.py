"""From an utterance to its complete, validated call, in milliseconds, with what ships: the base model and its adapter.

Invariants: a text is asked once of a model, so that only the preamble is in its cache; the clock covers what a device
does, from making the request to `validate`; the peer is raced in paired rounds, ours and then its own, so that a noisy
machine disturbs both. Rows: `ten` and `fifty` (tools), p50 with the preamble read, and their `.p95`; `.cold`, the first
call of a model just loaded, p50, and `.start`, with loading it; `llama` and `llama.cold`, ten tools against
llama-cpp-python with JSON schemas and a JSON grammar; `right`, the share of right calls. `goal` is the most for a
value, and in a row with a peer the least for the ratio.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from bench import llama, toolcall_cases
from edge_agent.agent import prompt
from edge_agent.agent.calls import Call, CallError, Nothing, parse, render, validate
from edge_agent.agent.decide import Speaker, next_call
from edge_agent.agent.tool import ToolSpec
from edge_agent.engines.base import LanguageModel
from edge_agent.errors import Refused
from edge_agent.wire.bundle import content_digest, scan

THREADS = 2
COLD_ROUNDS = 3
ADAPTER = "toolcaller"
GOALS = {"ten": 115, "fifty": 250, "ten.cold": 1100, "llama": 4, "llama.cold": 3}

Ask = Callable[[str], str]
"""An utterance to its call in canonical form, or to what was written in place of one."""
Open = Callable[[Sequence[ToolSpec]], AbstractContextManager[Ask]]
"""Loads a model to be asked about these tools; nothing is in its caches."""


class Case(msgspec.Struct, frozen=True):
    """What somebody says, and the one right call."""

    text: str
    call: str


Catalogues = dict[str, tuple[list[ToolSpec], list[Case]]]


def catalogues() -> Catalogues:
    """Tools and utterances of each size."""
    from models.toolcaller.data.written import tool

    tools = [tool(line) for line in toolcall_cases.TOOLS.strip().splitlines()]
    return {"ten": (tools[:10], _cases(toolcall_cases.TEN)), "fifty": (tools, _cases(toolcall_cases.FIFTY))}


def _cases(text: str) -> list[Case]:
    return [Case(*line.split(" → ")) for line in text.strip().splitlines()]


def run(cache: Path | None = None, adapter: Path | None = None, threads: int = THREADS) -> Iterator[dict[str, Any]]:
    """The rows; those against the peer only where it is installed. `adapter`: a folder, by default what ships."""
    from models.adapter import describe, shipped
    from models.fetch import default_cache
    from models.package import build

    cache = cache or default_cache()
    base, adapter = build("smollm2", cache), adapter or shipped().get(ADAPTER)
    shots = adapter is None or describe(adapter).prompt != "signatures"
    speaker = Speaker(content_digest(scan(base)), ADAPTER if adapter else "", shots=shots)
    try:
        peer = llama.peer()
    except Refused as refused:
        peer = ""
        print(f"{refused.message}, so there are no rows against it: {refused.hint}", file=sys.stderr)
    shared: dict[str, Any] = {"model": speaker.digest[:12], "adapter": speaker.adapter or "none, the base model alone"}
    shared |= {"threads": threads, "load": round(os.getloadavg()[0], 1)}
    ours = partial(_ours, base, adapter, speaker, threads)
    for found in rows(catalogues(), ours, partial(_peers, cache, threads) if peer else None, peer):
        yield {**found, **shared}


@contextmanager
def _ours(base: Path, adapter: Path | None, speaker: Speaker, threads: int, specs: Sequence[ToolSpec]) -> Iterator[Ask]:
    from edge_agent.engines.genai import GenaiModel

    model = GenaiModel(base, threads=threads, context=llama.CONTEXT)
    if adapter is not None:
        model.load_adapter(speaker.adapter, adapter)
    try:
        yield lambda text: ask(model, speaker, specs, text)
    finally:
        model.close()


@contextmanager
def _peers(cache: Path, threads: int, specs: Sequence[ToolSpec]) -> Iterator[Ask]:
    model = llama.load(cache, threads)
    preamble, form = llama.json_preamble(specs), llama.json_form(specs)
    try:
        yield lambda text: from_json(llama.call(model, preamble, form, text)[1], specs)
    finally:
        model.close()


def ask(model: LanguageModel, speaker: Speaker, specs: Sequence[ToolSpec], text: str) -> str:
    """Ask as the agent's loop does."""
    request = next_call(speaker, specs, [prompt.Turn("user", text)])
    said = "".join(piece.text for piece in model.generate(request, lambda: False))
    try:
        decision = parse(said)
        return render(validate(decision, specs) if isinstance(decision, Call) else decision)
    except CallError as error:
        return f"{said}: {error}"


class _Said(msgspec.Struct):
    name: str
    arguments: dict[str, Any]


def from_json(said: str, specs: Sequence[ToolSpec]) -> str:
    """The peer's output, validated and in our form."""
    try:
        found = msgspec.json.decode(said, type=_Said)
        call = Call(found.name, found.arguments)
        return render(Nothing()) if call.name == "none" else render(validate(call, specs))
    except (CallError, msgspec.MsgspecError) as error:
        return f"{said}: {error}"


def rows(catalogues: Catalogues, ours: Open, peers: Open | None, peer: str) -> Iterator[dict[str, Any]]:
    """Measure ours, and in turn with it the peer if there is one."""
    right: dict[str, list[bool]] = {}
    for size, (specs, cases) in catalogues.items():
        raced = peers if size == "ten" else None
        with ours(specs) as mine, raced(specs) if raced else nullcontext() as its:
            for warmed in filter(None, (mine, its)):
                warmed("Hello")
            times = [(_timed(mine, case), _timed(its, case) if its else None) for case in cases]
        warm, right[size] = [ms for (ms, _), _ in times], [good for (_, good), _ in times]
        yield row(size, warm)
        yield row(f"{size}.p95", warm, quantiles(warm, n=20, method="inclusive")[-1])
        if theirs := [other for _, other in times if other]:
            share = sum(good for _, good in theirs) / len(theirs)
            yield {**row("llama", warm, peer=peer, theirs=[ms for ms, _ in theirs]), "peer_right": round(share, 3)}
        yield from _cold(size, specs, cases, ours, raced, peer)
    every = [good for of in right.values() for good in of]
    shares = {size: round(sum(of) / len(of), 3) for size, of in right.items()}
    yield {**row("right", [float(good) for good in every], sum(every) / len(every)), "unit": "share", **shares}


def _cold(
    size: str, specs: list[ToolSpec], cases: list[Case], ours: Open, peers: Open | None, peer: str
) -> Iterator[dict[str, Any]]:
    cold, start, theirs = [], [], []
    for case in cases[:: max(1, len(cases) // COLD_ROUNDS)][:COLD_ROUNDS]:
        began = time.perf_counter()
        with ours(specs) as mine:
            loaded = 1e3 * (time.perf_counter() - began)
            cold.append(_timed(mine, case)[0])
            start.append(loaded + cold[-1])
        if peers:
            with peers(specs) as its:
                theirs.append(_timed(its, case)[0])
    yield row(f"{size}.cold", cold)
    yield row(f"{size}.start", start)
    if theirs:
        yield row("llama.cold", cold, peer=peer, theirs=theirs)


def _timed(asked: Ask, case: Case) -> tuple[float, bool]:
    """Milliseconds, and whether the call was the right one."""
    began = time.perf_counter()
    said = asked(case.text)
    return 1e3 * (time.perf_counter() - began), said == case.call


def row(
    name: str, ours: Sequence[float], value: float | None = None, *, peer: str = "", theirs: Sequence[float] = ()
) -> dict[str, Any]:
    """One row: the median if no value is given; `ratio` is the median of the paired ones, above 1 if ours is better."""
    value = round(median(ours) if value is None else value, 3)
    ratio = round(median(b / a for a, b in zip(ours, theirs, strict=True)), 2) if theirs else None
    found: dict[str, Any] = {"name": name, "value": value, "unit": "ms", "peer": peer or None}
    found |= {"peer_value": round(median(theirs), 3) if theirs else None, "ratio": ratio, "n": len(ours)}
    if goal := GOALS.get(name):
        found |= {"goal": goal, "held": value <= goal if ratio is None else ratio >= goal}
    return found
