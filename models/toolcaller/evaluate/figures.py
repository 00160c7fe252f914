"""The figures of a report: shares with their uncertainty, and whether a confidence means what it says.

Invariant: pure functions of counts and pairs; an empty sample has no share and says so with None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

Z95 = 1.959964


class Bin(msgspec.Struct, frozen=True):
    """Decisions of like confidence: how sure they were and how often right, both from 0 to 1."""

    low: float
    high: float
    n: int
    confidence: float
    right: float


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share, from 0 to 1 (Wilson 1927); (0, 1) for an empty sample."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def reliability(pairs: Sequence[tuple[float, bool]], bins: int = 10) -> list[Bin]:
    """(confidence, right) pairs in bins of equal width; empty bins are left out."""
    filled: dict[int, list[tuple[float, bool]]] = {}
    for confidence, right in pairs:
        filled.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, right))
    return [
        Bin(i / bins, (i + 1) / bins, len(of), sum(c for c, _ in of) / len(of), sum(r for _, r in of) / len(of))
        for i, of in sorted(filled.items())
    ]


def calibration_error(table: Sequence[Bin]) -> float | None:
    """Expected calibration error, from 0 to 1 (Naeini 2015): the mean gap of confidence and share right."""
    n = sum(row.n for row in table)
    return sum(row.n * abs(row.confidence - row.right) for row in table) / n if n else None


def median(values: Sequence[float]) -> float | None:
    """The value that half of the sample does not exceed."""
    return sorted(values)[(len(values) - 1) // 2] if values else None


def share_row(name: str, right: int, n: int, peer: str = "", peer_value: float | None = None) -> dict[str, object]:
    """A row of a share in percent with its 95 % interval; `ratio` is against the peer's."""
    low, high = wilson(right, n)
    value = round(100 * right / n, 1) if n else None
    ratio = round(value / peer_value, 3) if value is not None and peer_value else None
    row: dict[str, object] = {
        "name": name,
        "value": value,
        "unit": "%",
        "peer": peer or None,
        "peer_value": peer_value,
        "ratio": ratio,
    }
    return row | {"n": n, "low": round(100 * low, 1), "high": round(100 * high, 1)}
