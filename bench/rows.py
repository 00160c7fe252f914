"""The rows of a benchmark: one JSON object a line, or a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

FIELDS = ("name", "value", "unit", "peer", "peer_value", "ratio", "n")


def show(rows: Iterable[dict[str, Any]], as_json: bool) -> list[dict[str, Any]]:
    """Print each row as it comes (JSON) or all of them as a table; returns them."""
    seen: list[dict[str, Any]] = []
    for row in rows:
        seen.append(row)
        if as_json:
            print(json.dumps(row), flush=True)
    if not as_json:
        fields = FIELDS + ("goal",) * any("goal" in row for row in seen)
        table = Table(*fields)
        for row in seen:
            table.add_row(*(_cell(row.get(field)) for field in fields))
        Console().print(table)
    return seen


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
