"""Bunches: examples that share one catalogue, so that training reads the catalogue once.

Written groups (`written.py`), groups whose requests are drawn (`slots.py`) and composed scenes (`generate.py`)
alternate; a group is met under other names,
with notes and without, alone and among strangers, all calls at once and step by step. Invariants: the same seed gives
the same bunches; the examples of a bunch have the same preamble to the letter; every completion parses and validates
against the tools shown. A request of a group whose tool is not shown asks for what nobody can do: `none()`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from random import Random

import msgspec

from edge_agent.agent import prompt
from edge_agent.agent.calls import Call, render, render_all
from edge_agent.agent.prompt import Turn
from edge_agent.agent.tool import Param, ToolSpec
from models.toolcaller.data.catalogue import blocked, functions, make, name_hash
from models.toolcaller.data.generate import Draft, draft, joined
from models.toolcaller.data.phrases import finish, wording
from models.toolcaller.data.requests import ask
from models.toolcaller.data.scene import Example, result
from models.toolcaller.data.slots import draw, scenes
from models.toolcaller.data.values import Voice
from models.toolcaller.data.written import Group, Request, groups

WRITTEN = 0.78  # share of bunches of written groups
SITE = 0.5  # and of a site's own
SLOTTED = 0.1  # and of those whose requests are drawn from what is said of each parameter
FOCUS = 0.5  # and of files that training looks at more than at the others
SIZE = 24  # examples of a bunch, at most
MIXED = 0.25  # bunches that serve two groups
JOINED, JOINED_MIXED = 0.12, 0.5  # requests that are said in one breath with others of the bunch
MAX_STRANGERS = 24
TELLING = 60  # a note of more characters says what the value must be: it is always shown

Said = tuple[str, list[Call]]  # a request, and its calls as the bunch shows them


def bunches(seed: int, site: Sequence[Group] = (), focus: Collection[str] = ()) -> Iterator[list[Example]]:
    """Bunches without end; every written request comes once in a pass.

    With the groups of a `site`, half of the bunches are its own: its tools as they are named there, all of a group.
    With `focus`, files of `written`, half are of those and the other half keeps the rest known.
    """
    rng = Random(seed)
    written = _passes(Random(rng.getrandbits(64)), [g for g in groups() if g.domain not in focus])
    of_site = _passes(Random(rng.getrandbits(64)), site) if site else None
    focused = _passes(Random(rng.getrandbits(64)), [g for g in groups() if g.domain in focus]) if focus else None
    while True:
        own = Random(rng.getrandbits(64))
        if of_site and own.random() < SITE:
            bunch = _of_site(*next(of_site), own)
        elif own.random() < SLOTTED:
            group = draw(own.choice(scenes()), own)
            bunch = _written(group, group.requests, own)
        elif focused and own.random() < FOCUS:
            bunch = _written(*next(focused), own)
        else:
            bunch = _written(*next(written), own) if own.random() < WRITTEN else _composed(own)
        if bunch:
            yield bunch


def _passes(rng: Random, known: Sequence[Group]) -> Iterator[tuple[Group, list[Request]]]:
    while True:
        parts: list[tuple[Group, list[Request]]] = []
        for group in known:
            asked = rng.sample(group.requests, len(group.requests))
            parts += [(group, asked[i : i + SIZE]) for i in range(0, len(asked), SIZE)]
        rng.shuffle(parts)
        yield from parts


def _written(group: Group, asked: Sequence[Request], rng: Random) -> list[Example]:
    stepwise = rng.random() < (0.55 if any(request.story for request in group.requests) else 0.3)
    asked = [request for request in asked if stepwise or not request.story]
    shown = _shown(group, asked, stepwise, rng)
    dress = _Dress(group, rng)
    specs = [dress.spec(spec) for spec in shown]
    names, taken = {spec.name for spec in shown}, {spec.name for spec in specs}
    others, said = _others(group, taken, rng) if rng.random() < MIXED else ([], [])
    crowd = 0 if len(shown) == 1 and not stepwise else _crowd(stepwise, rng)
    strangers = others + _strangers(group, taken, rng, 0 if others and rng.random() < 0.5 else crowd)
    specs += strangers
    rng.shuffle(specs)
    if stepwise and rng.random() < 0.12:
        specs = [_with_shots(spec, group, dress, asked, rng) for spec in specs]
    possible = [r for r in asked if r.calls and {call.name for call in r.calls} <= names]
    said = said or [(r.text, [dress.call(call) for call in r.calls]) for r in possible]
    made: list[Example] = []
    missed = False
    for request in asked:
        calls = [call for call, _ in request.story] or request.calls
        if not {call.name for call in calls} <= names:
            if missed or rng.random() < 0.5:
                continue
            missed, request = True, Request(request.text, [])
        breath = request in possible and rng.random() < (JOINED_MIXED if others else JOINED)
        more = rng.sample(said, min(len(said), rng.choice([1, 1, 2]))) if breath else []
        more = [one for one in more if one[0] != request.text]
        made.append(_example(specs, request, group, dress, stepwise, rng, more))
    if rng.random() < 0.25 and not strangers:
        other = rng.choice(rng.choice(groups()).requests)
        if other not in group.requests:
            made.append(_example(specs, Request(other.text, []), group, dress, stepwise, rng))
    return made


def _others(group: Group, taken: set[str], rng: Random) -> tuple[list[ToolSpec], list[Said]]:
    """A few tools of another group under names of their own, and what people say to them."""
    other = rng.choice(groups())
    if other is group:
        return [], []
    dress, said, specs = _Dress(other, rng), list[Said](), dict[str, ToolSpec]()
    for request in rng.sample(other.requests, min(len(other.requests), 6)):
        calls = [dress.call(call) for call in request.calls]
        names = {call.name for call in calls}
        if not calls or names & taken or len(names | specs.keys()) > 3:
            continue
        specs |= {spec.name: spec for tool in other.tools if (spec := dress.spec(tool)).name in names - specs.keys()}
        said.append((request.text, calls))
    taken |= specs.keys()
    return list(specs.values()), said


def _of_site(group: Group, asked: Sequence[Request], rng: Random) -> list[Example]:
    stepwise = rng.random() < 0.8
    specs, dress = list(group.tools), _Dress(group, None)
    rng.shuffle(specs)
    return [_example(specs, r, group, dress, stepwise, rng) for r in asked if stepwise or not r.story]


def _shown(group: Group, asked: Sequence[Request], stepwise: bool, rng: Random) -> list[ToolSpec]:
    """Which of the group's tools are there: one, some or all."""
    style = rng.random()
    called = [r.calls or [call for call, _ in r.story] for r in asked if r.calls or r.story]
    if stepwise:
        style = 0.5 + style / 2
    if style >= 0.6 or not called:
        return list(group.tools)
    first = {call.name for call in rng.choice(called)}
    rest = [spec for spec in group.tools if spec.name not in first]
    more = 0 if style < 0.35 else rng.randint(1, 2)
    return [spec for spec in group.tools if spec.name in first] + rng.sample(rest, min(len(rest), more))


def _breath(said: Sequence[Said], rng: Random) -> Said:
    """Several requests said in one breath, each call once."""
    text, calls = said[0][0], list(said[0][1])
    form = rng.choice(["{}. {}", "{}. {}", "{}. Also, {}", "{}. And {}", "{}; {}", "{}, and then {}", "{}\n{}"])
    for more, asked in said[1:]:
        text = form.format(text.rstrip(".; "), more).replace("?.", "?").replace("!.", "!")
        calls += [call for call in asked if call not in calls]
    return text, calls


def _crowd(stepwise: bool, rng: Random) -> int:
    style = rng.random()
    if style < 0.45:
        return 0
    if style < 0.9:
        return rng.randint(1, 8 if stepwise else 4)
    return rng.randint(6, MAX_STRANGERS if stepwise else 12)


def _strangers(group: Group, taken: set[str], rng: Random, count: int) -> list[ToolSpec]:
    found: list[ToolSpec] = []
    for _ in range(count):
        if rng.random() < 0.7:
            other = rng.choice(groups())
            spec = _Dress(other, rng).spec(rng.choice(other.tools))
            if other is group or spec.name in taken:
                continue
            taken.add(spec.name)
        else:
            spec = make(rng.choice(functions()), rng, taken).spec
        found.append(spec)
    return found


def _example(
    specs: Sequence[ToolSpec],
    request: Request,
    group: Group,
    dress: _Dress,
    stepwise: bool,
    rng: Random,
    more: Sequence[Said] = (),
) -> Example:
    text, calls = _breath([(_typed(request.text, rng), [dress.call(call) for call in request.calls]), *more], rng)
    turns = [Turn("user", text)]
    steps = [(dress.call(call), told) for call, told in request.story]
    if stepwise:
        names = [call.name for call in request.calls] + [""] * (len(calls) - len(request.calls))
        steps += [(call, _told(group, old, rng)) for call, old in zip(calls, names, strict=True)]
        for call, told in steps:
            turns += [Turn("assistant", render(call)), Turn("tool", told)]
        calls = []
    system = prompt.SYSTEM if stepwise else prompt.SYSTEM_ALL
    whole = prompt.preamble(specs, system) + prompt.suffix(turns)
    kind = "irrelevant" if not calls and not steps else "story" if request.story else "written"
    return Example(whole, render_all(calls), kind, not stepwise, text, list(specs))


def _told(group: Group, name: str, rng: Random) -> str:
    told = group.results.get(name)
    return rng.choice(told) if told else str(rng.choice(wording()["results"]))


def _typed(text: str, rng: Random) -> str:
    style = rng.random()
    if style < 0.04 and '"' not in text and "'" not in text:
        return text.rstrip(".")
    return text


def _with_shots(spec: ToolSpec, group: Group, dress: _Dress, asked: Sequence[Request], rng: Random) -> ToolSpec:
    fit = [
        r for r in group.requests if len(r.calls) == 1 and dress.call(r.calls[0]).name == spec.name and r not in asked
    ]
    chosen = rng.sample(fit, min(len(fit), rng.randint(0, 2)))
    return msgspec.structs.replace(spec, examples=[(r.text, dress.call(r.calls[0]).args) for r in chosen])


class _Dress:
    """The clothes in which one bunch shows a group: names, notes, choices; without `rng` as they are written."""

    def __init__(self, group: Group, rng: Random | None) -> None:
        self._camel = self._bare = self._loose = False
        self._prefix, self._drop = "", 0.0
        self._rng, self._specs = rng or Random(0), {spec.name: spec for spec in group.tools}
        if rng is not None:
            self._choose(group, rng)

    def _choose(self, group: Group, rng: Random) -> None:
        slug = re.sub(r"\W+", "_", group.name.lower()).strip("_")
        words = [word for word in slug.split("_") if word.isascii() and word.isidentifier()][:2] or ["api"]
        style = rng.random()
        self._camel = style < 0.1
        if 0.1 <= style < 0.25:
            self._prefix = f"{rng.choice(['_'.join(words), words[0]])}_"
        elif style < 0.32:
            self._prefix = f"{''.join(word.title() for word in words)}_{rng.choice(['', '', 'Api_', '1_', 'Service_'])}"
        self._bare = rng.random() < 0.1
        self._loose = rng.random() < 0.08
        self._drop = rng.choice([0.0, 0.0, 0.0, 0.15, 0.4])

    def _name(self, name: str) -> str:
        whole = self._prefix + name
        if self._camel:
            head, *rest = name.split("_")
            whole = head + "".join(part[:1].upper() + part[1:] for part in rest)
        return name if len(whole) > 60 or name_hash(whole) in blocked() else whole

    def _key(self, name: str) -> str:
        if not self._camel:
            return name
        head, *rest = name.split("_")
        return (head + "".join(part[:1].upper() + part[1:] for part in rest)) or name

    def spec(self, spec: ToolSpec) -> ToolSpec:
        keys = [self._key(param.name) for param in spec.params]
        params = [self._param(param) for param in spec.params]
        if len(set(keys)) == len(keys):
            params = [msgspec.structs.replace(param, name=key) for param, key in zip(params, keys, strict=True)]
        return ToolSpec(self._name(spec.name), spec.description, params)

    def _param(self, param: Param) -> Param:
        if len(param.about) > TELLING:
            return param
        if self._bare or self._rng.random() < self._drop:
            return msgspec.structs.replace(param, about="")
        if self._loose and param.kind == "choice" and len(note := f"One of: {', '.join(param.choices)}.") < 100:
            return msgspec.structs.replace(param, kind="str", choices=[], about=note)
        return param

    def call(self, call: Call) -> Call:
        spec = self._specs[call.name]
        keys = [self._key(param.name) for param in spec.params]
        alone = len(set(keys)) == len(keys)
        return Call(self._name(call.name), {self._key(k) if alone else k: v for k, v in call.args.items()})


def _composed(rng: Random) -> list[Example]:
    """A composed example, and more requests to the same tools."""
    first = draft(rng)
    made = [first.example]
    for _ in range(rng.randint(2, 4)):
        made.append(_more(first, rng))
    return made


def _more(first: Draft, rng: Random) -> Example:
    scene, shown = first.scene, first.example
    voice, kind = Voice(rng), rng.random()
    several = shown.several
    if kind < 0.16:
        stranger = rng.choice(functions())
        near = {made.function.family for made in scene.made} - {""}
        if stranger not in [made.function for made in scene.made] and stranger.family not in near:
            asked = ask(make(stranger, rng, set()), voice)
            return _shown_again(shown, [Turn("user", finish(asked.pieces, voice, asked.domain))], [], "irrelevant")
    picked = [
        rng.choice(scene.made) for _ in range(rng.choice([1, 1, 1, 2, 2, 3]) if several else rng.choice([1, 1, 1, 2]))
    ]
    asked_all = [ask(made, voice, framed=i == 0) for i, made in enumerate(picked)]
    asked_all = list({render(one.call): one for one in asked_all}.values())
    text = finish(asked_all[0].pieces, voice, asked_all[0].domain)
    if len(asked_all) > 1:
        text = joined(asked_all, voice, wording()["joints" if several else "then"])
    turns, calls = [Turn("user", text)], [one.call for one in asked_all]
    if not several:
        for one in asked_all:
            turns += [Turn("assistant", render(one.call)), Turn("tool", result(one.made.function, rng))]
        calls = []
    return _shown_again(shown, turns, calls, "more")


def _shown_again(shown: Example, turns: Sequence[Turn], calls: Sequence[Call], kind: str) -> Example:
    system = prompt.SYSTEM_ALL if shown.several else prompt.SYSTEM
    text = prompt.preamble(shown.tools, system) + prompt.suffix(turns)
    return Example(text, render_all(calls), kind, shown.several, turns[0].text, shown.tools)
