"""A task as a trace, by OpenTelemetry's semantic conventions for generative AI, made of its transcript.

Invariants: pure; one span for the task (`invoke_agent`, or `invoke_workflow`), below it one for each time a model was
asked (`chat`) and for each call that was made (`execute_tool`); asks, approvals and wrong calls are events of the
first. What people, models and tools said is in it only when `content` is asked for.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge_agent.agent.transcript import Step, Task

PROVIDER = "outrider"


class Span(msgspec.Struct, frozen=True):
    """Times are seconds since the Unix epoch; `events` are (name, time, attributes); `error` is a kind of error."""

    name: str
    start: float
    end: float
    attributes: dict[str, Any]
    client: bool = False
    error: str = ""
    events: list[tuple[str, float, dict[str, Any]]] = []


def spans(task: Task, content: bool = False) -> list[Span]:
    """The task's span first."""
    flow = bool(task.steps) and task.steps[0].role == "plan" and not task.steps[0].at
    operation, name = ("invoke_workflow", task.text.partition(" ")[2]) if flow else ("invoke_agent", PROVIDER)
    named = {"gen_ai.workflow.name": name} if flow else {"gen_ai.agent.name": name, "gen_ai.provider.name": PROVIDER}
    found, events = list[Span](), list[tuple[str, float, dict[str, Any]]]()
    for n, step in enumerate(task.steps):
        if step.role in ("model", "check"):
            found.append(_chat(step, content))
        elif step.role == "tool" and step.call is not None:
            found.append(_tool(f"{task.id}:{n}", step, content))
        elif step.role in ("ask", "approval", "tool"):
            kind = "wrong_call" if step.role == "tool" and not step.ok else step.role
            tool = {"gen_ai.tool.name": step.call.name} if step.call else {}
            given = {"outrider.given": step.ok} if step.role == "approval" else {}
            events.append((f"outrider.{kind}", step.ts, tool | given | _at(step)))
    about: dict[str, Any] = {"gen_ai.operation.name": operation, **named, "gen_ai.conversation.id": task.id}
    about |= {"outrider.subject": task.subject.name, "outrider.runs": task.runs} | _tokens(task.steps)
    about |= {"gen_ai.input.messages": _message("user", task.text)} if content else {}
    about |= {"gen_ai.output.messages": _message("assistant", task.answer)} if content and task.answer else {}
    failed = "task_failed" if task.state == "failed" else ""
    return [Span(f"{operation} {name}", task.created, task.finished, about, error=failed, events=events), *found]


def _chat(step: Step, content: bool) -> Span:
    model = step.model or step.digest[:12] or "unknown"
    about: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
    }
    about |= {"outrider.role": step.role, "outrider.adapter": step.adapter} | _tokens([step])
    about |= {"gen_ai.response.time_to_first_chunk": step.first_token_ms / 1e3} if step.first_token_ms else {}
    about |= {"outrider.confidence": step.confidence} if step.confidence is not None else {}
    about |= {"gen_ai.output.messages": _message("assistant", step.text)} if content else {}
    return Span(f"chat {model}", step.ts - step.ms / 1e3, step.ts, about, client=True)


def _tool(id: str, step: Step, content: bool) -> Span:
    assert step.call is not None
    about: dict[str, Any] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": step.call.name,
        "gen_ai.tool.call.id": id,
    }
    about |= {"gen_ai.tool.type": "function"} | _at(step)
    if content:
        about["gen_ai.tool.call.arguments"] = msgspec.json.encode(step.call.args).decode()
        about["gen_ai.tool.call.result"] = step.text
    error = "" if step.ok else "tool_error"
    return Span(f"execute_tool {step.call.name}", step.ts - step.ms / 1e3, step.ts, about, error=error)


def _tokens(steps: list[Step]) -> dict[str, int]:
    names = {"input_tokens": "prompt_tokens", "output_tokens": "tokens", "cache_read.input_tokens": "cached_tokens"}
    return {f"gen_ai.usage.{key}": sum(getattr(step, name) for step in steps) for key, name in names.items()}


def _at(step: Step) -> dict[str, str]:
    return {"outrider.step": step.at} if step.at else {}


def _message(role: str, text: str) -> str:
    return msgspec.json.encode([{"role": role, "parts": [{"type": "text", "content": text}]}]).decode()
