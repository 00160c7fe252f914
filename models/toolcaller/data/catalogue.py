"""The catalogue: functions as the tables declare them, and the many forms in which a tool caller meets them.

A line of a table is `name/name ;; params ;; templates ;; description ;; result`. Invariants: a made tool is a ToolSpec
that `calls.validate` and `grammar.build` accept; its name is none of BFCL's (`tables/blocked.txt` holds hashes of
those, so that no name can be learned from it); which parameters a request may fill in is decided here, once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from random import Random

import msgspec

from edge_agent.agent.calls import RESERVED
from edge_agent.agent.tool import Kind, Param, ToolSpec
from models.toolcaller.data.phrases import Template, compile_template, wording
from models.toolcaller.data.values import DATE_FORMATS, TABLES, Type, named

_PARAM = re.compile(r"(\w+)(\??)(?::((?:[^<\s(]|\([^)]*\))+))?(?:<([^>]*)>)?\s*")
_SYNONYMS = {
    "get": ["fetch", "retrieve", "read", "query"],
    "set": ["change", "update", "adjust"],
    "find": ["search", "locate"],
    "create": ["add", "make", "new"],
    "start": ["begin", "run"],
    "delete": ["remove"],
    "calculate": ["compute", "calc"],
    "show": ["display"],
}
_NOUN_VERBS = {
    True: ["calculate", "compute", "get", "find", "calc", "determine", ""],
    False: ["get", "find", "lookup", ""],
}
_LABELS = {
    "angle_degrees": "angle",
    "delta_t": "temperature rise",
    "time_hours": "time",
    "height_cm": "height in cm",
    "circumference_cm": "circumference in cm",
    "std_dev": "standard deviation",
    "std": "standard deviation",
}
_VERBS = set([
    "get", "set", "find", "create", "start", "stop", "delete", "calculate", "compute", "show", "read", "list",
    "check", "is", "send", "book", "order", "add", "play", "open", "close", "turn", "move", "convert",
    "translate", "count", "search", "lookup", "describe", "sort", "solve", "schedule", "plan", "generate",
    "evaluate", "fit", "run", "predict", "estimate", "analyze", "compare", "cancel", "update", "measure", "weigh",
])  # fmt: skip
_RENAMED = {
    "city": ["location", "town", "place"],
    "location": ["city", "place", "loc"],
    "number": ["n", "value", "num"],
    "numbers": ["values", "data", "items", "nums"],
    "data": ["values", "numbers", "dataset", "samples"],
    "date": ["day", "on_date", "target_date"],
    "percent": ["pct", "percentage", "level"],
    "rate": ["speed", "speed_percent", "pct"],
    "machine": ["machine_name", "machine_id", "asset"],
    "line_id": ["line", "line_number", "line_no"],
    "room": ["room_name", "area", "location"],
    "temperature": ["temp", "target_temp", "degrees"],
    "amount": ["value", "sum", "total"],
    "name": ["title", "label"],
    "limit": ["max_results", "count", "n", "top_k"],
    "query": ["q", "search_term", "keywords"],
    "unit": ["units", "output_unit"],
    "radius": ["r", "radius_length"],
    "height": ["h", "vertical_height"],
    "mass": ["m", "mass_kg"],
    "minutes": ["duration", "duration_minutes"],
    "device": ["device_id", "target"],
    "recipient": ["to", "receiver"],
    "year": ["yr", "in_year"],
}


class Field(msgspec.Struct, frozen=True):
    """A parameter as a table declares it; `link` is how its value joins a sentence (for a bool: true/false)."""

    name: str
    type: Type
    required: bool
    link: str | None

    @property
    def label(self) -> str:
        return _LABELS.get(self.name) or self.name.replace("_", " ")


class Function(msgspec.Struct, frozen=True):
    """A line of a table."""

    names: list[str]
    domain: str
    family: str
    fields: dict[str, Field]
    templates: list[Template]
    description: str
    result: str
    device: bool
    kept: frozenset[str]


class Slot(msgspec.Struct, frozen=True):
    """A parameter of a made tool: the field, the name it got, and how its values are written."""

    field: Field
    param: Param
    whole: bool
    form: str


class Made(msgspec.Struct, frozen=True):
    """A tool as one example shows it."""

    function: Function
    spec: ToolSpec
    slots: dict[str, Slot]


@cache
def functions() -> list[Function]:
    """All declared functions."""
    return [
        function for path in sorted(TABLES.glob("*.txt")) if path.stem != "blocked" for function in _read(path.stem)
    ]


@cache
def blocked() -> frozenset[str]:
    """Hashes of the function names that are not to be trained on."""
    return frozenset((TABLES / "blocked.txt").read_text().split())


def name_hash(name: str) -> str:
    """What `blocked` holds of a name."""
    return hashlib.sha256(name.replace(".", "_").lower().encode()).hexdigest()[:10]


def _read(stem: str) -> Iterator[Function]:
    domain = stem
    for raw in (TABLES / f"{stem}.txt").read_text().splitlines():
        line = raw.strip()
        if line.startswith("["):
            domain = line[1:-1]
        elif line and not line.startswith("#"):
            yield _function(line, domain, stem == "devices")


def _function(line: str, domain: str, device: bool) -> Function:
    parts = [part.strip() for part in line.split(";;")]
    names, params, phrases, description, result = parts + [""] * (5 - len(parts))
    family = ""
    if names.startswith("~"):
        family, _, names = names[1:].partition(" ")
    fields = {field.name: field for field in _fields(params)}
    templates = [compile_template(text.strip()) for text in re.split(r"//\s", phrases) if text.strip()]
    used = {name for template in templates for name in template.required}
    if unknown := {name for template in templates for name in template.slots} - set(fields):
        raise ValueError(f"{names}: no parameter {unknown}")
    return Function(
        names.split("/"), domain, family, fields, templates, description or _described(phrases, domain), result, device,
        frozenset(used),
    )  # fmt: skip


def _fields(text: str) -> Iterator[Field]:
    at = 0
    while at < len(text):
        found = _PARAM.match(text, at)
        if found is None or found.end() == at:
            raise ValueError(f"bad parameters: {text[at:]}")
        name, optional, kind, link = found.groups()
        yield Field(name, _type(kind or name, link), not optional, link)
        at = found.end()


def _type(text: str, link: str | None) -> Type:
    if text.startswith("["):
        return Type("list", inner=_type(text[1:-1], None))
    if text.startswith("dict("):
        pairs = [part.partition("=") for part in text[5:-1].split(",")]
        return Type("dict", fields={name: _type(kind or name, None) for name, _, kind in pairs})
    if text == "bool" or (link and text.startswith("bool")):
        return Type("bool")
    if text.startswith("choice"):
        head, _, items = text.partition("(")
        items = "|".join(item.strip() for item in items[:-1].split(","))
        return Type(head.partition("_")[2] or "choice", items)
    return named()[text]


def _described(phrases: str, domain: str) -> str:
    """A description out of the first template: slots and alternatives dropped."""
    first = re.split(r"//\s", phrases)[0].strip()
    mark, text = first[0], first[2:]
    text = re.sub(r"\(([^|()]*)\|[^()]*\)", r"\1", text)
    text = re.sub(r"\s*\b(for|of|in|on|at|with|to|from|between|the|a|by|as x =|and)?\s*\{[^}]*\}", "", text)
    text = " ".join(re.sub(r"\[[^\]]*\]", "", text).split()).strip(" ,.:?")
    verb = "Calculate" if domain in wording()["calculating"] else "Get"
    return f"{verb} {text}." if mark == "N" else f"{text[:1].upper()}{text[1:]}."


def make(function: Function, rng: Random, taken: set[str]) -> Made:
    """A tool as a caller might meet it, with a name that `taken` lacks."""
    camel, dotted = rng.random() < 0.1, rng.random() < 0.18
    name = _name(function, rng, camel, dotted, taken)
    names: set[str] = set()
    slots: dict[str, Slot] = {}
    for field in function.fields.values():
        if not field.required and field.name not in function.kept and rng.random() < 0.2:
            continue
        renamed = rng.choice(_RENAMED[field.name]) if field.name in _RENAMED and rng.random() < 0.3 else field.name
        renamed = field.name if renamed in names or renamed in function.fields else renamed
        names.add(renamed)
        slots[field.name] = _slot(field, _camel(renamed) if camel else renamed, rng, function.device)
    order = list(slots.values())
    if rng.random() < 0.2:
        rng.shuffle(order)
        order.sort(key=lambda slot: not slot.param.required)
    spec = ToolSpec(name, _description(function, rng), [slot.param for slot in order])
    return Made(function, spec, slots)


def _slot(field: Field, name: str, rng: Random, device: bool) -> Slot:
    kind = field.type
    base = kind
    while base.inner is not None:
        base = base.inner
    whole = base.kind == "float" and base.dec < 2 and not base.items and rng.random() < 0.35
    form = "YYYY-MM-DD" if rng.random() < 0.85 else rng.choice(list(DATE_FORMATS))
    about = rng.choice(kind.about.split("|")) if kind.about and rng.random() < 0.5 else ""
    if kind.kind == "date":
        about = form if form != "YYYY-MM-DD" or rng.random() < 0.8 else ""
    if not about and rng.random() < 0.12:
        about = f"{'' if field.required else 'optional '}{field.label}"
    param = _param(name, kind, whole, rng, device)
    required = field.required
    return Slot(field, msgspec.structs.replace(param, required=required, about=about), whole, form)


def _param(name: str, kind: Type, whole: bool, rng: Random, device: bool) -> Param:
    if kind.inner is not None:
        return Param(name, "list", items=_param("", kind.inner, whole, rng, False))
    if kind.fields:
        return Param(name, "dict", fields=[_param(n, f, whole, rng, False) for n, f in kind.fields.items()])
    if kind.kind == "choice":
        choices = kind.choices
        if rng.random() < 0.12:
            return Param(name, "str", about="one of " + ", ".join(choices))
        return Param(name, "choice", choices=choices)
    if kind.kind in ("str", "date", "time", "bool"):
        return Param(name, "bool" if kind.kind == "bool" else "str")
    as_kind: Kind = "int" if kind.kind == "int" or whole else "float"
    if not device or kind.items or rng.random() < 0.5:
        return Param(name, as_kind)
    low = 0.0 if kind.low >= 0 else kind.low * 2
    unit = kind.sets[0][0] if kind.units and len(kind.sets) == 1 and rng.random() < 0.6 else ""
    return Param(
        name, as_kind, low=low if kind.step > 1 else kind.low if kind.low < 2 else low, high=kind.high, unit=unit
    )


def _name(function: Function, rng: Random, camel: bool, dotted: bool, taken: set[str]) -> str:
    for attempt in range(12):
        base = rng.choice(function.names)
        head, _, tail = base.partition("_")
        if head in _SYNONYMS and rng.random() < 0.25:
            base = f"{rng.choice(_SYNONYMS[head])}_{tail}"
        elif head not in _VERBS and function.templates[0].mark == "N":
            verb = rng.choice(_NOUN_VERBS[function.domain in wording()["calculating"]])
            base = f"{verb}_{base}" if verb else base
        if (dotted or attempt > 3) and not base.startswith(function.domain):
            base = f"{function.domain}_{base}"
        name = _camel(base) if camel else base
        if attempt > 8:
            name = f"{name}_{rng.randint(2, 9)}"
        if name not in taken and name not in RESERVED and name_hash(name) not in blocked():
            break
    taken.add(name)
    return name


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _description(function: Function, rng: Random) -> str:
    text = function.description
    style = rng.random()
    if style < 0.12:
        return text.rstrip(".")
    if style < 0.2:
        head, _, tail = text.partition(" ")
        return f"{head}{'es' if head.endswith(('ch', 'sh', 's', 'x')) else 's'} {tail}" if head.isalpha() else text
    if style < 0.27:
        return f"{text} Part of the {function.domain} API."
    if style < 0.33:
        return f"This function can be used to {text[:1].lower()}{text[1:]}"
    return text
