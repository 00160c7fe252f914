"""The device's policy file, and its rules over live state: never start line 2 while its guard is open.

Invariants: a rule is asked right before every act, whoever asked for it and by whatever way it comes (task, workflow,
job, API, MCP), because it stands inside the tools themselves; an act that a rule forbids is refused by the rule's name;
what a rule looks at but cannot read, a rule that gives neither true nor false, and a file that cannot be used forbid
too. Reading is never held up. The file is read again when it changes.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_agent.agent.act import Tools
from edge_agent.agent.approval import LASTS_S
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.workflow import compiled, evaluate, fill
from edge_agent.errors import OutriderError, Refused

_log = logging.getLogger("outrider.policy")


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A reading call; `${args.line}` in its arguments is of the act."""

    tool: str
    args: dict[str, Any] = {}


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`never` is a CEL expression over `tool`, `args` and each `look` by its name; `tools` are names, or patterns."""

    name: str
    tools: Annotated[list[str], Meta(min_length=1)]
    never: str
    look: dict[str, Look] = {}
    hint: str = ""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says; `approval_s`: how long an ask for an approval stands."""

    approval_s: Annotated[float, Meta(gt=0, le=7 * 86400)] = LASTS_S
    interlocks: Annotated[list[Rule], Meta(max_length=100)] = []


class PolicyFile:
    """A TOML file that need not be there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._read: Policy | Refused = Policy()

    def read(self) -> Policy:
        """What it says now. Raises Refused when it cannot be used."""
        try:
            stat = self._path.stat()
            stamp = stat.st_mtime_ns, stat.st_size
        except FileNotFoundError:
            self._stamp, self._read = None, Policy()
            return self._read
        except OSError as error:
            raise Refused(f"{self._path} cannot be read: {error}", "mend it: no act is made before") from error
        if stamp != self._stamp:
            self._stamp, self._read = stamp, _load(self._path)
            if isinstance(self._read, Refused):
                _log.error("%s", self._read)
        if isinstance(self._read, Refused):
            raise self._read
        return self._read

    def approval_s(self) -> float:
        """How long an ask stands, seconds; the default while the file cannot be used."""
        try:
            return self.read().approval_s
        except Refused:
            return LASTS_S


def _load(path: Path) -> Policy | Refused:
    try:
        policy = msgspec.convert(tomllib.loads(path.read_text()), Policy)
        for rule in policy.interlocks:
            compiled(rule.never)
        return policy
    except (OSError, ValueError) as error:  # TOML, UTF-8, msgspec and CEL say where
        return Refused(f"{path} cannot be used: {error}", "mend it: no act is made before")


class Interlocked:
    """Tools whose acts are made only when no rule in `files` forbids them: the device's own, and its bundles'."""

    def __init__(self, tools: Tools, file: PolicyFile) -> None:
        self._tools, self.files = tools, {"": file}

    async def specs(self) -> Sequence[ToolSpec]:
        return await self._tools.specs()

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        specs = {spec.name: spec for spec in await self._tools.specs()}
        if name not in specs or specs[name].risk != "read":
            for rule in [rule for file in self.files.values() for rule in file.read().interlocks]:
                if any(fnmatchcase(name, pattern) for pattern in rule.tools):
                    await self._ask(rule, name, args, specs)
        return await self._tools.call(name, args, timeout_s)

    async def _ask(self, rule: Rule, name: str, args: dict[str, Any], specs: Mapping[str, ToolSpec]) -> None:
        """Raises Refused unless the rule allows the call."""
        seen: dict[str, Any] = {"tool": name, "args": args}
        try:
            for as_name, look in rule.look.items():
                call = validate(Call(look.tool, fill(look.args, {"tool": name, "args": args})), list(specs.values()))
                if specs[call.name].risk != "read":
                    raise ValueError(f"{call.name} does more than read")
                seen[as_name] = await self._tools.call(call.name, call.args, specs[call.name].timeout_s)
            forbidden = evaluate(rule.never, seen)
            if not isinstance(forbidden, bool):
                raise ValueError(f"{rule.never} is neither true nor false")
        except (CallError, ToolError, ValueError, OutriderError) as error:
            what = f"{name} is not done: the interlock {rule.name} cannot be asked: {error}"
            raise Refused(what, rule.hint or "it forbids what it cannot see") from error
        if forbidden:
            raise Refused(f"{name} is not done: the interlock {rule.name} forbids it", rule.hint or rule.never)
