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
    table = Table(*FIELDS)
    for row in rows:
        seen.append(row)
        if as_json:
            print(json.dumps(row), flush=True)
        else:
            table.add_row(*(_cell(row.get(field)) for field in FIELDS))
    if not as_json:
        Console().print(table)
    return seen


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)
