"""One decision a case (a part, where its words count parts) through the engine that serves devices, judged by BFCL's
checker, and the report's rows.

Invariants: prompt, grammar, what a call is taken to mean and validation are the device's own, the same in every
category, so nothing tells the model how many calls a case wants; a decision is kept under the digest of its model and
its whole request, so a run that was stopped goes on; only development cases can be written out. One rule is stricter
than BFCL's: text that is no call (cut off, out of bounds) is wrong everywhere, also where no call was the right answer.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.agent import grammar, meant, prompt
from edge_agent.agent.calls import Call, CallError, Nothing, parse_all, render, validate
from edge_agent.agent.parts import parts
from edge_agent.agent.tool import ToolSpec
from edge_agent.engines.base import Generate, LanguageModel, Piece
from edge_agent.errors import Refused
from models.toolcaller.evaluate import figures
from models.toolcaller.evaluate.bfcl import PEER, PUBLISHED, Case, Check
from models.toolcaller.evaluate.convert import Tools, convert

SEVERAL = 8  # calls that one decision may hold
MAX_TOKENS = 512
CONTEXT = 8192
NONE = render(Nothing())
KINDS = {
    "wrong_func_name": "wrong tool",
    "missing_required": "missing argument",
    "missing_optional": "missing argument",
    "unexpected_param": "extra argument",
    "type_error": "wrong type",
    "value_error": "wrong value",
    "dict_checker": "wrong value",
    "list_dict_checker": "wrong value",
}


class Result(msgspec.Struct, frozen=True):
    """A judged decision; `failure` is empty when it is right."""

    id: str
    category: str
    failure: str
    ms: float
    confidence: float
    tokens: int
    loose: int = 0
    text: str = ""


class Kept:
    """Decisions of one model in a file, by the hash of the request."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._pieces = file, dict[str, Piece]()
        for line in file.read_bytes().splitlines() if file.exists() else []:
            try:
                key, piece = msgspec.json.decode(line, type=tuple[str, Piece])
            except msgspec.MsgspecError:  # torn by a kill: that decision is made again
                continue
            self._pieces[key] = piece

    def decide(self, model: LanguageModel, request: Generate) -> Piece:
        """The whole completion, from the file or from the model; `finish` is "refused" when it does not fit."""
        key = hashlib.sha256(msgspec.msgpack.encode(request)).hexdigest()
        if key not in self._pieces:
            try:
                pieces = list(model.generate(request, lambda: False))
                text = "".join(piece.text for piece in pieces)
                self._pieces[key] = msgspec.structs.replace(pieces[-1], text=text)
            except Refused as error:
                self._pieces[key] = Piece(str(error), done=True, finish="refused")
            with self._file.open("ab") as file:
                file.write(b"\n" * (file.tell() > 0) + msgspec.json.encode((key, self._pieces[key])))
        return self._pieces[key]


def request(case: Case, tools: Tools, adapter: str = "", said: Sequence[str] = ()) -> Generate:
    """What the model is asked when it has said so much to the parts before."""
    turns: list[prompt.Turn] = []
    told = ""
    for role, text in case.messages:
        if role == "system":
            told += f"{text}\n"
        elif role == "assistant":
            turns.append(prompt.Turn("assistant", text))
        else:
            asked = parts(text) if text is case.messages[-1][1] else [text]
            for n, part in enumerate(asked[: len(said) + 1]):
                if n:
                    turns.append(prompt.Turn("assistant", said[n - 1]))
                turns.append(prompt.Turn("user", told + part))
                told = ""
    text = prompt.preamble(tools.specs, prompt.SYSTEM_ALL) + prompt.suffix(turns)
    rules = grammar.build(tools.specs, answer=False, several=SEVERAL)
    return Generate("", text, rules, max_tokens=MAX_TOKENS, adapter=adapter)


def evaluate(
    model: LanguageModel,
    cases: Sequence[Case],
    check: Check,
    kept: Kept,
    adapter: str = "",
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Decide and judge every case; those with the same tools follow each other, so the engine reads them once.

    `text` of a result is what the model said.
    """
    known = [(case, convert(case.functions)) for case in cases]
    for case, tools in sorted(known, key=lambda pair: prompt.preamble(pair[1].specs, prompt.SYSTEM_ALL)):
        pieces = list[Piece]()
        for _ in parts(case.messages[-1][1]):
            pieces.append(kept.decide(model, request(case, tools, adapter, [piece.text for piece in pieces])))
        text = "\n".join(piece.text for piece in pieces if piece.text != NONE) or NONE
        refused = any(piece.finish == "refused" for piece in pieces)
        failure = "too long" if refused else judge(case, tools, text, check)
        confidence = math.prod(piece.probability for piece in pieces)
        ms, tokens = sum(piece.total_s for piece in pieces) * 1e3, sum(piece.output_tokens for piece in pieces)
        yield Result(case.id, case.category, failure, ms, confidence, tokens, len(tools.loose), text)
        progress()


def judge(case: Case, tools: Tools, text: str, check: Check) -> str:
    """The kind of failure, empty when BFCL's checker finds the calls right."""
    try:
        calls = understood(text, tools.specs, [said for role, said in case.messages if role != "assistant"])
    except CallError:
        return "unparsable"
    if bool(calls) != case.wants_call:
        return "call for none" if calls else "none for a call"
    kind = check(case, tools.back(calls))
    if not kind:
        return ""
    head, _, tail = kind.partition(":")
    if tail == "wrong_count":
        return "missing call" if len(calls) < len(case.answers or ()) else "extra call"
    return KINDS.get(tail) or KINDS.get(head) or "wrong call"


def understood(text: str, specs: Sequence[ToolSpec], read: Sequence[str]) -> list[Call]:
    """The calls in what a model said, as the agent takes them. Raises CallError."""
    return [validate(call, specs) for call in meant.plain(parse_all(text), specs, read) if isinstance(call, Call)]


def rows(results: Sequence[Result], part: str) -> Iterator[dict[str, Any]]:
    """A row a category, then latency, calibration and the confusion of failures."""
    for category, peer_value in PUBLISHED.items():
        of = [result for result in results if result.category == category]
        if of:
            right = sum(not result.failure for result in of)
            yield figures.share_row(category, right, len(of), PEER, peer_value) | {"split": part}
    for row in _details(results):
        yield {"peer": None, "peer_value": None, "ratio": None} | row | {"split": part}


def _details(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    n = len(results)
    timed = [result.ms for result in results if result.ms]
    yield {"name": "latency p50", "value": _rounded(figures.median(timed), 1), "unit": "ms", "n": len(timed)}
    table = figures.reliability([(r.confidence, not r.failure) for r in results if r.tokens])
    gap = figures.calibration_error(table)
    yield {"name": "calibration error", "value": _rounded(gap, 4), "unit": "", "n": sum(row.n for row in table)}
    for row in table:
        of: dict[str, Any] = {"name": f"right at confidence {row.low:.1f} to {row.high:.1f}", "unit": "%", "n": row.n}
        of |= {"value": round(100 * row.right, 1), "peer": "confidence", "peer_value": round(100 * row.confidence, 1)}
        yield of
    confusion = Counter((result.failure, result.category) for result in results if result.failure)
    for failure, count in Counter(result.failure for result in results if result.failure).most_common():
        where = {category: confusion[failure, category] for category in PUBLISHED if confusion[failure, category]}
        yield {"name": f"failure: {failure}", "value": count, "unit": "cases", "n": n, "where": where}
    loose = sum(1 for result in results if result.loose)
    yield {"name": "schemas not wholly expressed", "value": loose, "unit": "cases", "n": n}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def wrong(results: Iterable[Result], cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """What went wrong on development cases, to be read. Raises Refused for any other case."""
    from models.toolcaller.evaluate.bfcl import split

    by_id = {case.id: case for case in cases}
    for result in results:
        if split(result.id) != "dev":
            raise Refused("test cases are never shown", "use --split dev")
        if result.failure:
            case = by_id[result.id]
            row = {"id": case.id, "failure": result.failure, "said": result.text, "answers": case.answers}
            yield row | {"messages": case.messages, "functions": case.functions}
