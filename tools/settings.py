"""A pack's settings: one TOML file, looked for in three places.

`--option NAME.config=FILE`; `tools/NAME.toml` beside the file that OUTRIDER_CONFIG names; `NAME.toml` in the tools'
state folder. What is there but cannot be used is an error with file, key and reason, never a default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from edge_agent.agent.tool import Param, Tool

T = TypeVar("T")
Secret = Annotated[str, Meta(pattern="^(TOOL_[A-Z0-9_]+)?$")]
"""A variable of the environment; of the daemon's, those that begin with TOOL_ reach the tools."""
MAX_RESULT = 60 * 1024
"""Bytes of JSON that a pack's tool gives at most: the tool runner refuses a result over 64 KiB."""


def read(name: str, state: Path, options: dict[str, str], kind: type[T], needed: bool = True) -> T:
    """The settings of pack `name`; its defaults when it has no file and none is `needed`. Raises ValueError."""
    if unknown := options.keys() - {"config"}:
        raise ValueError(f"the pack {name} has no option {', '.join(sorted(unknown))}; it has config, a TOML file")
    places = [state / f"{name}.toml"]
    if beside := os.environ.get("OUTRIDER_CONFIG"):
        places.insert(0, Path(beside).parent / "tools" / f"{name}.toml")
    if "config" in options:
        places = [Path(options["config"])]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        if needed or "config" in options:
            raise ValueError(f"the pack {name} needs a file: {' or '.join(map(str, places))} (docs/tools.md)")
        return msgspec.convert({}, kind)
    try:
        return msgspec.convert(tomllib.loads(file.read_text()), kind)
    except (OSError, ValueError) as error:  # TOML, UTF-8 and msgspec say where
        raise ValueError(f"{file} cannot be used: {error}") from error


def choosing(tool: Tool, returns: Param | None = None, **choices: Iterable[str]) -> Tool:
    """The tool with these arguments as choices of what the settings name, and with `returns` where that depends on
    them."""
    params = [
        msgspec.structs.replace(param, kind="choice", choices=sorted(choices[param.name]))
        if param.name in choices
        else param
        for param in tool.spec.params
    ]
    spec = msgspec.structs.replace(tool.spec, params=params, returns=returns or tool.spec.returns)
    return msgspec.structs.replace(tool, spec=spec)


def fields(*of: Param) -> Param:
    """A result with these fields."""
    return Param("result", "dict", fields=list(of))
