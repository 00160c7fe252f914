"""What of a tool's result may steer an act: its typed fields, not the text that somebody else wrote into it.

Invariants: pure. A number, a truth value and one of declared choices are typed; every other text in a result is
untrusted, and so is everything of a tool that declares nothing and what a tool says when it fails. An act that the
model proposes after it has read untrusted text is not made on that proposal: the model is asked again with such text
taken out, and what it says then is its decision (see loop.py). So an instruction hidden in a label, a document or a
sensor's name is never the reason of an act, while what the request and the typed fields are reason enough for is done.
What the model said since it read such text, and what an error repeats of that, is as untrusted as the text itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_agent.agent import prompt
from edge_agent.agent.calls import Answer, Call, CallError, Nothing, parse, render
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Step, Task

HIDDEN = "(text)"
WRONG = "that was no usable call"


def without(value: Any, declared: Param | None) -> Any:
    """The value with its untrusted texts taken out."""
    if isinstance(value, dict):
        fields = {field.name: field for field in declared.fields} if declared and declared.kind == "dict" else {}
        known = {key: without(item, fields.get(key)) for key, item in value.items() if key in fields}
        rest = [without(item, None) for key, item in value.items() if key not in fields]
        return known | ({HIDDEN: rest} if rest else {})
    if isinstance(value, list):
        return [without(item, declared.items if declared and declared.kind == "list" else None) for item in value]
    typed = declared is not None and declared.kind == "choice" and value in declared.choices
    return HIDDEN if isinstance(value, str) and not typed else value


def decided(steps: Sequence[Step]) -> list[Step]:
    """The steps without what the model was asked again about."""
    after = [*steps, None][1:]
    return [s for s, then in zip(steps, after, strict=True) if s.role != "model" or not then or then.role != "check"]


def turns(task: Task, specs: Sequence[ToolSpec]) -> list[prompt.Turn]:
    """The transcript as the model reads it, with untrusted texts taken out: of results, and of calls made since.

    What it has proposed last, and is asked about here, is not there.
    """
    known = {spec.name: spec for spec in specs}
    read, results, by = [prompt.Turn("user", task.text)], False, ""
    asked = task.steps[:-1] if task.steps and task.steps[-1].role == "model" else task.steps
    for step in decided(asked):
        if step.role in ("model", "check"):
            by = step.role
            read.append(prompt.Turn("assistant", _said(step.text, known) if results else step.text))
        elif step.role == "tool" and step.call is None:
            text = WRONG if results and by == "model" else step.text
            read.append(prompt.Turn("tool", prompt.error_text(text)))
        elif step.role == "tool":
            results = True
            read.append(prompt.Turn("tool", _text(step, known)))
    return read


def steers(said: str, task: Task, specs: Sequence[ToolSpec]) -> bool:
    """Whether this is an act that the model proposes after it has read untrusted text."""
    known = {spec.name: spec for spec in specs}
    try:
        call = parse(said)
    except CallError:
        return False
    if not isinstance(call, Call) or call.name not in known or known[call.name].risk == "read":
        return False
    results = [step for step in task.steps if step.role == "tool" and step.call is not None]
    return any(not step.ok or _text(step, known) != prompt.result_text(step.result) for step in results)


def _said(text: str, known: Mapping[str, ToolSpec]) -> str:
    try:
        call = parse(text)
    except CallError:
        return HIDDEN
    if not isinstance(call, Call) or call.name not in known:
        return render(Answer(HIDDEN)) if isinstance(call, Answer) else render(Nothing())
    return render(Call(call.name, without(call.args, Param("", "dict", fields=known[call.name].params))))


def _text(step: Step, known: Mapping[str, ToolSpec]) -> str:
    if not step.ok:
        return prompt.error_text("it failed")
    spec = known.get(step.call.name) if step.call else None
    return prompt.result_text(without(step.result, spec.returns if spec else None))
