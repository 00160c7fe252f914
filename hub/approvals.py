"""Dangerous calls that wait on a device for somebody's word, and that word.

Invariants: what is shown is what the device reported, read as data; an answer repeats the digest that was shown, so it
is good for that call alone; who may give it is asked here and on the device again, by the same rule; it is in the audit
log before it is sent. What comes of it is the end of the job that carries it, and of the task.
"""

import time
from functools import partial
from typing import Any

import msgspec

from edge_agent.wire.grants import Subject, allowed
from edge_agent.wire.messages import TERMINAL, JobKind
from hub.audit import Audit
from hub.auth import Auth
from hub.errors import Refused
from hub.jobs import Jobs

ACTION = "approve:call"


class Ask(msgspec.Struct, frozen=True):
    """A call of `tool` that a task waits with, in words; who asked for the task, with which text, and until when; `why`
    it needs an approval, if not for its danger."""

    id: str
    digest: str
    call: str
    tool: str
    text: str = ""
    at: str = ""
    why: str = ""
    subject: str = ""
    expires: float = 0.0


def asks(device: dict[str, Any]) -> list[Ask]:
    """What waits on a device, the first to expire first; what cannot be read is left out."""
    waiting, found = device["reported"].get("waiting"), []
    for id, told in waiting.items() if isinstance(waiting, dict) else ():
        try:
            found.append(msgspec.convert({**told, "id": id}, Ask))
        except (msgspec.ValidationError, TypeError):
            continue
    return sorted((a for a in found if a.expires > time.time()), key=lambda a: (a.expires, a.id))


def why_not(auth: Auth, subject: Subject, device: str, ask: Ask) -> str:
    """Why the subject may not answer, or the empty string."""
    if allowed(auth.grants, subject, ACTION, ask.tool, now=time.time(), device=device):
        return ""
    return f"{subject.name} may not {ACTION} of {ask.tool}: their roles are {', '.join(subject.roles) or 'none'}"


async def answer(auth: Auth, audit: Audit, jobs: Jobs, subject: Subject, device: str, ask: Ask, approve: bool) -> str:
    """Send somebody's word; the id of the job that carries it. Raises Refused 403, and what `Jobs.create` does."""
    if reason := why_not(auth, subject, device, ask):
        raise Refused(403, reason, "ask an admin")
    detail = {"device": device, "task": ask.id, "call": ask.call, "digest": ask.digest}
    await audit.add(subject.name, f"{'approve' if approve else 'deny'}:call", detail)
    body = {"tool": "approve_call", "args": {"id": ask.id, "call": ask.digest, "approve": approve}}
    key, ttl_s = f"{ask.digest[:48]}-{approve}-{subject.name}", max(60.0, ask.expires - time.time())
    send = partial(jobs.create, device, JobKind.TOOL, body, subject=subject.name, roles=subject.roles, ttl_s=ttl_s)
    made = await send(idempotency_key=key)
    if made["state"] in TERMINAL:  # given before, and of no avail: the call still waits
        made = await send()
    return str(made["id"])
