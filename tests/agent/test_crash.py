"""kill -9 between an effect and its result: an idempotent call is made again, any other never."""

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
