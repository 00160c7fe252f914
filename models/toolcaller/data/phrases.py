"""Requests: templates with slots, and the ways in which people frame, list, correct and misspell them.

A template is a mark (N noun goal, V imperative, Q as it stands) and a text with `{slot}`, `{slot=value}` (said by the
words around it), `(a|b)` and `[optional]`. Invariants: `Said.values` holds exactly the slots whose words are in the
text; only words that carry no value are misspelt or lower-cased.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random
from typing import Any

import msgspec

from models.toolcaller.data.values import TABLES, Voice

_TOKEN = re.compile(r"\{(\w+)(?:=([^}]*))?\}|([\[\]()|])|([^\[\]()|{}]+)")
Node = tuple[str, Any]
Piece = tuple[str, bool]  # text, and whether it carries a value


class Template(msgspec.Struct, frozen=True):
    """A compiled template; `required` are the slots outside every optional group."""

    mark: str
    nodes: tuple[Node, ...]
    slots: frozenset[str]
    required: frozenset[str]


class Said(msgspec.Struct):
    """A phrase under way: its pieces and the values they carry, by field."""

    pieces: list[Piece]
    values: dict[str, Any]


@cache
def wording() -> dict[str, Any]:
    """The table of frames, contexts and small talk."""
    return tomllib.loads((TABLES / "wording.toml").read_text())


def compile_template(text: str) -> Template:
    """Read a template. Raises ValueError for an unknown mark or an open bracket."""
    mark, body = text[:1], text[1:].strip()
    if mark not in "NVQ" or text[1:2] != " ":
        raise ValueError(f"a template begins with N, V or Q: {text!r}")
    tokens = list(_TOKEN.finditer(body))
    nodes, at = _sequence(tokens, 0, "")
    if at != len(tokens):
        raise ValueError(f"unbalanced: {text!r}")
    slots, required = _slots(nodes)
    return Template(mark, nodes, frozenset(slots), frozenset(required))


def _sequence(tokens: list[re.Match[str]], at: int, close: str) -> tuple[tuple[Node, ...], int]:
    branches: list[tuple[Node, ...]] = []
    nodes: list[Node] = []
    while at < len(tokens):
        slot, value, bracket, text = tokens[at].groups()
        at += 1
        if slot:
            nodes.append(("slot", (slot, value)))
        elif text:
            nodes.append(("text", text))
        elif bracket == "|" and close:
            branches.append(tuple(nodes))
            nodes = []
        elif bracket == close:
            branches.append(tuple(nodes))
            return (("alt", branches),) if len(branches) > 1 else branches[0], at
        elif bracket in "([":
            inner, at = _sequence(tokens, at, ")" if bracket == "(" else "]")
            if bracket == "(" and len(inner) == 1 and inner[0][0] == "alt":
                nodes += inner
            elif bracket == "(":
                nodes += [("text", "("), *inner, ("text", ")")]
            else:
                nodes.append(("opt", inner))
        else:
            raise ValueError(f"unbalanced {bracket!r}")
    if close:
        raise ValueError(f"{close} is missing")
    return tuple(nodes), at


def _slots(nodes: Sequence[Node]) -> tuple[set[str], set[str]]:
    slots: set[str] = set()
    required: set[str] = set()
    for kind, body in nodes:
        if kind == "slot":
            slots.add(body[0])
            required.add(body[0])
        elif kind == "opt":
            slots |= _slots(body)[0]
        elif kind == "alt":
            for branch in body:
                slots |= _slots(branch)[0]
                required |= _slots(branch)[1]
    return slots, required


def expand(nodes: Sequence[Node], given: Mapping[str, tuple[Any, str]], rng: Random, said: Said) -> None:
    """Write the nodes out into `said`; `given` has the value and words of each slot that may be used."""
    for kind, body in nodes:
        if kind == "text":
            said.pieces.append((body, False))
        elif kind == "alt":
            expand(rng.choice(body), given, rng, said)
        elif kind == "opt":
            if _slots(body)[0] <= set(given) and rng.random() < 0.5:
                expand(body, given, rng, said)
        else:
            name, fixed = body
            if fixed is not None:
                said.values[name] = fixed
            else:
                said.values[name] = given[name][0]
                said.pieces.append((given[name][1], True))


class Rest(msgspec.Struct, frozen=True):
    """A value that no template named: its label, its words, and how it joins a sentence ("" by its label)."""

    label: str
    words: str
    link: str | None


def joined(rest: Rest, rng: Random) -> list[Piece]:
    """` in Paris`, for a link that may hold the words."""
    link = rng.choice((rest.link or "").split("|" if "{}" not in (rest.link or "") else "/"))
    if "{}" not in link:
        link = f"{link} {{}}" if link else "{}"
    before, _, after = link.partition("{}")
    return [(f" {before}", False), (rest.words, True), (after, False)]


def listed(rests: Sequence[Rest], rng: Random) -> list[Piece]:
    """` with base 10 and height 4`, in one of the ways people write such lists."""
    style = rng.choice(["with", "with a", "given", "where", "equals", "comma", "for"])
    head, between = {
        "with": (" with ", " "),
        "with a": (" with a ", " of "),
        "given": (" given ", " "),
        "where": (" where the ", " is "),
        "equals": (", ", " = "),
        "comma": (", ", " "),
        "for": (" for ", " "),
    }[style]
    pieces: list[Piece] = []
    for index, rest in enumerate(rests):
        joint = head if index == 0 else " and " if index == len(rests) - 1 else ", "
        if index and style in ("with a", "where"):
            joint += "a " if style == "with a" else "the "
        if style == "equals" and index:
            joint = ", "
        if joint.endswith("with a ") or (style == "with a" and joint.endswith("a ")):
            joint = joint[:-2] + ("an " if rest.label[0] in "aeiou" else "a ")
        pieces += [(f"{joint}{rest.label}{between}", False), (rest.words, True)]
    return pieces


def facts(rests: Sequence[Rest], rng: Random) -> list[Piece]:
    """`The base is 10 and the height is 4.`, as a sentence of its own."""
    pieces: list[Piece] = []
    short = rng.random() < 0.4
    for index, rest in enumerate(rests):
        if short:
            joint, between = ("; " if index else ""), rng.choice([": ", " = "])
        else:
            joint = "The " if index == 0 else " and the " if index == len(rests) - 1 else ", the "
            between = " is "
        pieces += [(f"{joint}{rest.label}{between}", False), (rest.words, True)]
    return [*pieces, (". ", False)]


def frame(mark: str, domain: str, pieces: list[Piece], rng: Random) -> list[Piece]:
    """The phrase as a question, an order, a wish."""
    if mark == "Q":
        return pieces
    words = wording()
    key = "order" if mark == "V" else "calculate" if domain in words["calculating"] else "lookup"
    before, _, after = rng.choice(words[key]).partition("_")
    return [(before, False), *pieces, (after, False)]


def finish(pieces: Sequence[Piece], voice: Voice, domain: str = "", context: bool = True) -> str:
    """The request as typed: context around it, casing, misspellings, the last point."""
    rng = voice.rng
    style = rng.random()
    text = "".join(_misspelt(part, rng) if not fixed and rng.random() < 0.03 else part for part, fixed in pieces)
    if style < 0.15:
        text = "".join(part if fixed else part.lower() for part, fixed in pieces)
    elif style < 0.18:
        text = text.lower() if not any(fixed and part != part.lower() for part, fixed in pieces) else text
    text = re.sub(r"\s+([,.?!;:])", r"\1", " ".join(text.split())).strip()
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
    text = re.sub(r"\ban (?=[bcdfgjklmnpqrstvwxyz])", "a ", text)
    text = re.sub(r"([,.?!])(?:\s*[,.])+", r"\1", text)
    if style > 0.3:
        text = text[:1].upper() + text[1:]
    if text[-1:] not in ".?!" and style > 0.55:
        text += "?" if re.match(r"(?i)(what|how|which|where|when|who|can|could|would|is|are|does|do)\b", text) else "."
    if context and rng.random() < 0.1:
        words = wording()
        group = words["contexts"].get(domain) or words["contexts"]["any"]
        lead = rng.choice(group if rng.random() < 0.6 else words["contexts"]["any"])
        text = f"{lead} {text}" if rng.random() < 0.75 else f"{text}{'' if text[-1] in '.?!' else '.'} {lead}"
    elif context and rng.random() < 0.08:
        before, _, after = rng.choice(wording()["address"]).partition("_")
        text = f"{before}{text if not before else text[:1].lower() + text[1:]}{after if text[-1] not in '.?!' else ''}"
    return text


def _misspelt(text: str, rng: Random) -> str:
    spots = [i for i in range(1, len(text) - 2) if text[i : i + 2].isalpha() and text[i - 1].isalpha()]
    if not spots:
        return text
    at = rng.choice(spots)
    match rng.randint(0, 3):
        case 0:
            return text[:at] + text[at + 1 :]
        case 1:
            return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        case 2:
            return text[:at] + text[at] + text[at:]
        case _:
            return text[:at] + rng.choice("aeiounrst") + text[at + 1 :]
