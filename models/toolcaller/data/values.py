"""Semantic types of values: what a person might ask for, and how it is said.

Invariants: `Type.sample` gives a value together with words from which that value can be read, so a call never holds
what its request does not say; within one `Voice` a unit is chosen once for a type, so lengths do not mix units.
Types are read from `tables/values.toml`; a `Voice` owns all randomness.
"""

from __future__ import annotations

import re
import tomllib
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import msgspec

TABLES = Path(__file__).with_name("tables")
MONTHS = tuple([
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
])  # fmt: skip
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SPOKEN = re.compile(r"(?<![ <>=!])=(?![ =])")  # not the = of an equation
_UNIT = re.compile(r"/(?!(?:h|s|s²|m3|m)(?:/|$))")  # km/h is one unit
DATE_FORMATS = {"YYYY-MM-DD": "%Y-%m-%d", "MM/DD/YYYY": "%m/%d/%Y", "DD.MM.YYYY": "%d.%m.%Y"}


class Type(msgspec.Struct, frozen=True):
    """A semantic type; `items` are `value=spoken/spoken` alternatives, `units` alternatives of unit words."""

    kind: str
    items: str = ""
    low: float = 0
    high: float = 100
    step: float = 1
    dec: int = 0
    units: str = ""
    link: str | None = None
    about: str = ""
    money: bool = False
    pct: bool = False
    plain: bool = False
    quote: bool = False
    exactly: int = 0
    dozen: bool = False
    inner: Type | None = None
    fields: dict[str, Type] = {}

    @property
    def choices(self) -> list[str]:
        """The literals of a choice."""
        return [value for value, _ in _items(self.items)]

    @property
    def sets(self) -> list[list[str]]:
        """The unit words, one list for each unit."""
        return _units(self.units)


@cache
def _units(units: str) -> list[list[str]]:
    return [_UNIT.split(unit) for unit in units.split("|")]


class Voice:
    """One speaker: a random source and the habits that stay the same within a request."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.units: dict[str, list[str]] = {}
        self.spells = rng.random() < 0.12
        self.quotes = rng.choice(["", "", '"', "'"])
        self.bare = rng.random() < 0.2
        self.brackets = rng.random() < 0.4


@cache
def named() -> dict[str, Type]:
    """The types of the table."""
    return msgspec.convert(tomllib.loads((TABLES / "values.toml").read_text()), dict[str, Type])


@cache
def _items(items: str) -> list[tuple[str, list[str]]]:
    pairs = [_SPOKEN.split(item, maxsplit=1) for item in items.split("|")]
    return [(pair[0], pair[1].split("/") if len(pair) > 1 else pair[:1]) for pair in pairs]


def sample(kind: Type, voice: Voice, whole: bool = False, form: str = "YYYY-MM-DD") -> tuple[Any, str]:
    """A value and how it is said; `whole` makes a float an int, `form` is the form of a date."""
    rng = voice.rng
    if kind.inner is not None:
        return _list(kind, kind.inner, voice, whole)
    if kind.fields:
        parts = {name: sample(field, voice, whole) for name, field in kind.fields.items()}
        said = ", ".join(f"{name.replace('_', ' ')} {words}" for name, (_, words) in parts.items())
        return {name: value for name, (value, _) in parts.items()}, said
    if kind.kind == "bool":
        value = rng.random() < 0.7
        return value, "yes" if value else "no"
    if kind.kind == "date":
        return say_date(voice, form)
    if kind.kind == "time":
        return say_time(voice)
    if kind.items:
        return _item(kind, voice)
    number = _number(kind, rng, whole)
    return number, say_number(kind, number, voice)


def _item(kind: Type, voice: Voice) -> tuple[Any, str]:
    text, spoken = voice.rng.choice(_items(kind.items))
    said = voice.rng.choice(spoken)
    if kind.quote and voice.quotes:
        said = f"{voice.quotes}{said}{voice.quotes}" if voice.quotes not in said else said
    if kind.kind == "int":
        return int(text), said
    return (float(text), said) if kind.kind == "float" else (text, said)


def _list(kind: Type, inner: Type, voice: Voice, whole: bool) -> tuple[list[Any], str]:
    rng = voice.rng
    count = (
        inner.exactly or kind.exactly or rng.choice([2, 3, 3, 4, 5, 6] if inner.kind in ("int", "float") else [2, 3])
    )
    if inner.inner is not None:
        size = rng.choice([2, 2, 3])
        square = msgspec.structs.replace(inner, exactly=size)
        rows = [sample(square, voice, whole)[0] for _ in range(size)]
        return rows, str(rows)
    pairs = [sample(inner, voice, whole) for _ in range(count)]
    if inner.items:
        pairs = list({str(value): (value, said) for value, said in pairs}.values())
    values, said = [v for v, _ in pairs], [s for _, s in pairs]
    numeric = inner.kind in ("int", "float")
    if inner.exactly == 2:
        return values, f"({said[0]}, {said[1]})"
    if numeric and voice.brackets:
        return values, f"[{', '.join(said)}]"
    if numeric and voice.bare:
        return values, ", ".join(said)
    return values, enumerated(said)


def enumerated(said: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = said
    return f"{', '.join(first)} and {last}" if first else last


def _number(kind: Type, rng: Random, whole: bool) -> int | float:
    steps = int((kind.high - kind.low) / kind.step)
    if kind.kind == "int" or whole or (kind.dec < 2 and rng.random() < 0.6):
        number = round(kind.low + kind.step * rng.randint(0, steps))
        number = max(number, 1) if kind.low > 0 else number
        return number if kind.kind == "int" or whole else float(number)
    return round(rng.uniform(kind.low, kind.high), rng.randint(1, max(kind.dec, 1)))


def say_number(kind: Type, number: float, voice: Voice) -> str:
    """The words for a number: digits or spelled, with money signs and units."""
    rng = voice.rng
    text = f"{number:.10f}".rstrip("0").rstrip(".") if isinstance(number, float) else str(number)
    if kind.plain:
        return text
    if number >= 1000 and rng.random() < 0.4 and "." not in text and not kind.exactly:
        text = f"{int(number):,}" if kind.money else text
    if kind.money:
        return rng.choice([f"${text}", f"${text}", f"{text} dollars", text])
    if voice.spells and number == int(number) and 0 <= number < 100:
        text = words(int(number))
    if not kind.units:
        if kind.dozen and number in (6, 12) and rng.random() < 0.4:
            return "half a dozen" if number == 6 else "a dozen"
        return text
    unit = rng.choice(voice.units.setdefault(kind.units, rng.choice(kind.sets)))
    if not unit:
        return text
    glued = unit in ("%", "°", "°C", "°F") or (len(unit) <= 2 and rng.random() < 0.3)
    return f"{text}{unit}" if glued and text[-1].isdigit() else f"{text} {unit}"


def words(number: int) -> str:
    """A number below 100 in words."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def say_date(voice: Voice, form: str) -> tuple[str, str]:
    rng = voice.rng
    day = date(2019, 1, 1) + timedelta(days=rng.randint(0, 3600))
    month = MONTHS[day.month - 1]
    ending = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    said = rng.choice(
        [
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month} {day.year}",
            f"{month[:3]} {day.day} {day.year}",
            f"the {day.day}{ending} of {month} {day.year}",
            f"{month} {day.day}{ending}, {day.year}",
            day.isoformat(),
            day.isoformat(),
            day.strftime(DATE_FORMATS[form]),
        ]
    )
    return day.strftime(DATE_FORMATS[form]), said


def say_time(voice: Voice) -> tuple[str, str]:
    rng = voice.rng
    hour, minute = rng.randint(0, 23), rng.choice([0, 0, 0, 15, 30, 30, 45, 5, 20, 40])
    value = f"{hour:02d}:{minute:02d}"
    if value in ("12:00", "00:00"):
        return value, "noon" if hour else "midnight"
    half, twelve = ("am", "pm")[hour >= 12], (hour + 11) % 12 + 1
    spoken = [value, f"{twelve}:{minute:02d} {half}", f"{twelve}:{minute:02d}{half}"]
    if minute == 0:
        part = "in the morning" if 3 < hour < 12 else "in the evening" if 16 < hour < 22 else ""
        spoken += [f"{twelve} {half}", f"{twelve}{half}"] + [f"{twelve} {part}", f"{twelve} o'clock {part}"] * bool(
            part
        )
    if minute == 30 and 4 < hour < 12:
        spoken.append(f"half past {_ONES[twelve]} in the morning")
    return value, rng.choice(spoken)
