"""The races of serving: their rows have the form of all benchmarks, and a swap loses nothing."""

from __future__ import annotations

import pytest

from bench import swap
from bench.rows import FIELDS


def test_requests_through_swaps_are_all_answered_by_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "REQUESTS", 200)
    monkeypatch.setattr(swap, "SWAPS", 2)
    rows = {row["name"]: row for row in swap.run()}
    assert list(rows) == ["failed", "wrong", "p99"]
    assert all(set(FIELDS) <= set(row) for row in rows.values())
    assert rows["failed"]["value"] == rows["wrong"]["value"] == 0
    assert rows["p99"]["n"] >= 200
