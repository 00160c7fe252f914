"""Tools of many, mostly optional parameters, and requests that name any few of them (`slots/*.txt`).

    [name]                                    opens a group, as in `written.py`; @ and ~ lines are written as there
    = find me a table | table please          openings of requests to the tool above
    + town: in {} | over in {} :: Oslo, Norway = Oslo / the Norwegian capital | Lima, Peru
    + terrace: {} :: true = on the terrace / outside | false = not outside
    + day: on {} | for {} :: @date DD/MM/YYYY          also @time, and @int 1..8

What is said of a parameter stands before `::`, with `{}` for the value; behind it are the values, each as it is said.
Invariants: a call holds what its request says, and no more; a parameter that must be there is always said.
`python -m models.toolcaller.data.slots FILE` says what is not so, and shows a few requests.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from edge_agent.agent.calls import Call, CallError, render, validate
from edge_agent.agent.tool import Param, ToolSpec
from models.toolcaller.data.values import Voice, enumerated, say_date, say_time, words
from models.toolcaller.data.written import Group, Request, WrittenError, held, tool

FOLDER = Path(__file__).parent / "slots"
REQUESTS = 16  # of a group in a bunch
ASKING = (
    "can",
    "could",
    "what",
    "which",
    "who",
    "where",
    "when",
    "how",
    "is",
    "are",
    "do",
    "does",
    "would",
    "will",
    "any",
)


class Slot(msgspec.Struct, frozen=True):
    """What is said of a parameter, and its values with their words; `kind` is of those that are drawn."""

    phrases: list[str]
    values: list[tuple[str, list[str]]]
    kind: str = ""


class Api(msgspec.Struct, frozen=True):
    """A tool, what it returns, and how it is asked."""

    spec: ToolSpec
    results: list[str]
    openings: list[str]
    slots: dict[str, Slot]


class Scene(msgspec.Struct, frozen=True):
    """The tools of a group."""

    name: str
    domain: str
    apis: list[Api]


@cache
def scenes() -> list[Scene]:
    """All groups of all files. Raises WrittenError for the first bad line."""
    return [scene for path in sorted(FOLDER.glob("*.txt")) for scene in read(path)]


def read(path: Path) -> list[Scene]:
    """The groups of a file. Raises WrittenError with the line's number."""
    found: list[Scene] = []
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark, text = raw[:1], raw[1:].strip()
        try:
            if mark == "[":
                found.append(Scene(raw.strip()[1:-1], path.stem, []))
            elif mark == "@":
                found[-1].apis.append(Api(tool(text), [], [], {}))
            elif mark == "~":
                found[-1].apis[-1].results.append(text)
            elif mark == "=":
                found[-1].apis[-1].openings.extend(part.strip() for part in text.split("|"))
            elif mark == "+":
                name, _, rest = text.partition(":")
                found[-1].apis[-1].slots[name.strip()] = _slot(rest)
            elif raw.strip() and mark != "#":
                raise WrittenError(f"a line begins with one of [ @ ~ = +: {raw[:40]}")
        except (WrittenError, IndexError, ValueError) as error:
            raise WrittenError(f"{path.name}:{number}: {error}") from error
    for api in (api for scene in found for api in scene.apis):
        if {param.name for param in api.spec.params} != api.slots.keys() or not api.openings:
            raise WrittenError(f"{path.name}: {api.spec.name} wants = and a + for each of its parameters, no other")
    return found


def _slot(text: str) -> Slot:
    said, colons, values = text.partition("::")
    phrases = [part.strip() for part in said.split("|")]
    if not colons or not all(phrase.count("{}") == 1 for phrase in phrases):
        raise WrittenError("name: phrases with {} :: values")
    if values.strip().startswith("@"):
        kind = values.strip()[1:]
        _drawn(kind, Random(1))
        return Slot(phrases, [], kind)
    pairs = [value.partition(" = ") for value in values.split("|")]
    return Slot(phrases, [(v.strip(), [word.strip() for word in (w or v).split(" / ")]) for v, _, w in pairs])


def draw(scene: Scene, rng: Random) -> Group:
    """The group with requests of this time."""
    requests = [_request(rng.choice(scene.apis), rng) for _ in range(REQUESTS)]
    results = {api.spec.name: api.results for api in scene.apis}
    return Group(scene.name, scene.domain, [api.spec for api in scene.apis], results, requests)


def _request(api: Api, rng: Random) -> Request:
    args: dict[str, Any] = {}
    said: list[str] = []
    share = rng.choice([0.2, 0.4, 0.6])
    for param in api.spec.params:
        if param.required or rng.random() < share:
            slot = api.slots[param.name]
            args[param.name], told = _value(param, slot, rng)
            said.append(rng.choice(slot.phrases).replace("{}", told))
    if rng.random() < 0.6:
        rng.shuffle(said)
    opening = rng.choice(api.openings)
    text = _text(opening, said, rng)
    asks = opening.lower().startswith(ASKING)
    end = "" if text[-1] in ".?!" else rng.choice(["", "?", "?"] if asks else ["", "", ".", ".", ", please", " pls"])
    return Request(text + end, [validate(Call(api.spec.name, args), [api.spec])])


def _text(opening: str, said: list[str], rng: Random) -> str:
    """The phrases behind the opening, whole sentences last."""
    parts = [part for part in said if not _whole(part)]
    joints = [rng.choice([" ", " ", ", "])] + [rng.choice([" ", ", ", ", ", " and ", ", and "]) for _ in parts]
    text = opening + "".join(joint + part for joint, part in zip(joints, parts, strict=False))
    return ". ".join([text, *(part.rstrip(".") for part in said if _whole(part))]) + "." * (len(parts) < len(said))


def _whole(phrase: str) -> bool:
    return phrase[:1].isupper() and phrase.endswith(".")


def _value(param: Param, slot: Slot, rng: Random) -> tuple[Any, str]:
    if param.kind == "list":
        inner = param.items or Param("", "str")
        some = [_value(inner, slot, rng) for _ in range(rng.choice([1, 2, 2, 3]))]
        some = list({str(value): (value, said) for value, said in some}.values())
        return [value for value, _ in some], enumerated([said for _, said in some])
    value, said = _drawn(slot.kind, rng) if slot.kind else _named(slot, rng)
    return _typed(param, value), said


def _named(slot: Slot, rng: Random) -> tuple[str, str]:
    value, spoken = rng.choice(slot.values)
    return value, rng.choice(spoken)


def _typed(param: Param, value: str) -> Any:
    match param.kind:
        case "int":
            return int(value)
        case "float":
            return float(value)
        case "bool":
            return {"true": True, "false": False}[value]
        case _:
            return value


def _drawn(kind: str, rng: Random) -> tuple[str, str]:
    name, _, form = kind.partition(" ")
    if name == "date":
        return say_date(Voice(rng), form)
    if name == "time":
        return say_time(Voice(rng))
    if name != "int":
        raise WrittenError(f"@{kind}: @date FORM, @time or @int A..B")
    number = rng.randint(*map(int, form.split("..")))
    return str(number), words(number) if 0 <= number < 20 and rng.random() < 0.4 else str(number)


def main(path: Path) -> int:
    """Print what is wrong with a file, and a few of its requests."""
    try:
        found = read(path)
        drawn = [draw(scene, Random(seed)) for scene in found for seed in range(6)]
    except (WrittenError, CallError, ValueError, KeyError) as error:
        print(error)
        return 1
    for group in drawn[::6]:
        for request in group.requests[:3]:
            print(f"> {request.text}\n{render(request.calls[0])}")
    wrong = held(drawn)
    print("\n".join(sorted(set(wrong))))
    print(f"{len(found)} groups, {sum(len(scene.apis) for scene in found)} tools; {len(wrong)} bad")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
