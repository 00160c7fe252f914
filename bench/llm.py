"""The language model against llama-cpp-python: same weights, same threads, same process, in turns.

Invariants: every figure comes from paired rounds (ours, then the peer, again and again), so that a noisy machine
disturbs both; `ratio` is the median of the paired ratios and more than 1 when ours is better. The peer keeps its
prefix in its cache as we do. Rows: `prefill` and `decode` in tokens/s; `call`, seconds to a complete tool call with
ten tools and a warm preamble, against JSON schemas and a JSON grammar; `call.form`, the same against the peer with our
own prompt and an equal GBNF grammar, so that the form and the engine are seen apart.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from edge_agent.agent import grammar, prompt
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Generate, Piece
from edge_agent.errors import Refused

ROUNDS = 5
CALL_ROUNDS = 3
PREFILL_SENTENCES = 50  # of about ten tokens
DECODE_TOKENS = 64
MAX_CALL = 96
CONTEXT = 2048

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
_JSON_SYSTEM = (
    "You run a device through its tools. Reply to each request with one JSON object "
    '{"name": ..., "arguments": {...}} that calls one of these tools:\n'
)
_GBNF = {
    "text": r'"\"" character* "\""' + "\n" + r'character ::= [^"\\\x00-\x1f] | "\\" ["\\nrtbf] | "\\u" [01] [0-9a-f]',
    "int": '"-"? ("0" | [1-9] [0-9]{0,8})',
    "float": '"-"? ("0" | [1-9] [0-9]{0,8}) ("." [0-9]{1,4})?',
}


def run(cache: Path | None = None, threads: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of the race (0 threads: all CPUs of this process). Raises Refused when llama-cpp-python is not installed."""
    try:
        from llama_cpp import Llama, LlamaGrammar
    except ImportError as error:
        hint = "make bench installs the extra 'bench': pip install 'outrider[bench]' (builds for some minutes)"
        raise Refused("llama-cpp-python, the peer of this benchmark, is not installed", hint) from error
    from edge_agent.engines.genai import GenaiModel
    from models.fetch import default_cache, fetch
    from models.package import build

    cache = cache or default_cache()
    ours = GenaiModel(build("smollm2", cache), threads=threads, context=CONTEXT)
    threads = ours.info.extra["threads"]

    def peer() -> Any:
        gguf = str(fetch("smollm2", cache))
        return Llama(gguf, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)

    shared = {"peer": f"llama-cpp-python {_version()}", "threads": threads, "model": ours.info.digest}
    shared["load"] = round(os.getloadavg()[0], 1)  # before the race: other work on the CPUs starves the peer most
    plain, formed = peer(), peer()
    yield {**_row("prefill", "tok/s", *_race(partial(_prefill, ours), partial(_peer_prefill, plain))), **shared}
    yield {**_row("decode", "tok/s", *_race(partial(_decode, ours), partial(_peer_decode, plain))), **shared}

    lark, schema = grammar.build(TOOLS), json.dumps(json_schema(TOOLS))
    call = partial(_call, ours, prompt.preamble(TOOLS), lark)
    form = LlamaGrammar.from_string(gbnf(lark), verbose=False)
    peer_form = partial(_peer_call, formed, prompt.preamble(TOOLS), form)
    listing = "\n".join(json.dumps(_json_tool(spec)) for spec in TOOLS)
    as_json = LlamaGrammar.from_json_schema(schema, verbose=False)
    peer_json = partial(_peer_call, plain, prompt.chatml("system", _JSON_SYSTEM + listing), as_json)
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


def _peer_prefill(llama: Any, turn: int) -> float:
    tokens = llama.tokenize(_text(turn).encode(), add_bos=False)
    started = time.perf_counter()
    next(llama.generate(tokens, temp=0.0, reset=True))
    return float(len(tokens) / (time.perf_counter() - started))


def _story(turn: int) -> str:
    return prompt.suffix([prompt.Turn("user", f"Write a long story about {turn + 10} machines.")])


def _decode(model: Any, turn: int) -> float:
    last = _last(model, Generate("", _story(turn), max_tokens=DECODE_TOKENS))
    return float((last.output_tokens - 1) / (last.total_s - last.first_token_s))


def _peer_decode(llama: Any, turn: int) -> float:
    stream = llama.generate(llama.tokenize(_story(turn).encode(), add_bos=False, special=True), temp=0.0)
    next(stream)
    started, count = time.perf_counter(), 0
    for token in stream:
        if token == llama.token_eos():
            break
        count += 1
        if count == DECODE_TOKENS - 1:
            break
    return float(count / (time.perf_counter() - started))


def _call(model: Any, preamble: str, lark: str, request: str) -> tuple[float, str]:
    started = time.perf_counter()
    task = Generate(preamble, prompt.suffix([prompt.Turn("user", request)]), lark, max_tokens=MAX_CALL)
    said = "".join(piece.text for piece in model.generate(task, lambda: False))
    return time.perf_counter() - started, said


def _peer_call(llama: Any, preamble: str, form: Any, request: str) -> tuple[float, str]:
    started = time.perf_counter()
    text = preamble + prompt.suffix([prompt.Turn("user", request)])
    said: list[int] = []
    for token in llama.generate(llama.tokenize(text.encode(), add_bos=False, special=True), temp=0.0, grammar=form):
        if token == llama.token_eos() or len(said) == MAX_CALL:
            break
        said.append(token)
    return time.perf_counter() - started, llama.detokenize(said).decode(errors="replace")


def _last(model: Any, request: Generate) -> Piece:
    last: Piece
    *_, last = model.generate(request, lambda: False)
    return last


def gbnf(lark: str) -> str:
    """The grammar of `grammar.build` in llama.cpp's form; texts may be of any length, which is faster there."""
    terminals = [line.split(":")[0] for line in lark.splitlines() if line[:1].isupper()]
    rules = [line for line in lark.splitlines() if not line[:1].isupper()]
    body = "\n".join(re.sub(r"^(\w+): ", lambda m: f"{m[1]} ::= ", rule) for rule in rules).replace(
        "start ::=", "root ::="
    )
    for name in terminals:
        body = re.sub(rf'(?<![\w"]){name}(?![\w"])', name.lower(), body)
    return "\n".join([body, *(f"{name.lower()} ::= {_GBNF[name.lower()]}" for name in terminals)]) + "\n"


def json_schema(specs: Sequence[ToolSpec]) -> dict[str, Any]:
    """One call of one of the tools, an answer or none, as a JSON schema."""
    answer = ToolSpec("answer", "", [Param("text", "str")])
    forms = [
        {
            "type": "object",
            "properties": {"name": {"const": spec.name}, "arguments": _json_arguments(spec)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for spec in (*specs, answer, ToolSpec("none", "", []))
    ]
    return {"anyOf": forms}


def _json_arguments(spec: ToolSpec) -> dict[str, Any]:
    kinds = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "choice": "string"}
    properties: dict[str, Any] = {}
    for param in spec.params:
        properties[param.name] = {"type": kinds[param.kind]}
        if param.choices:
            properties[param.name] = {"enum": param.choices}
        if param.low is not None:
            properties[param.name] |= {"minimum": param.low, "maximum": param.high}
    required = [param.name for param in spec.params if param.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _json_tool(spec: ToolSpec) -> dict[str, Any]:
    described = {"name": spec.name, "description": spec.description, "parameters": _json_arguments(spec)}
    return {"type": "function", "function": described}


def _version() -> str:
    from importlib.metadata import version

    return version("llama-cpp-python")
