"""What is kept is found again with its source, and what is forgotten is gone, by age, by quota and by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.agent.memory import DAY_S, Memory, Vectors, pieces
from edge_agent.errors import Refused

MANUAL = """# Conveyor

Keep hands clear.

## Belt tension

Tighten the belt until it gives way by ten millimetres.

## Bearings

Grease the bearings with lithium grease every 2000 hours. Do not use oil.
"""


def meaning(texts: Sequence[str]) -> Vectors:
    """A stand-in: the direction of a text is the share of each letter in it."""
    rows = np.array([[text.lower().count(chr(97 + n % 26)) + n % 7 / 10 for n in range(128)] for text in texts])
    rows = rows - rows.mean(axis=1, keepdims=True)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "m.db")


def test_a_question_finds_the_piece_with_its_source_and_its_headings(memory: Memory) -> None:
    memory.add("conveyor.md", MANUAL)
    memory.add("pump.md", "# Pump\n\nThe pump is primed with water.")
    found = memory.search("how often must bearings be greased?")
    assert (found[0].source, found[0].title) == ("conveyor.md", "Conveyor / Bearings")
    assert "lithium" in found[0].text
    assert memory.search("tightening belts")[0].title == "Conveyor / Belt tension"
    assert memory.search("zebra") == []
    assert memory.search('" OR (') == []


def test_meaning_finds_what_words_do_not_and_both_are_fused(memory: Memory) -> None:
    memory.add("a", "zzzz zzz zz")
    memory.add("b", "bearing noise")
    assert memory.embed(meaning) == 0
    assert memory.search("zzzzz", meaning(["zzzzz"])[0])[0].source == "a"
    both = memory.search("noise", meaning(["bearing noise"])[0])
    assert (both[0].source, both[0].score) == ("b", pytest.approx(2 / 61, abs=1e-5))


def test_the_nearest_by_signs_and_int8_are_the_nearest(memory: Memory) -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((600, 384)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    memory.add("many", "\n\n".join(f"# n{n}\n\nword{n}" for n in range(600)))
    at = iter(range(600))
    memory.embed(lambda texts: rows[[next(at) for _ in texts]])
    hits = 0
    for n in range(0, 600, 20):
        asked = rows[n] + 0.6 * rng.standard_normal(384).astype(np.float32) / 384**0.5
        exact = int(np.argmax(rows @ asked))
        hits += memory.search("", asked.astype(np.float32), 1)[0].title == f"n{exact}"
    assert hits == 30


def test_a_document_replaces_the_one_of_its_name_and_forget_takes_it_out(memory: Memory) -> None:
    memory.add("a", "apples are green")
    memory.add("a", "pears are yellow")
    memory.embed(meaning)
    assert memory.search("apples") == []
    assert memory.search("pears", meaning(["pears"])[0])[0].text == "pears are yellow"
    assert memory.forget("a")
    assert not memory.forget("a")
    assert memory.search("pears", meaning(["pears"])[0]) == []


def test_what_is_too_old_goes_and_past_the_quota_the_longest_unused(tmp_path: Path) -> None:
    now = [0.0]
    clocks = {"clock": lambda: now[0], "steady": lambda: now[0]}
    memory = Memory(tmp_path / "m.db", quota=1000, age_s=100_000.0, **clocks)
    for name in "abc":
        memory.add(name, f"{name}word " * 50)
        now[0] += 1
    now[0] = 8000.0
    assert memory.search("aword")[0].source == "a"
    memory.add("d", "dword " * 50)
    assert sorted(source.name for source in memory.sources()) == ["a", "c", "d"]
    now[0] = 100_500.0
    assert memory.search("aword") == []
    assert [source.name for source in memory.sources()] == ["d"]
    for text in ("", " ", "x" * 2000):
        with pytest.raises(Refused):
            memory.add("e", text)


def test_a_clock_that_jumps_ahead_takes_no_document_until_it_has_stood_there_for_a_day(tmp_path: Path) -> None:
    now, steady = [1e9], [0.0]

    def start() -> Memory:
        return Memory(tmp_path / "m.db", age_s=30 * DAY_S, clock=lambda: now[0], steady=lambda: steady[0])

    def stays(memory: Memory) -> bool:
        return bool(memory.search("bearing"))

    def on(days: float) -> None:
        now[0], steady[0] = now[0] + days * DAY_S, steady[0] + days * DAY_S

    memory = start()
    memory.add("a", "bearing")
    on(2)
    assert stays(memory)
    memory.close()
    now[0], steady[0] = now[0] + 5000 * DAY_S, 5.0  # it starts with no battery for its clock
    memory = start()
    memory.add("b", "seal")
    on(0.5)
    assert stays(memory)
    now[0] -= 5000 * DAY_S  # the time comes from the network
    assert stays(memory)
    on(27)
    assert stays(memory)
    on(2)
    assert not stays(memory), "so old it was by a clock that ran on"
    memory.add("a", "bearing")
    now[0] += 40 * DAY_S
    assert stays(memory)
    on(1)
    assert not stays(memory)


def test_another_process_adds_and_this_one_finds_it(tmp_path: Path) -> None:
    here, there = Memory(tmp_path / "m.db"), Memory(tmp_path / "m.db")
    assert here.search("bearing", meaning(["bearing"])[0]) == []
    there.add("a", "bearing")
    there.embed(meaning)
    assert here.search("", meaning(["bearing"])[0])[0].source == "a"


def test_a_file_that_is_no_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.db").write_text("not a database, but long enough to look at" * 50)
    with pytest.raises(Refused, match="is no memory"):
        Memory(tmp_path / "m.db")


@given(st.text(alphabet="ab .\n#=-", max_size=400), st.integers(20, 60))
@example("=================== =", 20)
def test_pieces_are_bounded_and_lose_no_letter(text: str, size: int) -> None:
    cut = pieces(text, size)
    assert all(len(piece.text) <= size for piece in cut)
    kept = "".join(piece.text + piece.title for piece in cut)
    assert all(piece.text for piece in cut)
    if "#" not in text and "=" not in text and "-" not in text:
        assert sorted(kept.replace(" ", "").replace("\n", "")) == sorted(text.replace(" ", "").replace("\n", ""))
