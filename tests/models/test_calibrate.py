"""What makes a model's probability honest on a device is fitted on development cases, and travels with the adapter."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from edge_agent.agent.confidence import Calibration
from edge_agent.engines.base import Piece
from edge_agent.errors import Refused
from models.adapter import describe, shipped
from models.toolcaller.evaluate.bfcl import split
from models.toolcaller.evaluate.calibrate import calibration, keep
from models.toolcaller.evaluate.run import Result


def results(n: int, part: str, bend: float = 0.5) -> list[Result]:
    """Decisions of a model that says p and is right in p ** bend of the cases."""
    chance, made, i = random.Random(3), list[Result](), 0
    while len(made) < n:
        i += 1
        if split(id := f"simple_{i}") != part:
            continue
        p = chance.uniform(0.05, 0.999)
        made.append(Result(id, "simple_python", "" if chance.random() < p**bend else "wrong value", 1.0, p, 9))
    return made


def test_an_overcautious_model_becomes_honest_by_cases_that_the_fit_has_not_seen() -> None:
    found = calibration(results(600, "dev"))
    assert found["n"] == sum(row[1] for row in found["bins"]) == 600
    assert found["ece"] < 0.06 < 0.1 < found["ece_raw"]
    device = Calibration(found["a"], found["b"])
    for p in (0.1, 0.4, 0.8):
        sure = device.probability(Piece("x", mean_logprob=math.log(p) / 3, choices=3))
        assert sure == pytest.approx(p**0.5, abs=0.1)


def test_test_cases_and_too_few_cases_are_refused() -> None:
    with pytest.raises(Refused, match="development cases alone"):
        calibration(results(60, "test"))
    with pytest.raises(Refused, match="49 decisions do not calibrate"):
        calibration(results(49, "dev"))


def test_the_field_is_kept_in_the_adapters_folder_and_the_shipped_one_has_it(tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_text('{"format": 1, "base": "b", "scale": 2.0}')
    (tmp_path / "adapter.npz").touch()
    keep(tmp_path, found := calibration(results(60, "dev")))
    assert describe(tmp_path).calibration == found
    assert json.loads((tmp_path / "adapter.json").read_text())["scale"] == 2.0
    ships = describe(shipped()["toolcaller"]).calibration
    assert ships["ece"] < ships["ece_raw"]
    assert ships["n"] >= 100
