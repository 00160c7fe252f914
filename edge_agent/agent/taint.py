"""What may steer an act: a request and typed fields of results, not the text that somebody else wrote into either.

Invariants: pure. A number, a truth value and one of declared choices are typed; every other text in a result is
untrusted, and so is everything of a tool that declares nothing and what a tool says when it fails. An act that the
model proposes after it has read untrusted text is not made on that proposal: the model is asked again with such text
taken out, and what it says then is its decision (see decide.py). So an instruction hidden in a label, a document or a
sensor's name is never the reason of an act, while what the request and the typed fields are reason enough for is done.
What the model said since it read such text, and what an error repeats of that, is as untrusted as the text itself.
A passage that the request quotes is untrusted too ("the note says 'stop line 2', what is that?"), unless the act hands
it on as an argument, as a message does: then it is what the act is about. It never becomes a request for later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from edge_agent.agent import prompt
from edge_agent.agent.calls import Answer, Call, CallError, Decision, parse_all, render, render_all
from edge_agent.agent.parts import parts
from edge_agent.agent.spoken import QUOTED
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Step, Task

HIDDEN = "(text)"
WRONG = "that was no usable call"
DROPPED = Step("tool", "not done", ok=False)


def without(value: Any, declared: Param | None) -> Any:
    """The value with its untrusted texts taken out."""
    if isinstance(value, dict):
        fields = {field.name: field for field in declared.fields} if declared and declared.kind == "dict" else {}
        known = {key: without(item, fields.get(key)) for key, item in value.items() if key in fields}
        rest = [without(item, None) for key, item in value.items() if key not in fields]
        return known | ({HIDDEN: rest} if rest else {})
    if isinstance(value, list):
        return [without(item, declared.items if declared and declared.kind == "list" else None) for item in value]
    return HIDDEN if isinstance(value, str) and not typed(value, declared) else value


def typed(value: Any, declared: Param | None) -> bool:
    """Whether nothing of a value is untrusted text."""
    if isinstance(value, str):
        return declared is not None and declared.kind == "choice" and value in declared.choices
    return not isinstance(value, dict | list) or without(value, declared) == value


def rounds(steps: Sequence[Step]) -> list[tuple[Step, list[Step]]]:
    """Each decision that counts, and what came back of its calls, in their order."""
    found: list[tuple[Step, list[Step]]] = []
    for step in steps:
        if step.role in ("model", "check"):
            if step.role == "check" and found and not found[-1][1]:
                found.pop()  # it was asked again
            found.append((step, []))
        elif step.role == "tool" and found:
            found[-1][1].append(step)
    return [(said, _in_order(said, results)) for said, results in found]


def turns(task: Task, known: Mapping[str, ToolSpec], hide: bool = False) -> list[prompt.Turn]:
    """The transcript as the model reads it.

    With `hide`, untrusted texts are taken out: of results, and of what was said since the first of them; what the model
    has proposed last, and is asked about here, is not there.
    """
    asked, request = task.steps, task.text
    if hide and task.steps and (proposed := task.steps[-1]).role == "model":
        asked = task.steps[:-1]
        request = unquoted(request) if _quotes(acts(proposed.text, known), request, known) else request
    read, results = [*_before(task, hide), prompt.Turn("user", request)], bool(task.before)
    for said, came in rounds(asked):
        text = said.text
        if said.role == "check" and len(came) == 1 and came[0].call:  # what a person approved in its place
            text = render(came[0].call)
        read.append(prompt.Turn("assistant", _said(text, known) if hide and results else text))
        for step in came:
            if hide and step.call is not None:
                told = _text(step, known)
            elif hide and (step.at or (results and said.role == "model")):  # it may repeat what was read
                told = prompt.error_text(WRONG)
            else:
                told = step.text if step.ok else prompt.error_text(step.text)
            read.append(prompt.Turn("tool", told))
        results = results or any(step.call for step in came)
    return read


def left(task: Task) -> bool:
    """Whether a part of the request was not asked for yet."""
    ends = [said for said, _ in rounds(task.steps) if over(said.text)]
    return len(ends) < len(parts(task.text)) and not any(said.whole for said in ends)


def over(said: str) -> bool:
    """Whether a decision is that nothing is left to do, or an answer."""
    found = decisions(said)
    return bool(found) and not any(isinstance(decision, Call) for decision in found)


def steers(said: str, task: Task, known: Mapping[str, ToolSpec]) -> bool:
    """Whether this is an act that the model proposes after it has read untrusted text, here or earlier on."""
    made = acts(said, known)
    return bool(made) and (any(True for _ in texts(task, known)) or _quotes(made, task.text, known))


def texts(task: Task, known: Mapping[str, ToolSpec]) -> Iterator[str]:
    """What the model reads of others: answers of the conversation, and results with untrusted text in them."""
    yield from (each.answer for each in task.before)
    for step in task.steps:
        result = step.role == "tool" and step.call is not None
        if result and not (step.ok and _text(step, known) == prompt.result_text(step.result)):
            yield step.text


@lru_cache(128)  # each step reads the decisions of all steps before
def decisions(text: str) -> Sequence[Decision]:
    """What a text says; nothing when it is no usable call."""
    try:
        return tuple(parse_all(text))
    except CallError:
        return ()


def acts(said: str, known: Mapping[str, ToolSpec]) -> list[Call]:
    """Calls that do more than read."""
    return [d for d in decisions(said) if isinstance(d, Call) and d.name in known and known[d.name].risk != "read"]


def _quotes(acts: Sequence[Call], request: str, known: Mapping[str, ToolSpec]) -> bool:
    """Whether the request quotes what may be an order (not `stop "line 2"`), and none of the acts has it as an argument
    or one has not and shares a word with it. What will be a request is no such argument. A request that stands in marks
    as a whole quotes nobody."""
    if QUOTED.fullmatch(request.strip()):
        return False
    for each in (_words("".join(found)) for found in QUOTED.findall(request)):
        others = [act for act in acts if not any(_hands_on(given, each) for given in _given(act, known[act.name]))]
        near = [act for act in others if set(each.split()).intersection(_words(render(act)).split())]
        if _order(each, acts) and (near or len(others) == len(acts)):
            return True
    return False


def _given(act: Call, spec: ToolSpec) -> list[str]:
    later = {param.name for param in spec.params if param.later and param.kind == "str"}
    return [_words(str(value)) for name, value in act.args.items() if name not in later]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _hands_on(value: str, passage: str) -> bool:
    """Whether it is the passage, or nearly: the name of what an order is about is not."""
    nearly = max(4, 0.75 * len(passage.split()))
    return passage in value or (value in passage and len(value.split()) >= nearly)


def _order(passage: str, acts: Sequence[Call]) -> bool:
    """Three words, or two with the verb of an act."""
    words = passage.split()
    return len(words) > 2 or (len(words) == 2 and any(act.name.partition("_")[0].lower() in words for act in acts))


def unquoted(request: str) -> str:
    """The request with what it quotes hidden, but for single words, in the marks that it has."""
    return QUOTED.sub(
        lambda found: f"{found[0][0]}{HIDDEN}{found[0][-1]}" if " " in found[0].strip() else found[0], request
    )


def _before(task: Task, hide: bool) -> list[prompt.Turn]:
    """The conversation up to here; answers and what sums them up are not for where acts are decided."""
    read: list[prompt.Turn] = []
    for each in task.before:
        if each.text:
            answer = Answer(HIDDEN if hide else each.answer)
            read += [prompt.Turn("user", each.text), prompt.Turn("assistant", render(answer))]
        elif not hide:
            read.append(prompt.Turn("user", f"Earlier: {each.answer}"))
    return read


def _in_order(said: Step, results: list[Step]) -> list[Step]:
    """One result for each call of a decision that made several."""
    numbered = {int(step.at.rpartition(".")[2]): step for step in results if "." in step.at}
    calls = sum(isinstance(decision, Call) for decision in decisions(said.text))
    if not numbered:  # one of the calls is wrong, or there is one alone
        return results + [DROPPED] * (calls - len(results) if results else 0)
    return [numbered.get(n, DROPPED) for n in range(1, max(calls, *numbered) + 1)]


def _said(text: str, known: Mapping[str, ToolSpec]) -> str:
    shown: list[Decision] = []
    if not (found := decisions(text)):
        return HIDDEN
    for said in found:
        if isinstance(said, Call) and said.name in known:
            shown.append(Call(said.name, without(said.args, Param("", "dict", fields=known[said.name].params))))
        elif isinstance(said, Answer):
            shown.append(Answer(HIDDEN))
    return render_all(shown) if shown or over(text) else HIDDEN


def _text(step: Step, known: Mapping[str, ToolSpec]) -> str:
    if not step.ok:
        return prompt.error_text("it failed")
    spec = known.get(step.call.name) if step.call else None
    return prompt.result_text(without(step.result, spec.returns if spec else None))
