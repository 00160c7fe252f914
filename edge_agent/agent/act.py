"""From a call to its effect: the one way for the loop and for workflows.

Invariants: policy is asked right before each call; the intent of a call is on disk before its effect and its result
before what follows; a call whose effect is unknown, after a crash or because the tool runner died, is made again only
when its tool is idempotent or takes the call's key (the same both times), and never otherwise; a dangerous call waits
for its approval before its intent, and one that was refused ends the task, or the step of a workflow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from edge_agent.agent import policy, prompt
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call, render
from edge_agent.agent.tool import Param, ToolError, ToolSpec
from edge_agent.agent.transcript import State, Step, Task, Transcripts
from edge_agent.errors import OutriderError, Refused


class Tools(Protocol):
    """The tool runner's client."""

    async def specs(self) -> Sequence[ToolSpec]:
        """The tools there are, once the runner serves. Raises Retry."""
        ...

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        """The JSON result. Raises ToolError (ordinary failure), Refused (not made), Retry (effect unknown)."""
        ...


class Ended(Exception):
    """The task is over, or waits; carries its state."""

    def __init__(self, state: State, *, answer: str = "", error: str = "") -> None:
        super().__init__(state, answer, error)
        self.state, self.answer, self.error = state, answer, error


class Acts:
    """Makes calls for tasks."""

    def __init__(
        self,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        clock: Callable[[], float],
        approvals: Approvals | None = None,
    ) -> None:
        self._tools, self._transcripts, self._allowed, self._clock = tools, transcripts, allowed, clock
        self._approvals = approvals

    async def act(self, task: Task, spec: ToolSpec, call: Call, limit_s: float, at: str = "") -> Step:
        """What came back, as the last step of the task; goes on with a call that its last step `at` there left open.

        Raises Refused when policy or a person forbids it, Ended when its effect is unknown, or it waits.
        """
        mine = [step for step in task.steps if step.at == at]
        begun = bool(mine) and mine[-1].role == "intent"
        if begun and not spec.repeatable:
            await self._unknown(task, call, at)
        policy.check(spec, task.subject, self._allowed)
        if spec.risk == "danger" and not begun:
            await self._approved(task, call, at, mine[-1] if mine else None)
        if not begun:
            await self._transcripts.append(task, Step("intent", call=call, ts=self._clock(), at=at))
        key = f"{task.id}:{at or sum(step.role == 'intent' for step in task.steps)}"
        began, value, text, ok = time.monotonic(), None, "", True
        try:
            value = await self._tools.call(call.name, spec.keyed_args(call.args, key), limit_s)
            if at:  # the expressions of a workflow rely on types
                value = shaped(spec.name, spec.returns, value)
            text = prompt.result_text(value)
        except (ToolError, Refused) as error:
            text, ok = str(error), False
        except OutriderError as error:
            if not spec.repeatable:
                await self._unknown(task, call, at)
            text, ok = f"{call.name} did not finish: {error}", False
        ms = (time.monotonic() - began) * 1e3
        step = Step("tool", text, call, value if ok else None, ok, self._clock(), ms, at=at)
        await self._transcripts.append(task, step)
        return step

    async def _approved(self, task: Task, call: Call, at: str, last: Step | None) -> None:
        """Raises Ended("waiting") while there is no approval, Refused when there will be none."""
        now, said = self._clock(), ""
        if self._approvals is None:
            raise Refused(f"{call.name} is dangerous and needs an approval", "here nobody can give one")
        if last is None or last.role not in ("ask", "approval"):
            last = self._approvals.ask(task, call, at, now)
            await self._transcripts.append(task, last)
        if last.role == "approval":
            said = self._approvals.problem(task, last, now)
        elif now < last.expires:
            raise Ended("waiting", error=f"waits for an approval of {render(call)}")
        else:
            said = f"nobody approved {render(call)} in time"
        if said:
            await self._transcripts.append(task, Step("tool", said, call, ok=False, ts=now, at=at))
            raise Refused(said)

    async def _unknown(self, task: Task, call: Call, at: str) -> NoReturn:
        reason = f"interrupted: effect unknown of {at}{at and ': '}{render(call)}"
        await self._transcripts.append(task, Step("tool", reason, call, ok=False, ts=self._clock(), at=at))
        raise Ended("failed", error=f"{reason} (look at the device before you ask again)")


def shaped(tool: str, returns: Param | None, value: Any) -> Any:
    """The result as it is declared: whole numbers where numbers with decimals are meant become such.

    Raises ToolError when it is something else: the tool broke its word.
    """
    if returns is None:
        return value
    if returns.kind == "list" and isinstance(value, list):
        return [shaped(tool, returns.items, item) for item in value]
    if returns.kind == "dict" and isinstance(value, dict):
        if missing := [field.name for field in returns.fields if field.required and field.name not in value]:
            raise ToolError(f"the result of {tool} has no {missing[0]}")
        kinds = {field.name: field for field in returns.fields}
        return {key: shaped(tool, kinds.get(key), item) for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match returns.kind:
        case "int" if number and value == int(value):
            return int(value)
        case "float" if number:
            return float(value)
        case "bool" if isinstance(value, bool):
            return value
        case "str" if isinstance(value, str):
            return value
        case "choice" if value in returns.choices:
            return value
    raise ToolError(f"the {returns.name} of {tool} is {value!r:.60}, which is no {returns.kind}")
