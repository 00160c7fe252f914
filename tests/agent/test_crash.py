"""kill -9 between an effect and its result: an idempotent call is made again, any other never."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, tool: str) -> int:
    argv = [sys.executable, "-m", "tests.agent.victim", str(folder), tool]
    return subprocess.run(argv, cwd=Path(__file__).parents[2], timeout=60, check=False).returncode


@pytest.mark.parametrize(
    ("tool", "effects", "state", "error"),
    [("read_sensor", 2, "succeeded", ""), ("stamp", 1, "failed", 'interrupted: effect unknown of stamp(text="x")')],
)
def test_kill_9_after_the_effect(tmp_path: Path, tool: str, effects: int, state: str, error: str) -> None:
    assert run(tmp_path, tool) == -9
    assert not (tmp_path / "end").exists()
    (tmp_path / "spare").touch()
    assert run(tmp_path, tool) == 0
    assert (tmp_path / "effects").read_text().split() == [tool] * effects
    ended, reason, runs = (tmp_path / "end").read_text().split("\n")
    assert (ended, runs) == (state, "2")
    assert reason.startswith(error)


@pytest.mark.parametrize(
    ("kind", "points"),
    [("workflow", 38), ("parallel", 38), ("task", 60), ("danger", 42), ("denied", 26), ("plan", 44), ("asks", 36)],
)
def test_kill_9_at_every_point_of_six_steps_leaves_each_effect_exactly_once(
    tmp_path: Path, kind: str, points: int
) -> None:
    argv = [sys.executable, "-m", "tests.agent.kill_points", str(tmp_path), kind]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], timeout=170, check=True, capture_output=True)
    found = json.loads(done.stdout)
    assert [run["killed"] for run in found] == [-9] * points
    assert all(run["end"] == "succeeded" for run in found), found
    made = ["1", "2", "3"] if kind in ("danger", "asks", "denied") else ["1", "2", "3", "4", "5", "6"]
    for run in found if kind == "parallel" else []:
        run["effects"].sort()
    assert all(run["effects"] == made for run in found), found
    assert sum(run["calls"] > len(made) for run in found) >= 2 * len(made), (
        "no call was made again: the key was not put to the test"
    )
