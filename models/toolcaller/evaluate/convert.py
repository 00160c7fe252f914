"""BFCL's function schemas as tools, and calls of those tools as BFCL's checker takes them.

Invariants: every schema becomes tools that `prompt`, `grammar` and `calls` take; names that are no identifiers (dots,
dashes, doubles) are replaced and `Tools.back` restores them; what a declaration cannot hold takes the nearest wider
form and is listed in `loose`, never dropped in silence. Long descriptions are cut: a tool is one line of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edge_agent.agent.calls import MAX_DEPTH, RESERVED, Call
from edge_agent.agent.tool import Kind, Param, ToolSpec

MAX_DESCRIPTION = 600
MAX_ABOUT = 300
_KINDS: dict[str, Kind] = {
    "integer": "int",
    "float": "float",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "array": "list",
    "tuple": "list",
    "dict": "dict",
    "object": "dict",
}


class Tools(msgspec.Struct, frozen=True):
    """Converted functions; `names` and `params` lead from ours to theirs."""

    specs: list[ToolSpec]
    names: dict[str, str]
    params: dict[str, dict[str, str]]
    loose: list[str]

    def back(self, calls: Sequence[Call]) -> list[dict[str, dict[str, Any]]]:
        """Calls in the form of BFCL: `[{name: {parameter: value}}]`."""
        return [
            {self.names[call.name]: {self.params[call.name][key]: value for key, value in call.args.items()}}
            for call in calls
        ]


def convert(functions: Sequence[Mapping[str, Any]]) -> Tools:
    """The tools of one case."""
    tools = Tools([], {}, {}, [])
    for function in functions:
        name = _identifier(function["name"], {*tools.names, *RESERVED})
        schema = function.get("parameters", {})
        params: dict[str, str] = {}
        made = []
        for key, value in schema.get("properties", {}).items():
            ours = _identifier(key, params)
            params[ours] = key
            made.append(_param(ours, value, key in schema.get("required", []), tools.loose))
        tools.names[name], tools.params[name] = function["name"], params
        tools.specs.append(ToolSpec(name, _cut(function.get("description", ""), MAX_DESCRIPTION), made))
    return tools


def _param(name: str, schema: Mapping[str, Any], required: bool, loose: list[str], depth: int = 1) -> Param:
    kind = _KINDS.get(str(schema.get("type")))
    about = _cut(schema.get("description", ""), MAX_ABOUT // depth)
    choices = schema.get("enum") or []
    if choices and kind == "str" and all(isinstance(c, str) and c.isprintable() for c in choices):
        return Param(name, "choice", choices=list(dict.fromkeys(choices)), required=required, about=about)
    if choices:
        loose.append(f"choices of {schema.get('type')}")
        about = _cut(f"one of {', '.join(map(str, choices))}; {about}", MAX_ABOUT)
    if kind is None:
        loose.append(f"type {schema.get('type')}")
        kind = "str"  # what BFCL's checker takes for `any`
    items: Param | None = None
    fields: list[Param] = []
    inner = schema.get("items")
    if kind == "list" and isinstance(inner, Mapping) and inner.get("type") and depth < MAX_DEPTH:
        items = _param("", inner, True, loose, depth + 1)
    if kind == "dict":
        fields = _fields(schema, loose, depth)
    if (kind == "list" and items is None) or (kind == "dict" and not fields):
        loose.append(f"free {kind}")
    low, high = (schema.get(key) if kind in ("int", "float") else None for key in ("minimum", "maximum"))
    return Param(name, kind, low=low, high=high, required=required, about=about, items=items, fields=fields)


def _fields(schema: Mapping[str, Any], loose: list[str], depth: int) -> list[Param]:
    inner = schema.get("properties") or {}
    if depth >= MAX_DEPTH or any(not key.isprintable() or set(key) & set('"\\') for key in inner):
        return []
    needed = schema.get("required", [])
    return [_param(key, value, key in needed, loose, depth + 1) for key, value in inner.items()]


def _identifier(name: str, taken: Mapping[str, Any] | set[str]) -> str:
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)[:58]
    plain = plain if re.match(r"[A-Za-z_]", plain) else f"f_{plain}"
    number, found = 1, plain
    while found in taken:
        number += 1
        found = f"{plain}_{number}"
    return found


def _cut(text: str, limit: int) -> str:
    """One line of at most `limit` characters, cut behind a sentence or a word."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    head = line[:limit]
    stop = head.rfind(". ")
    return head[: stop + 1] if stop > limit // 3 else f"{head.rpartition(' ')[0] or head}…"
