"""Every row of the fault matrix names a test that is there."""

import ast
import gc
from pathlib import Path

from tests.faults.__main__ import ELSEWHERE

ROOT = Path(__file__).parents[2]


def statements(file: Path) -> list[ast.stmt]:
    """No collection within: a finalizer that has source parsed too is an error of CPython 3.11 (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(file.read_text()).body
    finally:
        gc.enable()


def test_every_row_has_its_test() -> None:
    missing = []
    for row in ELSEWHERE:
        file, name = row.test.split("::")
        body = statements(ROOT / file)
        if name not in {each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}:
            missing.append(row.test)
    assert not missing
    assert len({row.fault for row in ELSEWHERE}) == len(ELSEWHERE) >= 30


def test_every_test_of_faults_is_a_row() -> None:
    plain = []
    for file in Path(__file__).parent.glob("test_*.py"):
        for each in statements(file):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in each.decorator_list]
                if file != Path(__file__) and not any(mark.startswith("pytest.mark.fault(") for mark in marks):
                    plain.append(f"{file.name}::{each.name}")
    assert not plain
