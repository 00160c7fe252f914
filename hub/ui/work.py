"""Jobs in words and HTML: what was asked, each call with its result and time, how it ended, the transcript."""

import json
import time
from typing import Any

import msgspec

from edge_agent.wire.messages import TERMINAL, JobState
from hub.approvals import Ask
from hub.ui.frame import clock, e, measured, span

ENDED = frozenset(state.value for state in TERMINAL)
PATH = (JobState.QUEUED, JobState.DELIVERED, JobState.RUNNING)
MAX_TEXT = 400


def tone(state: str) -> str:
    """The colour class of a job state."""
    if state == JobState.SUCCEEDED:
        return "ok"
    return "bad" if state in (JobState.FAILED, JobState.REJECTED) else "" if state in ENDED else "busy"


def asked(job: dict[str, Any]) -> str:
    """The request in the words it was made, or the tool call it is."""
    body = job["body"]
    if job["kind"] == "tool":
        args = body.get("args")
        shown = ", ".join(f"{k}={_text(v)}" for k, v in args.items()) if isinstance(args, dict) else ""
        return _short(f"{body.get('tool')}({shown})")
    return _short(str(body.get("text", "")))


class Made(msgspec.Struct):
    """A tool call a device made: in the compact form, what came of it, and how long it took in ms."""

    text: str
    result: str
    ok: bool = True
    ms: float | None = None


def calls(job: dict[str, Any]) -> list[Made]:
    """The tool calls in a job's result, whatever a device put there."""
    return [
        Made(_short(_text(step["call"])), _short(_text(step.get("text", ""))), _ok(step), measured(step.get("ms")))
        for step in steps(job, "tool")
        if "call" in step
    ]


def decided_ms(job: dict[str, Any]) -> float:
    """How long the model took for all its decisions."""
    return sum(measured(step.get("ms")) or 0.0 for step in steps(job, "model", "check"))


def steps(job: dict[str, Any], *roles: str) -> list[dict[str, Any]]:
    """The steps of a job's transcript, of these roles or all."""
    listed = job["result"].get("steps")
    found = [step for step in listed if isinstance(step, dict)] if isinstance(listed, list) else []
    return [step for step in found if not roles or step.get("role") in roles]


def _ok(step: dict[str, Any]) -> bool:
    return bool(step.get("ok", True))


def summary(job: dict[str, Any]) -> str:
    """One line: the last call and what came of it."""
    if made := calls(job):
        return f"{made[-1].text} → {made[-1].result}"
    return _short(job["error"] or _text(job["result"].get("result", job["result"] or "")))


def card(job: dict[str, Any], ask: Ask | None = None) -> str:
    """A job as HTML: request, way so far, calls, answer or error, transcript; `ask` is what it waits with."""
    facts = [clock(job["created"]), job["subject"]]
    if thought := decided_ms(job):
        facts.append(f"decided in {thought:,.0f} ms")
    shown = "waiting for approval" if ask else job["state"]
    state = f'<span class="badge {"wait" if ask else tone(job["state"])}">{e(shown)}</span>'
    head = f'<header><b>{e(asked(job))}</b><span class="faint">{e(" · ".join(facts))}</span>{state}</header>'
    waits = f'<div class="step"><div>{ask_html(ask)}</div></div>' if ask else ""
    return head + _way(job) + "".join(map(_step, calls(job))) + waits + _end(job) + transcript(job)


def ask_html(ask: Ask) -> str:
    """The call in words, why it waits, and the digest that an answer is good for."""
    left = f"{span(ask.expires - time.time())} left"
    digest = f'<code title="{e(ask.digest)}">{e(ask.digest[:16])}</code>'
    why = f"{e(ask.why)}; " if ask.why else ""
    return f'<code>{e(ask.call)}</code><span class="result">{why}digest {digest}, {e(left)}</span>'


def transcript(job: dict[str, Any]) -> str:
    """Every step as the device told it: what was said, checked, called, asked and approved, and how long it took."""
    if not (told := steps(job)):
        return ""
    rows = "".join(_line(step, job["created"]) for step in told)
    title = f"<b>Transcript</b><span>{len(told)} steps</span>"
    return f'<details class="transcript"><summary>{title}</summary><table>{rows}</table></details>'


def _line(step: dict[str, Any], began: float) -> str:
    role, ok, ts = str(step.get("role", "")), _ok(step), measured(step.get("ts"))
    since = "" if ts is None else f"{max(0.0, ts - began):,.2f} s"
    text, call = _text(step.get("text", "")), _text(step.get("call", ""))
    if role == "ask":
        text = f"May {call} be done? digest {text[:16]}"
    elif role == "approval":
        text = f"{text} {'approved' if ok else 'denied'} {call}"
    ms = measured(step.get("ms"))
    notes = [] if ms is None else [f"{ms:,.1f} ms"]
    if isinstance(step.get("prompt_tokens"), int):
        notes.append(f"{step['prompt_tokens']} tokens read, {step.get('tokens', 0)} said")
    notes += [str(step[name])[:40] for name in ("adapter",) if step.get(name)]
    at = f"<b>{e(step['at'])}</b> " if step.get("at") else ""
    what = f"{at}<code>{e(_short(text or call))}</code>"
    kind = "bad" if not ok else "wait" if role == "ask" else ""
    cells = f'<td class="faint">{since}</td><td><em>{e(role)}</em></td><td class="{kind}">{what}</td>'
    return f'<tr>{cells}<td class="faint">{e(" · ".join(notes))}</td></tr>'


def _way(job: dict[str, Any]) -> str:
    """While it is under way: where it stands, and for how long."""
    if job["state"] in ENDED:
        return ""
    reached = PATH.index(JobState(job["state"])) if job["state"] in PATH else 0
    names = "".join(f'<li class="{"done" if n <= reached else ""}">{state}</li>' for n, state in enumerate(PATH))
    waited = f"{max(0, time.time() - job['created']):.0f} s"
    return f'<ol class="way">{names}<li class="time"><i class="spin"></i>{waited}</li></ol>'


def _step(made: Made) -> str:
    took = "" if made.ms is None else f"{made.ms:,.0f} ms"
    sign = '<i class="sign ok">✓</i>' if made.ok else '<i class="sign bad">✕</i>'
    call = f'<code>{e(made.text)}</code><span class="result">{e(made.result)}</span>'
    return f'<div class="step">{sign}<div>{call}</div><em>{took}</em></div>'


def _end(job: dict[str, Any]) -> str:
    """The answer or error, unless the last call said it already."""
    answer = _short(job["error"] or _text(job["result"].get("answer") or job["result"].get("result", "")))
    if any(made.result in answer for made in calls(job)[-1:]):
        return ""
    listed = job["result"].get("sources")
    named = "; ".join(map(_text, listed)) if isinstance(listed, list) else ""
    sources = f' <span class="faint">from {e(_short(named))}</span>' if named else ""
    return f'<p class="{"bad" if job["error"] else ""}">{e(answer)}{sources}</p>' if answer else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
