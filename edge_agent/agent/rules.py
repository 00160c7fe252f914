"""The device's policy file: every threshold of the agent, and its rules over live state, in one TOML file.

Invariants: it need not be there, and is read again when it changes; a file that cannot be used forbids every act
(`read`), while what only reads goes on with what could be read last (`now`).
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edge_agent.agent import condition, prompt, said
from edge_agent.agent.approval import LASTS_S
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Task
from edge_agent.agent.workflow import compiled
from edge_agent.errors import Refused

_log = logging.getLogger("outrider.policy")
Share = Annotated[float, Meta(ge=0, le=1)]
More = Annotated[float, Meta(gt=0)]
NoLess = Annotated[float, Meta(ge=0)]


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


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one task may use: decisions, generated tokens, seconds since its run began; joules and cost, 0 for any."""

    steps: Annotated[int, Meta(ge=1, le=1000)] = 8
    tokens: Annotated[int, Meta(ge=1)] = 512
    seconds: NoLess = 120.0
    joules: NoLess = 0.0
    cost: NoLess = 0.0


class Confidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A decision less sure than `ask` is put to the vote of `samples` more; less sure than `route` then, the next model
    is asked, and after the last one a person. 0 for never."""

    ask: Share = 0.0
    route: Share = 0.0
    samples: Annotated[int, Meta(ge=1, le=9)] = 3
    temperature: Annotated[float, Meta(gt=0, le=2)] = 0.7


class OutputRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer in which `match` (a regular expression) is found, or of which `when` (CEL) holds, loses `weight`."""

    name: str
    match: Annotated[str, Meta(max_length=500)] = ""
    when: str = ""
    weight: Annotated[float, Meta(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        if bool(self.match) == bool(self.when):
            raise ValueError(f"the output rule {self.name} has either match or when")


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says; `approval_s`: how long an ask for an approval stands.

    `untrusted`: whether an act that only untrusted text is a reason for is refused, or waits for an approval.
    `questions`: whether a request that only asks may have acts, or what reads alone. `conditions`: whether what an
    act depends on is held to it (condition.py). `unsaid`: whether an act may have a number that nobody said (said.py),
    and a local model's call an option without a reason (meant.py). `repeats` of a call with one result, and
    `wrong_calls`, end a task; `calls` may stand in one decision; `window` is of tokens of a conversation that stay as
    they were; `watts` is what the device draws, where nothing measures; an answer whose
    score under the `output` rules is less than `least` is withheld.
    """

    approval_s: Annotated[float, Meta(gt=0, le=7 * 86400)] = LASTS_S
    untrusted: Literal["refuse", "ask"] = "refuse"
    questions: Literal["read", "act"] = "read"
    conditions: Literal["hold", "act"] = "hold"
    unsaid: Literal["refuse", "act"] = "refuse"
    repeats: Annotated[int, Meta(ge=2, le=100)] = 3
    wrong_calls: Annotated[int, Meta(ge=1, le=100)] = 3
    calls: Annotated[int, Meta(ge=1, le=8)] = 8
    window: Annotated[int, Meta(ge=0, le=4000)] = 300
    watts: NoLess = 0.0
    budget: Budget = Budget()
    confidence: Confidence = Confidence()
    interlocks: Annotated[list[Rule], Meta(max_length=100)] = []
    output: Annotated[list[OutputRule], Meta(max_length=100)] = []
    least: Share = 0.5

    def fit(self, specs: Sequence[ToolSpec], task: Task, hide: bool = False) -> Sequence[ToolSpec]:
        """The tools as a task may call them: what reads, where it only asks or its condition is not (known to be) met;
        acts with numbers that were said.

        Where a person may decide, also with numbers of untrusted texts, unless they are hidden from the model (`hide`).
        """
        waits = self.conditions == "hold" and condition.known(task, specs) in ("unread", "unmet")
        if waits:  # what is said for later is judged when it is done
            specs = [spec for spec in specs if spec.risk == "read" or any(param.later for param in spec.params)]
        if self.questions == "read" and prompt.only_asks(task.text):
            return [spec for spec in specs if spec.risk == "read"]
        heard = self.untrusted == "ask" and not hide
        return said.narrow(specs, task, heard) if self.unsaid == "refuse" else specs


class PolicyFile:
    """A TOML file that need not be there; `seconds` is a task's budget where it says nothing of it."""

    def __init__(self, path: Path, seconds: float = Budget().seconds) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._default = Policy(budget=Budget(seconds=seconds))
        self._read: Policy | Refused = self._default
        self._good = self._default

    def read(self) -> Policy:
        """What it says now. Raises Refused when it cannot be used."""
        try:
            stat = os.stat(self._path)  # noqa: PTH116 - each step asks, and a Path takes twice as long
            stamp = stat.st_mtime_ns, stat.st_size
        except FileNotFoundError:
            self._stamp, self._read, self._good = None, self._default, self._default
            return self._default
        except OSError as error:
            raise Refused(f"{self._path} cannot be read: {error}", "mend it: no act is made before") from error
        if stamp != self._stamp:
            self._stamp, self._read = stamp, self._load()
            if isinstance(self._read, Refused):
                _log.error("%s", self._read)
        if isinstance(self._read, Refused):
            raise self._read
        self._good = self._read
        return self._read

    def now(self) -> Policy:
        """What it says, or said when it could be used."""
        try:
            return self.read()
        except Refused:
            return self._good

    def _load(self) -> Policy | Refused:
        try:
            said = tomllib.loads(self._path.read_text())
            if isinstance(budget := said.get("budget", {}), dict):
                said["budget"] = {"seconds": self._default.budget.seconds, **budget}
            policy = msgspec.convert(said, Policy)
            for expression in [rule.never for rule in policy.interlocks] + [r.when for r in policy.output if r.when]:
                compiled(expression)
            for rule in policy.output:
                re.compile(rule.match)
            return policy
        except (OSError, ValueError, re.error) as error:  # TOML, UTF-8, msgspec, CEL and re say where
            return Refused(f"{self._path} cannot be used: {error}", "mend it: no act is made before")
