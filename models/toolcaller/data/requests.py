"""One request for one tool: its words, and the call that they ask for.

Invariant: the call holds exactly what the words say (`Asked.call` passes `calls.validate`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from edge_agent.agent.calls import Call, validate
from models.toolcaller.data.catalogue import Made, Slot
from models.toolcaller.data.phrases import (
    Piece,
    Rest,
    Said,
    Template,
    expand,
    facts,
    frame,
    joined,
    listed,
    wording,
)
from models.toolcaller.data.values import Voice, sample

Given = dict[str, tuple[Any, str]]


class Asked(msgspec.Struct, frozen=True):
    """A request under way: pieces of text without frame, its mark, and the call; `rests` were not said yet."""

    made: Made
    mark: str
    pieces: list[Piece]
    call: Call

    @property
    def domain(self) -> str:
        return self.made.function.domain


def draw(made: Made, voice: Voice) -> Given:
    """A value and its words for every parameter."""
    return {name: sample(slot.field.type, voice, slot.whole, slot.form) for name, slot in made.slots.items()}


def ask(made: Made, voice: Voice, given: Given | None = None, framed: bool = True, spare: float = 0.3) -> Asked:
    """A request for the tool; `spare` is the chance that an optional parameter no template names is said too."""
    rng = voice.rng
    given = draw(made, voice) if given is None else given
    template = _template(made, voice)
    said = Said([], {})
    shown = _corrected(made, template, given, voice) if rng.random() < 0.03 else given
    expand(template.nodes, {k: v for k, v in shown.items() if made.slots[k].param.kind != "bool"}, rng, said)
    rests = _rests(made, given, said, voice, spare)
    joins = [rest for rest in rests if rest.link is not None]
    lists = [rest for rest in rests if rest.link is None]
    asking = bool(rests) and said.pieces[-1][0].rstrip()[-1:] == "?"
    if asking:
        said.pieces[-1] = (said.pieces[-1][0].rstrip()[:-1], said.pieces[-1][1])
    for rest in joins:
        said.pieces += joined(rest, rng)
    front = bool(lists) and template.mark == "N" and rng.random() < 0.25
    if lists and not front:
        said.pieces += listed(lists, rng)
    if asking:
        said.pieces.append(("?", False))
    pieces = frame(template.mark, made.function.domain, said.pieces, rng) if framed else said.pieces
    if front:
        pieces = [*facts(lists, rng), *pieces]
    return Asked(made, template.mark, pieces, call_of(made, said.values))


def call_of(made: Made, values: dict[str, Any]) -> Call:
    """The validated call with values by field name; words fixed by a template are read by the parameter's kind."""
    args = {made.slots[name].param.name: _convert(made.slots[name], value) for name, value in values.items()}
    return validate(Call(made.spec.name, args), [made.spec])


def _convert(slot: Slot, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match slot.param.kind:
        case "int":
            return int(value)
        case "float":
            return float(value)
        case "bool":
            return value == "true"
        case _:
            return value


def _template(made: Made, voice: Voice) -> Template:
    slots = set(made.slots)
    needed = {name for name, slot in made.slots.items() if slot.param.required}
    usable = [t for t in made.function.templates if t.required <= slots]
    whole = [t for t in usable if t.mark != "Q" or needed <= t.required]
    return voice.rng.choice(whole or usable)


def _rests(made: Made, given: Given, said: Said, voice: Voice, spare: float) -> list[Rest]:
    rests = []
    for name, slot in made.slots.items():
        if name in said.values or (not slot.param.required and voice.rng.random() > spare):
            continue
        value, words = given[name]
        link = slot.field.link if slot.field.link is not None else slot.field.type.link
        if slot.param.kind == "bool" and link is not None:
            true, _, false = link.partition("/")
            value = bool(true) if not (true and false) else value
            words, link = (true if value else false), "{}"
        said.values[name] = value
        rests.append(Rest(slot.field.label, words, link))
    return rests


def _corrected(made: Made, template: Template, given: Given, voice: Voice) -> Given:
    """`given` with one value said wrong first and put right: `40%, no wait, 50%`."""
    names = [
        n for n in template.required if n in given and given[n][1] and not isinstance(given[n][0], list | dict | bool)
    ]
    if not names:
        return given
    name = voice.rng.choice(sorted(names))
    slot = made.slots[name]
    wrong, words = sample(slot.field.type, voice, slot.whole, slot.form)
    if wrong == given[name][0]:
        return given
    return {**given, name: (given[name][0], f"{words}, {voice.rng.choice(wording()['again'])}{given[name][1]}")}
