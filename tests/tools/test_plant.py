"""The plant as a function, and its journal on a real disk."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.sim.journal import MAX_ACTIONS, Journal, JournalError
from tools.sim.plant import LINES, Action, advance, alarms, fold, initial, reading, state

START = 1_800_000_000.0
seeds = st.integers(0, 2**40)
verbs = st.sampled_from(["set_speed", "start", "stop"])
steps = st.lists(st.tuples(st.floats(0, 40_000), st.sampled_from(LINES), verbs, st.floats(0, 100)), max_size=12)


def timed(moves: list[tuple[float, int, str, float]]) -> list[Action]:
    """Moves with the seconds between them → actions at their instants."""
    now, actions = START, []
    for gap, line, verb, percent in moves:
        now += gap
        actions.append(Action(now, line, verb, percent))  # type: ignore[arg-type]
    return actions


@given(seeds, steps, st.floats(0, 1e7))
def test_the_same_past_gives_the_same_state_and_every_value_stays_in_bounds(seed, moves, later) -> None:  # type: ignore[no-untyped-def]
    actions = timed(moves)
    now = (actions[-1].at if actions else START) + later
    first = state(initial(seed, START), actions, now)
    assert first == state(initial(seed, START), actions, now)
    for line in first.values():
        assert line.at == pytest.approx(now, abs=1e-6)
        assert 0 <= line.speed <= 100
        assert 0 <= line.wear <= 100
        assert 21.9 <= line.temperature <= 72.1
        assert 0.3 <= line.vibration <= 10.3
        assert line.product >= 0
        assert reading(seed, line, "vibration") == reading(seed, line, "vibration") >= 0


@given(seeds, steps, st.integers(0, 12), st.floats(0, 1e6))
def test_a_folded_past_is_as_good_as_the_whole_one(seed, moves, cut, later) -> None:  # type: ignore[no-untyped-def]
    actions, lines = timed(moves), initial(seed, START)
    now = START + 500_000 + later
    assert state(fold(lines, actions[:cut]), actions[cut:], now) == state(lines, actions, now)


@given(seeds, st.floats(0, 1e5), st.floats(0, 1e5))
def test_looking_does_not_change_the_world(seed, one, two) -> None:  # type: ignore[no-untyped-def]
    line = fold(initial(seed, START), [Action(START, 1, "set_speed", 97.0)])[0]
    in_two = advance(advance(line, START + one), START + one + two)
    in_one = advance(line, START + one + two)
    for name in ("speed", "wear", "temperature", "travel"):
        assert getattr(in_two, name) == pytest.approx(getattr(in_one, name), rel=1e-9, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, steps, st.integers(0, 12), st.binary(max_size=40))
def test_a_restart_at_any_point_even_with_a_torn_line_changes_nothing(seed, moves, crash, torn) -> None:  # type: ignore[no-untyped-def]
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder), seed, START)
        for index, action in enumerate(timed(moves)):
            if index == crash:
                with (Path(folder) / "plant.jsonl").open("ab") as file:
                    file.write(torn.replace(b"\n", b""))
                journal = Journal(Path(folder), seed, START + 99)
            journal.act(action.line, action.verb, action.at, action.percent)
        now = START + 1_000_000
        assert journal.start == START
        assert Journal(Path(folder), seed, 0.0).lines(now) == state(initial(seed, START), timed(moves), now)


def test_the_journal_stays_small_and_the_world_the_same(tmp_path: Path) -> None:
    journal, actions = Journal(tmp_path, 5, START), []
    for n in range(MAX_ACTIONS + 20):
        actions.append(Action(START + n, n % 3 + 1, "set_speed", float(n % 100)))
        journal.act(actions[-1].line, "set_speed", actions[-1].at, actions[-1].percent)
    assert len((tmp_path / "plant.jsonl").read_bytes().splitlines()) < 25
    assert journal.lines(START + 5000) == state(initial(5, START), actions, START + 5000)


def test_a_clock_set_back_does_not_turn_the_plant_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 5, START)
    journal.act(1, "stop", START + 100)
    after = journal.act(2, "stop", START - 1000)
    assert after.at == START + 100
    assert not journal.lines(START)[1].running


def test_another_seed_or_a_damaged_line_is_an_error_that_says_so(tmp_path: Path) -> None:
    Journal(tmp_path, 5, START).act(1, "stop", START)
    with pytest.raises(JournalError, match="plant of seed 5, not 6"):
        Journal(tmp_path, 6, START)
    path = tmp_path / "plant.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"stop"', b'"burn"'))
    with pytest.raises(JournalError, match="is damaged"):
        Journal(tmp_path, 5, START)


def test_an_action_the_disk_refuses_did_not_happen(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 5, START)
    before = journal.lines(START + 50)
    size = (tmp_path / "plant.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            journal.act(1, "stop", START + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "plant.jsonl").stat().st_size == size
    assert journal.lines(START + 50) == before


def test_an_action_that_was_answered_survives_kill_9(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from tools.sim.journal import Journal\n"
        f"Journal(Path(sys.argv[1]), 5, {START}).act(2, 'stop', {START + 7}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    expected = state(initial(5, START), [Action(START + 7, 2, "stop")], START + 60)
    assert Journal(tmp_path, 5, START).lines(START + 60) == expected


def test_each_plant_begins_with_one_worn_line_and_alarms_follow_speed() -> None:
    for seed in range(50):
        lines = initial(seed, START)
        worn = [line for line in lines if line.wear > 70]
        assert len(worn) == 1
        number = worn[0].number
        fast = state(lines, [Action(START, number, "set_speed", 98.0)], START + 60)
        assert ("vibration", number) in {(a.sensor, a.line) for a in alarms(fast.values())}
        slow = state(lines, [Action(START, number, "set_speed", 40.0)], START + 60)
        assert "vibration" not in {a.sensor for a in alarms(slow.values())}
