"""The grammar of what the model may emit, in llguidance's Lark form.

Invariants: the grammar accepts every decision that `calls.validate` passes and `calls.render` writes, and nothing that
`calls.parse` cannot read. It fixes the form (names, order of arguments, whitespace, lengths) so that most tokens are
forced, and it holds choices to their literals; it does not hold numbers to their ranges, because a model forced into
1..3 turns "line 7" into another line, where validation can refuse it and say so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from edge_agent.agent.calls import DECIMALS, MAX_DIGITS, MAX_TEXT, RESERVED
from edge_agent.agent.tool import Param, ToolSpec

_CHARACTER = r'([^"\\\x00-\x1f]|\\["\\nrtbf]|\\u00[01][0-9a-f])'
_TERMINALS = {
    "TEXT": rf'/"{_CHARACTER}{{0,{MAX_TEXT}}}"/',
    "INT": rf"/-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})/",
    "FLOAT": rf"/-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(\.[0-9]{{1,{DECIMALS}}})?/",
}
_KINDS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "bool": '("true" | "false")'}


def build(specs: Sequence[ToolSpec], *, answer: bool = True, none: bool = True) -> str:
    """A Lark grammar of one call of one of the tools, `answer("…")` or `none()`. Raises ValueError for a bad name."""
    reserved = [spec.name for spec in specs if spec.name in RESERVED]
    if reserved:
        raise ValueError(f"a tool cannot be named {reserved[0]}")
    rules = [f"tool{index}: {_tool(spec)}" for index, spec in enumerate(specs)]
    starts = [f"tool{index}" for index in range(len(specs))]
    starts += ['"answer(" TEXT ")"'] * answer + ['"none()"'] * none
    if not starts:
        raise ValueError("a grammar needs a tool, an answer or none")
    body = "\n".join(rules)
    used = [f"{name}: {pattern}" for name, pattern in _TERMINALS.items() if name in body or (name == "TEXT" and answer)]
    return "\n".join([f"start: {' | '.join(starts)}", *rules, *used]) + "\n"


def _tool(spec: ToolSpec) -> str:
    return f'"{spec.name}(" {_arguments(spec.params, first=True)} ")"'


def _arguments(params: Sequence[Param], first: bool) -> str:
    if not params:
        return '""' if first else ""
    param, rest = params[0], params[1:]
    here = f'"{"" if first else ", "}{param.name}=" {_value(param)}'
    taken = f"{here} {_arguments(rest, first=False)}".rstrip()
    if param.required:
        return taken
    if first:
        return f"({taken} | {_arguments(rest, first=True)})"
    return f"({here})? {_arguments(rest, first=False)}".rstrip()


def _value(param: Param) -> str:
    if param.kind == "choice":
        return f"({' | '.join(_literal(choice) for choice in param.choices)})"
    return _KINDS[param.kind]


def _literal(choice: str) -> str:
    if not choice.isprintable():
        raise ValueError(f"the choice {choice!r} cannot be shown to a model")
    return json.dumps(json.dumps(choice, ensure_ascii=False), ensure_ascii=False)
