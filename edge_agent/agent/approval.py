"""What stands between a dangerous call and its effect: somebody's signed word for this one call.

Invariants: a call that needs an approval stands in the transcript as `ask` before it can be given, with the digest that
the approval repeats: of the task, the place of the ask in the transcript, the tool and its arguments. So an approval is
good for one call, once, in one task; it is signed by the device's key, ends at the time the ask names, and is checked
right before the intent, also whether who gave it still may. Both are in the journal: they outlive a reboot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec

from edge_agent.agent import policy
from edge_agent.agent.calls import Call, render
from edge_agent.agent.transcript import Step, Task
from edge_agent.errors import Refused
from edge_agent.wire.errors import BadSignature
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import SigningKey, from_text, to_text

ACTION = "approve:call"
LASTS_S = 3600.0
_TOPIC = "approval"


class Approval(msgspec.Struct, frozen=True):
    """Who said what of which call, until when (seconds since the Unix epoch)."""

    digest: str
    by: Subject
    given: bool
    expires: float


def digest(task: Task, n: int, call: Call) -> str:
    """SHA-256 over a call and its place."""
    return hashlib.sha256(msgspec.json.encode([task.id, n, call.name, call.args])).hexdigest()


class Approvals:
    """Asks, gives and checks; `lasts` is how many seconds an ask stands."""

    def __init__(self, key: SigningKey, allowed: policy.Allowed, lasts: Callable[[], float] = lambda: LASTS_S) -> None:
        self._key, self._allowed, self._lasts = key, allowed, lasts

    def ask(self, task: Task, call: Call, at: str, now: float) -> Step:
        """The next step of the task."""
        text = digest(task, len(task.steps), call)
        return Step("ask", text, call, ts=now, at=at, expires=now + self._lasts())

    def give(self, task: Task | None, told: str, given: bool, by: Subject, now: float) -> Step:
        """The next step of a task that waits: `told` is the digest of the call as it was shown. Raises Refused."""
        ask = task.steps[-1] if task and task.state == "waiting" else None
        if ask is None or ask.role != "ask" or ask.call is None:
            raise Refused("the task waits for no approval", "GET /v1/tasks shows which do")
        if not self._allowed(by, ACTION, ask.call.name):
            hint = f"it needs {ACTION} for {ask.call.name}; the roles are {', '.join(by.roles) or 'none'}"
            raise policy.Forbidden(f"{by.name} may not approve {ask.call.name}", hint)
        if told != ask.text:
            raise Refused("that is not the call which waits", f"look again at {render(ask.call)}: it is {ask.text}")
        if now >= ask.expires:
            raise Refused(f"{render(ask.call)} waited too long", "ask for it anew")
        body = msgspec.json.encode(Approval(ask.text, by, given, ask.expires))
        text = f"{to_text(body)}.{self._key.sign(_TOPIC, body)}"
        return Step("approval", text, ask.call, ok=given, ts=now, at=ask.at, expires=ask.expires)

    def problem(self, task: Task, step: Step, now: float) -> str:
        """Why the call of an `approval`, the last step `at` there, is not made; empty when it may be."""
        assert step.call is not None
        n, what = task.steps.index(step) - 1, render(step.call)
        try:
            body, _, signature = step.text.partition(".")
            payload = from_text(body)
            self._key.public.verify(_TOPIC, payload, signature)
            said = msgspec.json.decode(payload, type=Approval)
        except (BadSignature, ValueError, msgspec.MsgspecError) as error:
            return f"the approval of {what} is not this device's: {error}"
        if said.digest != digest(task, n, step.call):
            return f"the approval is of another call than {what}"
        if not said.given:
            return f"{said.by.name} denied {what}"
        if now >= said.expires:
            return f"the approval of {what} by {said.by.name} has expired"
        return "" if self._allowed(said.by, ACTION, step.call.name) else f"{said.by.name} may no longer approve {what}"
