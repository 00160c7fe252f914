"""BFCL v4's single-turn cases and its own checker, out of the pinned wheel of `bfcl-eval`.

Invariants: the package is data and is never installed (it would bring thirty others): its wheel is pinned by SHA-256
and the AST checker is imported from inside it, unchanged; only its table of hosted models is replaced, by one entry
that turns no dots into underscores. A hash of the case id splits the cases: `dev` may be read, `test` never is: no
text of a test case is shown or written by anything here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import msgspec

from edge_agent.wire.bundle import sha256_file
from models.errors import ModelError
from models.fetch import Progress, Source, download, quiet

WHEEL = Source(
    "data", "bfcl-eval", "2026.3.23", "bfcl_eval-2026.3.23-py3-none-any.whl", "Apache-2.0", "ShishirPatil/gorilla", []
)
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
PEER = "FunctionGemma-270M"
PUBLISHED: dict[str, float | None] = {
    "simple_python": 61.6,
    "multiple": 63.5,
    "parallel": 39.0,
    "parallel_multiple": 29.5,
    "live_simple": 36.2,
    "live_multiple": 25.7,
    "live_parallel": 22.9,
    "live_parallel_multiple": 20.8,
    "live_relevance": 61.1,
    "irrelevance": 73.7,
    "live_irrelevance": None,
}
"""The categories, with what the peer's card publishes zero-shot, in percent."""
_MODEL = "outrider"

Split = Literal["dev", "test"]
Check = Callable[["Case", list[dict[str, Any]]], str]
"""(case, calls in BFCL's form) → the kind of error that BFCL's checker names, or "" when the calls are right."""


class Case(msgspec.Struct, frozen=True):
    """One case; `answers` is None where only calling or not calling counts."""

    id: str
    category: str
    messages: list[tuple[str, str]]
    functions: list[dict[str, Any]]
    answers: list[dict[str, Any]] | None

    @property
    def wants_call(self) -> bool:
        return not self.category.endswith("irrelevance")


def split(id: str) -> Split:
    """Which split a case belongs to: 20 % dev, 80 % test."""
    return "test" if _hash(id) % 5 else "dev"


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big")


def fetch_wheel(folder: Path, progress: Progress = quiet) -> Path:
    """The pinned wheel in the cache `folder`. Raises ModelError."""
    wheel = download(WHEEL, folder / "wheels", progress)
    if sha256_file(wheel) != SHA256:
        wheel.unlink()
        raise ModelError(f"{WHEEL.wheel} is not the pinned file", "the bad wheel was deleted: run it again")
    return wheel


def cases(wheel: Path, category: str, part: Split, limit: int = 0) -> list[Case]:
    """The cases of a category in a split, in the order of their hashes, so that the first `limit` are a fair sample."""
    if category not in PUBLISHED:
        raise ModelError(f"{category} is no single-turn category", f"known: {', '.join(PUBLISHED)}")
    with zipfile.ZipFile(wheel) as archive:
        asked = _lines(archive, f"BFCL_v4_{category}.json")
        answers = {} if "relevance" in category else _lines(archive, f"possible_answer/BFCL_v4_{category}.json")
    found = [
        Case(
            id,
            category,
            [(message["role"], message["content"]) for message in entry["question"][0]],
            entry["function"],
            answers[id]["ground_truth"] if answers else None,
        )
        for id, entry in asked.items()
        if split(id) == part
    ]
    return sorted(found, key=lambda case: _hash(case.id))[: limit or None]


def _lines(archive: zipfile.ZipFile, name: str) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, archive.read(f"bfcl_eval/data/{name}").splitlines())
    return {row["id"]: row for row in rows}


@cache
def checker(wheel: Path) -> Check:
    """BFCL's AST checker, and its rule of relevance where a case has no answers."""
    table = ModuleType("bfcl_eval.constants.model_config")
    table.__dict__["MODEL_CONFIG_MAPPING"] = {_MODEL: SimpleNamespace(underscore_to_dot=False)}
    sys.modules[table.__name__] = table
    sys.path.insert(0, str(wheel))
    try:
        theirs = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
    finally:
        sys.path.remove(str(wheel))

    def check(case: Case, calls: list[dict[str, Any]]) -> str:
        if case.answers is None:
            return "" if bool(calls) == case.wants_call else "relevance"
        try:
            found = theirs.ast_checker(case.functions, calls, case.answers, python, case.category, _MODEL)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # values it does not expect
            return "checker:crashed"
        return "" if found["valid"] else _kind(found)

    return check


def _kind(found: dict[str, Any]) -> str:
    """The error type; of calls in any order, that of the call that came nearest."""
    tried: Sequence[Any] = [error for error in found["error"] if isinstance(error, dict)]
    kinds = [str(next(iter(error.values()))["sub_error_type"]) for error in tried] or [str(found["error_type"])]
    return next((kind for kind in kinds if not kind.endswith("wrong_func_name")), kinds[0])
