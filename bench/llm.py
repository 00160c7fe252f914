"""The language model against llama-cpp-python: same weights, same threads, same process, in turns.

Invariants: every figure comes from paired rounds (ours, then the peer, again and again), so that a noisy machine
disturbs both; `ratio` is the median of the paired ratios and more than 1 when ours is better. The peer keeps its
prefix in its cache as we do. Rows: `prefill` and `decode` in tokens/s; `call`, seconds to a complete tool call with
ten tools and a warm preamble, against JSON schemas and a JSON grammar; `call.form`, the same against the peer with our
own prompt and an equal GBNF grammar, so that the form and the engine are seen apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import llama
from edge_agent.agent import grammar, prompt
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Generate, Piece

ROUNDS = 5
CALL_ROUNDS = 3
PREFILL_SENTENCES = 50  # of about ten tokens
DECODE_TOKENS = 64

_LINE = Param("line", "int", low=1, high=3)
TOOLS = [
    ToolSpec(
        "read_sensor",
        "Read a sensor of a production line.",
        [Param("sensor", "choice", choices=["vibration", "temperature", "speed"]), _LINE],
    ),
    ToolSpec("set_speed", "Set the speed of a line.", [_LINE, Param("percent", "float", low=0, high=100, unit="%")]),
    ToolSpec("stop_line", "Stop a production line.", [_LINE]),
    ToolSpec("start_line", "Start a stopped production line.", [_LINE]),
    ToolSpec("read_label", "Read the label that a camera sees.", [Param("camera", "int", low=1, high=4)]),
    ToolSpec("list_alarms", "List the active alarms.", [Param("level", "choice", choices=["all", "critical"])]),
    ToolSpec("open_valve", "Open or close a valve.", [Param("valve", "str"), Param("open", "bool")]),
    ToolSpec("send_message", "Send a message to a person.", [Param("person", "str"), Param("text", "str")]),
    ToolSpec(
        "switch_light", "Switch a lamp.", [Param("zone", "choice", choices=["north", "hall"]), Param("on", "bool")]
    ),
    ToolSpec("move_robot", "Move the robot to a station.", [Param("station", "int", low=1, high=12)]),
]
REQUESTS = [
    "Read the vibration of line 2",
    "Set line 1 to 80 percent",
    "Stop line 3",
    "Which alarms are critical?",
    "What does the label at camera 4 say?",
    "Start line 2 again",
    "Open valve V7",
    "How hot is line 1?",
    "Turn on the light in the hall",
    "Send the robot to station 9",
]


def run(cache: Path | None = None, threads: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the race (0 threads: all CPUs of this process). Raises Refused when llama-cpp-python is not installed."""
    against = llama.peer()
    from llama_cpp import LlamaGrammar

    from edge_agent.engines.genai import GenaiModel
    from models.fetch import default_cache
    from models.package import build

    cache = cache or default_cache()
    ours = GenaiModel(build("smollm2", cache), threads=threads, context=llama.CONTEXT)
    threads = ours.info.extra["threads"]

    shared = {"peer": against, "threads": threads, "model": ours.info.digest}
    shared["load"] = round(os.getloadavg()[0], 1)  # before the race: other work on the CPUs starves the peer most
    plain, formed = llama.load(cache, threads), llama.load(cache, threads)
    yield {**_row("prefill", "tok/s", *_race(partial(_prefill, ours), partial(_peer_prefill, plain))), **shared}
    yield {**_row("decode", "tok/s", *_race(partial(_decode, ours), partial(_peer_decode, plain))), **shared}

    lark = grammar.build(TOOLS)
    call = partial(_call, ours, prompt.preamble(TOOLS), lark)
    form = LlamaGrammar.from_string(llama.gbnf(lark), verbose=False)
    peer_form = partial(llama.call, formed, prompt.preamble(TOOLS), form)
    peer_json = partial(llama.call, plain, llama.json_preamble(TOOLS), llama.json_form(TOOLS))
    for warm in (call, peer_form, peer_json):
        warm("Hello")
    times: list[tuple[float, float, float]] = []
    same = 0
    for _ in range(CALL_ROUNDS):
        for request in REQUESTS:
            (a, said), (b, _), (c, said_too) = call(request), peer_json(request), peer_form(request)
            times.append((a, b, c))
            same += said == said_too
    mine, theirs, theirs_form = (list(column) for column in zip(*times, strict=True))
    yield {**_row("call", "s", mine, theirs, less=True), **shared, "peer_form": "JSON schemas, JSON grammar"}
    row = _row("call.form", "s", mine, theirs_form, less=True)
    yield {**row, **shared, "peer_form": "our prompt, GBNF grammar", "same_output": same}


def _race(ours: Callable[[int], float], peer: Callable[[int], float]) -> tuple[list[float], list[float]]:
    ours(-1), peer(-1)
    pairs = [(ours(turn), peer(turn)) for turn in range(ROUNDS)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _row(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], *, less: bool = False) -> dict[str, Any]:
    ratios = [b / a if less else a / b for a, b in zip(ours, peer, strict=True)]
    digits = 4 if less else 1
    return {
        "name": name,
        "value": round(median(ours), digits),
        "unit": unit,
        "peer": "",
        "peer_value": round(median(peer), digits),
        "ratio": round(median(ratios), 2),
        "n": len(ratios),
    }


def _text(turn: int) -> str:
    return f"{turn + 10} reports. " + " ".join(
        f"Line {i % 3} ran at {i * 7 % 100} percent." for i in range(PREFILL_SENTENCES)
    )


def _prefill(model: Any, turn: int) -> float:
    last = _last(model, Generate("", _text(turn), max_tokens=1))
    return float((last.prompt_tokens - last.cached_tokens) / last.first_token_s)


def _peer_prefill(peer: Any, turn: int) -> float:
    tokens = peer.tokenize(_text(turn).encode(), add_bos=False)
    started = time.perf_counter()
    next(peer.generate(tokens, temp=0.0, reset=True))
    return float(len(tokens) / (time.perf_counter() - started))


def _story(turn: int) -> str:
    return prompt.suffix([prompt.Turn("user", f"Write a long story about {turn + 10} machines.")])


def _decode(model: Any, turn: int) -> float:
    last = _last(model, Generate("", _story(turn), max_tokens=DECODE_TOKENS))
    return float((last.output_tokens - 1) / (last.total_s - last.first_token_s))


def _peer_decode(peer: Any, turn: int) -> float:
    stream = peer.generate(peer.tokenize(_story(turn).encode(), add_bos=False, special=True), temp=0.0)
    next(stream)
    started, count = time.perf_counter(), 0
    for token in stream:
        if token == peer.token_eos():
            break
        count += 1
        if count == DECODE_TOKENS - 1:
            break
    return float(count / (time.perf_counter() - started))


def _call(model: Any, preamble: str, lark: str, request: str) -> tuple[float, str]:
    started = time.perf_counter()
    task = Generate(preamble, prompt.suffix([prompt.Turn("user", request)]), lark, max_tokens=llama.MAX_CALL)
    said = "".join(piece.text for piece in model.generate(task, lambda: False))
    return time.perf_counter() - started, said


def _last(model: Any, request: Generate) -> Piece:
    last: Piece
    *_, last = model.generate(request, lambda: False)
    return last
