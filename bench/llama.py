"""The peer llama-cpp-python: opened with the base model's own GGUF file, told of the tools in JSON schemas, and timed.

Invariant: a call is timed from the request's text to the whole output, with the prefix in the peer's cache as in ours.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_agent.agent import prompt
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.errors import Refused

CONTEXT = 2048
MAX_CALL = 96
HINT = "make bench installs the extra 'bench': pip install 'outrider[bench]' (builds for some minutes)"
_SYSTEM = (
    "You run a device through its tools. Reply to each request with one JSON object "
    '{"name": ..., "arguments": {...}} that calls one of these tools:\n'
)
_GBNF = {
    "text": r'"\"" character* "\""' + "\n" + r'character ::= [^"\\\x00-\x1f] | "\\" ["\\nrtbf] | "\\u" [01] [0-9a-f]',
    "int": '"-"? ("0" | [1-9] [0-9]{0,8})',
    "float": '"-"? ("0" | [1-9] [0-9]{0,8}) ("." [0-9]{1,4})?',
}


def peer() -> str:
    """Name and version. Raises Refused when it is not installed."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError as error:
        raise Refused("llama-cpp-python, the peer of this benchmark, is not installed", HINT) from error
    return f"llama-cpp-python {version('llama-cpp-python')}"


def load(cache: Path, threads: int) -> Any:
    """The base model in the peer."""
    from llama_cpp import Llama

    from models.fetch import fetch

    gguf = str(fetch("smollm2", cache))
    return Llama(gguf, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)


def call(llama: Any, preamble: str, form: Any, request: str) -> tuple[float, str]:
    """Seconds to the whole output, and the output."""
    started = time.perf_counter()
    text = preamble + prompt.suffix([prompt.Turn("user", request)])
    said: list[int] = []
    for token in llama.generate(llama.tokenize(text.encode(), add_bos=False, special=True), temp=0.0, grammar=form):
        if token == llama.token_eos() or len(said) == MAX_CALL:
            break
        said.append(token)
    return time.perf_counter() - started, llama.detokenize(said).decode(errors="replace")


def json_preamble(specs: Sequence[ToolSpec]) -> str:
    """System text with the tools' JSON schemas."""
    return prompt.chatml("system", _SYSTEM + "\n".join(json.dumps(_json_tool(spec)) for spec in specs))


def json_form(specs: Sequence[ToolSpec]) -> Any:
    """The peer's grammar of `json_schema`."""
    from llama_cpp import LlamaGrammar

    return LlamaGrammar.from_json_schema(json.dumps(json_schema(specs)), verbose=False)


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
        if param.about:
            properties[param.name]["description"] = param.about
    required = [param.name for param in spec.params if param.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _json_tool(spec: ToolSpec) -> dict[str, Any]:
    described = {"name": spec.name, "description": spec.description, "parameters": _json_arguments(spec)}
    return {"type": "function", "function": described}
