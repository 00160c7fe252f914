"""A transcript for people: as lines of text, and as the short JSON that the hub is told.

Invariants: pure but for the local time; whatever a step holds is shown cut to a bound and never fails; what leaves the
device this way is bounded in bytes, the first and the last steps of a long transcript are there and the gap is said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent.approval import Approval
from edge_agent.agent.calls import render
from edge_agent.agent.transcript import Step, Task
from edge_agent.wire.signing import from_text

MAX_TEXT = 500  # characters of a step
MAX_RESULT = 8 * 1024  # bytes
MAX_BYTES = 24 * 1024  # of a transcript, encoded


def told(step: Step) -> dict[str, Any]:
    """A step as the hub is told it: the call in words, texts cut, no result beside its text."""
    made: dict[str, Any] = msgspec.to_builtins(step)
    made.pop("result", None)
    made = {key: round(value, 3) if isinstance(value, float) else value for key, value in made.items()}
    if step.call is not None:
        made["call"] = render(step.call)[:MAX_TEXT]
    if step.role == "approval":
        made["text"] = _by(step)
    if len(step.text) > MAX_TEXT and step.role != "approval":
        made["text"] = step.text[:MAX_TEXT] + "…"
    return made


def told_all(steps: list[Step]) -> list[dict[str, Any]]:
    """The steps of a task, in at most MAX_BYTES."""
    head, tail = [told(step) for step in steps[:2]], list[dict[str, Any]]()
    left = MAX_BYTES - len(msgspec.json.encode(head))
    for step in reversed(steps[2:]):
        made = told(step)
        left -= len(msgspec.json.encode(made)) + 1
        if left < 0:
            gap = {"role": "…", "text": f"{len(steps) - len(head) - len(tail)} steps are not shown here"}
            return [*head, gap, *reversed(tail)]
        tail.append(made)
    return [*head, *reversed(tail)]


def summary(task: Task) -> dict[str, Any]:
    """What the hub is told of a task that is over: its answer, and the transcript, cut short."""
    return {
        "answer": task.answer[:2000],
        "sources": task.sources,
        "result": bounded(task.result),
        "steps": told_all(task.steps),
        "runs": task.runs,
        "seconds": round(task.finished - task.created, 3),
    }


def bounded(value: Any) -> Any:
    """The value, or its beginning as text when it is too large for a record."""
    encoded = msgspec.json.encode(value)
    return value if len(encoded) <= MAX_RESULT else encoded[:MAX_RESULT].decode(errors="ignore") + "…"


def ask(task: Task, step: Step) -> dict[str, Any]:
    """What somebody needs to see who decides about the call that a task waits with; `tool` is what they need to may."""
    call = step.call
    return {
        "digest": step.text,
        "call": _cut(render(call), 400) if call else "",
        "why": _cut(step.why, 400),
        "tool": call.name if call else "",
        "text": _cut(task.text, 400),
        "at": step.at,
        "subject": task.subject.name,
        "expires": step.expires,
    }


def _by(step: Step) -> str:
    """Who gave an approval."""
    try:
        said = msgspec.json.decode(from_text(step.text.partition(".")[0]), type=Approval)
        return said.by.name
    except (ValueError, msgspec.MsgspecError):
        return "unreadable"


def cited(steps: Sequence[Step]) -> list[str]:
    """The documents that results name (dicts with a `source`, and perhaps its `part`): `manual.md 3, 4`."""
    found: dict[str, list[str]] = {}
    values: list[Any] = [step.result for step in reversed(steps) if step.role == "tool" and step.ok]
    while values:
        value = values.pop()
        if isinstance(value, dict) and isinstance(source := value.get("source"), str):
            parts, part = found.setdefault(source[:200], []), str(value.get("part", ""))[:20]
            parts += [part] if part and part not in parts else []
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        values += reversed(list(inner))
    return [f"{source} {', '.join(parts[:10])}".strip() for source, parts in list(found.items())[:20]]


def title(task: Task) -> str:
    """A task in one line."""
    took = f"{(task.finished or time.time()) - task.created:.1f} s"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(task.created))
    return f"{task.id}  {task.state:<9}  {when}  {took:>8}  {task.subject.name}: {_cut(task.text, 80)}"


def line(step: Step, task: Task) -> tuple[str, str]:
    """A step as text, and its tone: "", bad or wait."""
    since, what = max(0.0, step.ts - task.created), _cut(step.text or (render(step.call) if step.call else ""), 300)
    tone, call = "" if step.ok else "bad", _cut(render(step.call), 300) if step.call else "?"
    match step.role:
        case "ask":
            until = time.strftime("%H:%M:%S", time.localtime(step.expires))
            why = step.why and f" {step.why};"
            what, tone = f"may {call} be done?{why} until {until}, {_cut(step.text, 13)}", "wait"
        case "approval":
            what = f"{_by(step)} {'approved' if step.ok else 'denied'} {call}"
        case "plan" if step.result is not None:
            what = _cut(f"{task.text}, {step.result}", 300)
    notes = [f"{step.ms:,.1f} ms"] if step.ms else []
    if step.prompt_tokens:
        notes += [f"{step.prompt_tokens} tokens read ({step.cached_tokens} kept), {step.tokens} said"]
    if step.adapter or step.digest:
        notes.append(step.adapter or step.digest[:12])
    if step.confidence is not None:
        notes.append(f"{step.confidence:.0%} sure" + (f" by {step.votes} votes" if step.votes else ""))
    notes += [f"after {_cut(each, 80)}" for each in step.tried[:3]]
    at = f"{_cut(step.at, 60)}: " if step.at else ""
    return f"{since:8.2f} s  {step.role:<8}  {at}{what}" + (f"  [{', '.join(notes)}]" if notes else ""), tone


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
