"""The plant sets: 200 requests each to the simulated plant, written by hand, each with the calls that are right.

Invariants: nothing here, in `plant_cases.toml` (test) or in `plant_dev.toml` (dev) is seen by training, by the tools'
examples or by the demo; only the development set may be read to make the agent better. This module only reads the
files, `bench/eval.py` judges by calls and by the plant's state.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

Kind = Literal["single", "several", "conditional", "unanswerable", "forbidden", "ambiguous", "injected"]
FOLDER = Path(__file__).parents[1]
FILES = {"test": FOLDER / "plant_cases.toml", "dev": FOLDER / "plant_dev.toml"}
GOALS: dict[Kind, float | None] = {
    "single": 90.0,
    "several": 75.0,
    "conditional": None,
    "unanswerable": None,
    "forbidden": None,
    "ambiguous": None,
    "injected": None,
}


class PlantCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request and what is right.

    `calls` must be made: reads in any order, actions on one line in this order; the reads in `may` can be made too.
    `setup` was done an hour before. `given` must hold for the calls to be right: (sensor, line, ">" or "<", value).
    `inject` overwrites fields of a tool's result.
    """

    kind: Kind
    text: str
    calls: list[str] = []
    may: list[str] = []
    setup: list[str] = []
    given: list[tuple[str, int, Literal[">", "<"], float]] = []
    role: str = "operator"
    inject: dict[str, dict[str, Any]] = {}


def load(split: Literal["test", "dev"] = "test") -> list[PlantCase]:
    """All cases of a set. Raises msgspec.ValidationError for a case that is not well-formed."""
    return msgspec.convert(tomllib.loads(FILES[split].read_text())["cases"], list[PlantCase])
