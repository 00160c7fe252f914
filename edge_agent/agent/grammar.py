"""The grammar of what the model may emit, in llguidance's Lark form.

Invariants: the grammar accepts every decision that `calls.validate` passes and `calls.render` writes, and nothing that
`calls.parse` cannot read. It fixes the form (names, order of arguments, whitespace, lengths) so that most tokens are
forced, and it holds choices to their literals; it does not hold numbers to their ranges, because a model forced into
1..3 turns "line 7" into another line, where validation can refuse it and say so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from edge_agent.agent.calls import DECIMALS, MAX_DIGITS, MAX_TEXT, RESERVED, render_value
from edge_agent.agent.tool import Param, ToolSpec

_FIELD = r"\"{}\": "
_CHARACTER = r'([^"\\\x00-\x1f]|\\["\\nrtbf]|\\u00[01][0-9a-f])'
_TERMINALS = {
    "TEXT": rf'/"{_CHARACTER}{{0,{MAX_TEXT}}}"/',
    "INT": rf"/-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})/",
    "FLOAT": rf"/-?(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(\.[0-9]{{1,{DECIMALS}}})?/",
    "REF": r"/\$[1-9](\.[A-Za-z_][A-Za-z0-9_]{0,62})?/",
}
_ARGUMENT, _REFERABLE = "{}=", "{}=|"
_KINDS = {"int": "INT", "float": "FLOAT", "str": "TEXT", "bool": '("true" | "false")'}
_ANY = (
    'any: TEXT | FLOAT | "true" | "false" | anylist | anydict\n'
    'anylist: "[" (any (", " any)*)? "]"\n'
    'anydict: "{" (TEXT ": " any (", " TEXT ": " any)*)? "}"'
)


def build(
    specs: Sequence[ToolSpec], *, answer: bool = True, none: bool = True, several: int = 1, refs: bool = False
) -> str:
    """A Lark grammar of a call of one of the tools (up to `several`, a line each), `answer("…")` or `none()`.

    With `refs` an argument may be what another call gives. Raises ValueError for a bad name.
    """
    reserved = [spec.name for spec in specs if spec.name in RESERVED]
    if reserved:
        raise ValueError(f"a tool cannot be named {reserved[0]}")
    rules = [f"tool{index}: {_tool(spec, refs)}" for index, spec in enumerate(specs)]
    starts = [f"tool{index}" for index in range(len(specs))]
    if several > 1 and starts:
        rules.append(f"call: {' | '.join(starts)}")
        starts = [f'call ("\\n" call){{0,{several - 1}}}']
    starts += ['"answer(" TEXT ")"'] * answer + ['"none()"'] * none
    if not starts:
        raise ValueError("a grammar needs a tool, an answer or none")
    if any(re.search(r"\bany(list|dict)?\b", rule) for rule in rules):
        rules.append(_ANY)
    body = "\n".join(rules)
    used = [f"{name}: {pattern}" for name, pattern in _TERMINALS.items() if name in body or (name == "TEXT" and answer)]
    return "\n".join([f"start: {' | '.join(starts)}", *rules, *used]) + "\n"


def _tool(spec: ToolSpec, refs: bool) -> str:
    return f'"{spec.name}(" {_arguments(spec.params, True, _REFERABLE if refs else _ARGUMENT)} ")"'


def _arguments(params: Sequence[Param], first: bool, key: str) -> str:
    """Arguments of a call, or with another `key` fields of a dict: in declared order, optional ones left out."""
    if not params:
        return '""' if first else ""
    param, rest = params[0], params[1:]
    value = f"({_value(param)} | REF)" if key == _REFERABLE else _value(param)
    here = f'"{"" if first else ", "}{key.format(param.name).rstrip("|")}" {value}'
    more = _arguments(rest, False, key)
    taken = f"{here} {more}".rstrip()
    if param.required:
        return taken
    if first:
        return f"({taken} | {_arguments(rest, True, key)})"
    return f"({here})? {more}".rstrip()


def _value(param: Param) -> str:
    if param.kind == "choice":
        return f"({' | '.join(_literal(choice) for choice in param.choices)})"
    if param.kind == "list":
        if param.items is None:
            return "anylist"
        value = _value(param.items)
        return f'"[" ({value} (", " {value})*)? "]"'
    if param.kind == "dict":
        if not param.fields:
            return "anydict"
        return f'"{{" {_arguments(param.fields, True, _FIELD)} "}}"'
    if param.values:
        return f"({' | '.join(_number(param, value) for value in param.values)})"
    return _KINDS[param.kind]


def _number(param: Param, value: float) -> str:
    return f'"{value}" ".0"?' if param.kind == "float" and isinstance(value, int) else f'"{render_value(value)}"'


def _literal(choice: str) -> str:
    if not choice.isprintable():
        raise ValueError(f"the choice {choice!r} cannot be shown to a model")
    return json.dumps(json.dumps(choice, ensure_ascii=False), ensure_ascii=False)
