"""Several calls of one decision as a graph: what depends on what, what may run now, what a reference stands for.

Invariants: pure. All calls of a decision are valid, or none is made. A call depends on the calls it refers to; an act
also on all calls before it, and a reading on all acts before it, so acts are made in order, nothing is read before what
was to happen first, and readings that need nothing of one another run together. What depends on a failed call is not
made. Each call has its own place in the journal: `at`, of the decision's place and the call's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent.calls import Call, CallError, Decision, Ref, parse_all, validate
from edge_agent.agent.taint import typed
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Step


class Untrusted(CallError):
    """An argument of an act would come out of a text that somebody else wrote."""

    def __init__(self, message: str, call: Call) -> None:
        super().__init__(message)
        self.call = call


class Plan:
    """The calls of the decision at place `k` of a transcript."""

    def __init__(self, k: int, calls: Sequence[Call], specs: Sequence[ToolSpec]) -> None:
        self.calls, self.k, self.specs = calls, k, {spec.name: spec for spec in specs}
        self.dangers = len(calls) > 1 and any(self.specs[call.name].risk == "danger" for call in calls)

    def at(self, n: int) -> str:
        """Where the `n`th call (from 1) is journaled; a call that is alone has no place of its own."""
        return f"{self.k}.{n}" if len(self.calls) > 1 else ""

    def ready(self, steps: Sequence[Step]) -> list[int]:
        """What runs next, together: readings, or one act; nothing when all is done or a call failed."""
        done = {n: step for n in range(1, len(self.calls) + 1) if (step := self.result(n, steps)) is not None}
        if not all(step.ok for step in done.values()):
            return []
        left = [n for n in range(1, len(self.calls) + 1) if n not in done and self._needs(n) <= done.keys()]
        reads = [n for n in left if self._reads(n)]
        return reads or left[:1]

    def result(self, n: int, steps: Sequence[Step]) -> Step | None:
        """What came back of the `n`th call."""
        mine = [step for step in steps[self.k + 1 :] if step.role == "tool" and step.at == self.at(n)]
        return mine[-1] if mine else None

    def filled(self, n: int, steps: Sequence[Step]) -> Call:
        """The `n`th call with what it refers to. Raises CallError, Untrusted."""
        call, hidden = self.calls[n - 1], ""
        args: dict[str, Any] = {}
        for name, value in call.args.items():
            if isinstance(value, Ref):
                step, spec = self.result(value.n, steps), self.specs[self.calls[value.n - 1].name]
                found, declared = _found(value, step.result if step else None, spec.returns)
                hidden = hidden or ("" if typed(found, declared) else name)
                value = found
            args[name] = value
        made = validate(Call(call.name, args), list(self.specs.values()))
        if hidden and self._risk(n) != "read":
            raise Untrusted(f"{hidden} of {call.name} would be text that somebody else wrote", made)
        return made

    def _needs(self, n: int) -> set[int]:
        refs = {value.n for value in self.calls[n - 1].args.values() if isinstance(value, Ref)}
        return refs | {before for before in range(1, n) if not (self._reads(before) and self._reads(n))}

    def _reads(self, n: int) -> bool:
        return self._risk(n) == "read"

    def _risk(self, n: int) -> str:
        return self.specs[self.calls[n - 1].name].risk


def read(text: str, specs: Sequence[ToolSpec], most: int) -> list[Decision]:
    """What a model decided: valid calls, or one answer or nothing. Raises CallError."""
    found = parse_all(text)
    calls = [decision for decision in found if isinstance(decision, Call)]
    if not calls:
        return found[:1]
    if len(calls) > most:
        raise CallError(f"at most {most} calls at a time, not {len(calls)}")
    checked: list[Call] = []
    for call in calls:
        checked.append(_checked(call, checked, specs))
    return list(checked)


def _checked(call: Call, before: Sequence[Call], specs: Sequence[ToolSpec]) -> Call:
    """A call whose own arguments are valid, and whose references can be."""
    refs = {name: value for name, value in call.args.items() if isinstance(value, Ref)}
    known = {spec.name: spec for spec in specs}
    if not refs or call.name not in known:
        return validate(call, specs)
    spec = known[call.name]
    params = {param.name: param for param in spec.params}
    for name, ref in refs.items():
        if name not in params:
            validate(Call(call.name, {name: str(ref)}), specs)
        if ref.n > len(before):
            raise CallError(f"{name} of {call.name} is {ref}, but {len(before)} calls stand before it")
        returns = known[before[ref.n - 1].name].returns
        fields = [field.name for field in returns.fields] if returns else []
        if ref.field and fields and ref.field not in fields:
            raise CallError(f"{ref} does not exist; the fields of {before[ref.n - 1].name} are: {', '.join(fields)}")
    rest = {name: value for name, value in call.args.items() if name not in refs}
    own = msgspec.structs.replace(spec, params=[param for param in spec.params if param.name not in refs])
    args = validate(Call(call.name, rest), [own]).args | refs
    return Call(call.name, {name: args[name] for name in params if name in args})


def _found(ref: Ref, result: Any, declared: Param | None) -> tuple[Any, Param | None]:
    """The value a reference stands for, and how it is declared. Raises CallError."""
    if not ref.field:
        return result, declared
    if not isinstance(result, dict) or ref.field not in result:
        raise CallError(f"there is no {ref}")
    fields = declared.fields if declared and declared.kind == "dict" else []
    return result[ref.field], next((field for field in fields if field.name == ref.field), None)
