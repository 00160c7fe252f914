"""The policy's rules over live state: never start line 2 while its guard is open.

Invariants: a rule is asked right before every act, whoever asked for it and by whatever way it comes (task, workflow,
job, API, MCP), because it stands inside the tools themselves; an act that a rule forbids is refused by the rule's name;
what a rule looks at but cannot read or that is not as its tool declares it (its range, its unit), a rule that gives
neither true nor false, and a file that cannot be used forbid too. Reading is never held up. The file is read again when
it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from edge_agent.agent.act import Tools, shaped
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.rules import PolicyFile, Rule
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.workflow import evaluate, fill
from edge_agent.errors import OutriderError, Refused


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
                spec = specs[call.name]
                if spec.risk != "read":
                    raise ValueError(f"{spec.name} does more than read")
                value = await self._tools.call(spec.name, call.args, spec.timeout_s)
                seen[as_name] = shaped(spec.name, spec.returns, value)
            forbidden = evaluate(rule.never, seen)
            if not isinstance(forbidden, bool):
                raise ValueError(f"{rule.never} is neither true nor false")
        except (CallError, ToolError, ValueError, OutriderError) as error:
            what = f"{name} is not done: the interlock {rule.name} cannot be asked: {error}"
            raise Refused(what, rule.hint or "it forbids what it cannot see") from error
        if forbidden:
            raise Refused(f"{name} is not done: the interlock {rule.name} forbids it", rule.hint or rule.never)
