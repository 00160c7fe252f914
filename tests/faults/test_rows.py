"""Every row of the fault matrix names a test that is there."""

import ast
from pathlib import Path

from tests.faults.__main__ import ROWS

ROOT = Path(__file__).parents[2]


def test_every_row_has_its_test() -> None:
    missing = []
    for row in ROWS:
        file, name = row.test.split("::")
        body = ast.parse((ROOT / file).read_text()).body
        if name not in {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}:
            missing.append(row.test)
    assert not missing
    assert len({row.fault for row in ROWS}) == len(ROWS) > 40
