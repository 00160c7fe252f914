"""YAML of workflows: a subset with no anchors, aliases and tags, and where each value stands."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import msgspec
import yaml

from edge_agent.agent.workflow import Broken, Marks, Problem


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]{1,15}", list("-+0123456789")),
    ("float", r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,2})?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_SCALARS: dict[str, Any] = {"null": lambda _: None, "bool": "true".__eq__, "int": int, "float": float, "str": str}


def plain(text: str, marks: Marks) -> Any:
    """What the text says, and its marks. Raises Broken."""
    try:
        node = yaml.compose(text, _Loader)
        return _plain(node, "$", marks, set()) if node else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise Broken(Problem(line, column, f"not YAML: {error.problem or error.context}")) from error
    except yaml.YAMLError as error:
        raise Broken(Problem(1, 1, f"not YAML: {error}")) from error
    except RecursionError as error:
        raise Broken(Problem(1, 1, "nested too deep")) from error


def _plain(node: yaml.Node, path: str, marks: Marks, seen: set[int]) -> Any:
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    kind = node.tag.rpartition(":")[2]
    if id(node) in seen or kind not in (*_SCALARS, "seq", "map"):
        raise Broken(marks.problem(path, "anchors, aliases and tags are not taken", "write it out"))
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        try:
            return _SCALARS[kind](node.value)
        except (KeyError, ValueError) as error:  # a tag, such as `!!int two`
            raise Broken(marks.problem(path, f"{node.value!r:.60} is no {kind}", "leave its tag out")) from error
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{path}[{n}]", marks, seen) for n, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, item in node.value:
        at = f"{path}.{key.value}"
        if not isinstance(key, yaml.ScalarNode) or at in marks:
            where = Problem(key.start_mark.line + 1, key.start_mark.column + 1, f"the key {key.value!r} is not taken")
            raise Broken(msgspec.structs.replace(where, hint="a key is a text and stands once"))
        value = _plain(item, at, marks, seen)
        if isinstance(item, yaml.CollectionNode):
            marks[at] = (key.start_mark.line + 1, key.start_mark.column + 1)
        found[key.value] = value
    return found
