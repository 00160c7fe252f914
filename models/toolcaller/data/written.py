"""Groups of tools and requests written one by one (`written/*.txt`): what templates cannot say.

    [name]                                    opens a group of tools that belong together
    @ name(a: int 1..3 mm (note), b?: str) - Description.
    ~ value: 3, unit: mm                      what the tool above may return
    > request                                 and below it every call that it asks for, one a line, or none()
    call(a=1)
    ~ value: 2, unit: mm                      behind a call: a result, and the next step after it; none() ends a story

Invariants: every call validates against the tools of its group and is written in its canonical form; no tool has a
name that is held back (`tables/blocked.txt`). `python -m models.toolcaller.data.written FILE` says what is not so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from edge_agent.agent.calls import RESERVED, Call, CallError, Nothing, parse, validate
from edge_agent.agent.tool import Kind, Param, ToolSpec
from models.toolcaller.data.catalogue import blocked, name_hash

FOLDER = Path(__file__).parent / "written"
_NAME = re.compile(r"[A-Za-z_]\w{0,62}", re.ASCII)
_BOUNDS = re.compile(r"(-?[\d.]*?)\.\.(-?[\d.]*)(?=[\s,)\]}(]|$)")
_UNIT = re.compile(r"[^\s,(){}\[\]]+")
_KINDS: tuple[Kind, ...] = ("int", "float", "bool", "str", "dict")


class Request(msgspec.Struct, frozen=True):
    """What somebody says and what is right: all `calls` at once, or a `story` of calls with their results."""

    text: str
    calls: list[Call]
    story: list[tuple[Call, str]] = []


class Group(msgspec.Struct, frozen=True):
    """Tools of one API or device, what they return, and requests to them."""

    name: str
    domain: str
    tools: list[ToolSpec]
    results: dict[str, list[str]]
    requests: list[Request]


class WrittenError(ValueError):
    """A line that cannot be read; the message says what is wrong."""


@cache
def groups() -> list[Group]:
    """All groups of all files. Raises WrittenError for the first bad line."""
    found: list[Group] = []
    for path in sorted(FOLDER.glob("*.txt")):
        made, wrong = read(path)
        if wrong:
            raise WrittenError(f"{path.name}:{wrong[0]}")
        found += made
    return found


def of_site(path: Path) -> list[Group]:
    """The groups of a site's own file. Raises WrittenError with every line that is not right."""
    made, wrong = read(path, own=True)
    if wrong or not made:
        raise WrittenError("\n".join(f"{path.name}:{line}" for line in wrong) or f"{path.name} holds no group")
    return made


def read(path: Path, own: bool = False) -> tuple[list[Group], list[str]]:
    """The groups of a file, and `line: reason` of every line that is not right; `own` names may be any."""
    made: list[Group] = []
    wrong: list[str] = []
    for group, lines in _blocks(path, wrong):
        for block in lines:
            number, (_, head), below = block[0][0], block[0][1], block[1:]
            try:
                if block[0][1][0] == "@":
                    spec = tool(head, own)
                    if any(spec.name == other.name for other in group.tools):
                        raise WrittenError(f"{spec.name} is declared twice")
                    group.tools.append(spec)
                    group.results[spec.name] = [text for _, (_, text) in below]
                else:
                    group.requests.append(
                        _request(head, [(number, mark, text) for number, (mark, text) in below], group)
                    )
            except (WrittenError, CallError) as error:
                wrong.append(f"{number}: {error}")
        if not group.requests or not group.tools:
            wrong.append(f"0: group {group.name} has no tools or no requests")
        made.append(group)
    return made, wrong


Line = tuple[int, tuple[str, str]]


def _blocks(path: Path, wrong: list[str]) -> Iterator[tuple[Group, list[list[Line]]]]:
    """Each group, empty, with its blocks: a line of @ or > and the lines below it."""
    group: Group | None = None
    blocks: list[list[Line]] = []
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            if group is not None:
                yield group, blocks
            group, blocks = Group(line[1:-1], path.stem, [], {}, []), []
        elif line[:2] in ("@ ", "> "):
            blocks.append([(number, (line[0], line[2:].strip()))])
        elif group is None or not blocks:
            wrong.append(f"{number}: a line of no group or request: {line[:60]}")
        else:
            mark, text = ("~", line[1:].strip()) if line[0] == "~" else ("=", line)
            if mark == "=" and blocks[-1][0][1][0] == "@":
                wrong.append(f"{number}: a call below a tool, not below a request: {line[:60]}")
            else:
                blocks[-1].append((number, (mark, text)))
    if group is not None:
        yield group, blocks


def _request(text: str, below: list[tuple[int, str, str]], group: Group) -> Request:
    calls: list[Call] = []
    results: list[str] = []
    ended = False
    for _, mark, line in below:
        if mark == "~":
            if len(results) != len(calls) - 1:
                raise WrittenError("a result stands behind each call of a story, and nowhere else")
            results.append(line)
            continue
        decision = parse(line)
        if ended:
            raise WrittenError("nothing follows none()")
        if isinstance(decision, Nothing):
            ended = True
        elif not isinstance(decision, Call):
            raise WrittenError("answers are not written here")
        else:
            right = validate(decision, group.tools)
            if list(right.args) != list(decision.args):
                raise WrittenError(f"arguments of {right.name} in declared order: {', '.join(right.args)}")
            calls.append(right)
    if not calls and not ended:
        raise WrittenError("a request has calls or none()")
    if results and (len(results) != len(calls) or not ended):
        raise WrittenError("a story has a result behind each call and ends with none()")
    if not results and calls and ended:
        raise WrittenError("calls without results do not end with none()")
    if len(text) > 1900:
        raise WrittenError("the request is too long")
    return Request(text, [] if results else calls, list(zip(calls, results, strict=True)) if results else [])


def tool(text: str, own: bool = False) -> ToolSpec:
    """Read `name(params) - Description.` Raises WrittenError, without `own` also for a name that is held back."""
    reader = _Reader(text)
    name = reader.name()
    if name in RESERVED or (not own and name_hash(name) in blocked()):
        raise WrittenError(f"{name} is a name that must not be used; take another")
    reader.expect("(")
    params = reader.params(")")
    reader.expect(")")
    reader.expect(" - ")
    description = text[reader.at :].strip()
    if not description or len(description) > 300:
        raise WrittenError(f"{name}: a description of at most 300 characters behind ' - '")
    return ToolSpec(name, description, params)


class _Reader:
    """A signature, read from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def expect(self, what: str) -> None:
        if not self.text.startswith(what, self.at):
            raise WrittenError(f"expected {what!r} at {self.text[self.at : self.at + 40]!r}")
        self.at += len(what)

    def next(self, what: str) -> bool:
        if not self.text.startswith(what, self.at):
            return False
        self.at += len(what)
        return True

    def match(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            return ""
        self.at = found.end()
        return found[0]

    def name(self) -> str:
        if not (found := self.match(_NAME)):
            raise WrittenError(f"expected a name at {self.text[self.at : self.at + 40]!r}")
        return found

    def params(self, close: str) -> list[Param]:
        found: list[Param] = []
        while not self.text.startswith(close, self.at):
            if found:
                self.expect(", ")
            name = self.name()
            if any(name == param.name for param in found):
                raise WrittenError(f"{name} is declared twice")
            required = not self.next("?")
            self.expect(": ")
            found.append(msgspec.structs.replace(self.type(), name=name, required=required, about=self.note()))
        return found

    def type(self) -> Param:
        if self.text.startswith('"', self.at):
            choices = [self.choice()]
            while self.next("|"):
                choices.append(self.choice())
            return Param("", "choice", choices=choices)
        if self.next("["):
            items = None if self.next("any") else self.type()
            self.expect("]")
            return Param("", "list", items=items)
        if self.next("{"):
            fields = self.params("}")
            self.expect("}")
            return Param("", "dict", fields=fields)
        kind = next((kind for kind in _KINDS if self.next(kind)), None)
        if kind is None:
            raise WrittenError(f"expected a type at {self.text[self.at : self.at + 40]!r}")
        low = high = None
        unit = ""
        if kind in ("int", "float") and self.text.startswith(" ", self.at):
            bounds = _BOUNDS.match(self.text, self.at + 1)
            if bounds:
                self.at = bounds.end()
                low, high = (float(part) if part else None for part in bounds.groups())
            if self.text.startswith(" ", self.at) and not self.text.startswith(" (", self.at):
                self.at += 1
                unit = self.match(_UNIT)
        return Param("", kind, low=low, high=high, unit=unit)

    def choice(self) -> str:
        self.expect('"')
        end = self.text.find('"', self.at)
        if end < 0:
            raise WrittenError("a choice has no end")
        found, self.at = self.text[self.at : end], end + 1
        return found

    def note(self) -> str:
        if not self.next(" ("):
            return ""
        depth, start = 1, self.at
        while depth:
            if self.at >= len(self.text):
                raise WrittenError("a note has no end")
            depth += {"(": 1, ")": -1}.get(self.text[self.at], 0)
            self.at += 1
        note = self.text[start : self.at - 1]
        if len(note) > 320:
            raise WrittenError(f"the note {note[:40]!r}… is longer than 320 characters")
        return note


def main(path: Path) -> int:
    """Print what is wrong with a file, and what it holds."""
    made, wrong = read(path)
    wrong += [f"0: {line}" for line in held(made)]
    for line in wrong:
        print(f"{path.name}:{line}")
    requests = [request for group in made for request in group.requests]
    none = sum(not request.calls and not request.story for request in requests)
    several, stories = sum(len(r.calls) > 1 for r in requests), sum(bool(r.story) for r in requests)
    kinds = f"{none} none, {several} several, {stories} stories"
    print(f"{len(made)} groups, {len(requests)} requests: {kinds}; {len(wrong)} bad lines")
    return 1 if wrong else 0


def held(made: list[Group]) -> list[str]:
    """Requests and tools that share words in a row with BFCL's cases (nothing of which is shown)."""
    from models.fetch import default_cache
    from models.toolcaller.evaluate.overlap import Held

    theirs = Held.load(default_cache())
    found = [
        f"too like a benchmark, say it otherwise: {r.text[:100]}"
        for g in made
        for r in g.requests
        if theirs.shares(r.text)
    ]
    found += [f"{t.name} is a name that must not be used" for g in made for t in g.tools if theirs.named(t.name)]
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
