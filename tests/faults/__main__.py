"""`python -m tests.faults [--docs FILE] [pytest arguments]`: run the fault matrix, print fault, expectation, seen."""

import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    fault: str
    expected: str
    test: str


ROWS = [Row(**row) for row in tomllib.loads(Path(__file__).with_name("rows.toml").read_text())["row"]]

HEAD = """# Reliability

What is promised: no record is lost outside a declared quota or TTL, none counts twice, nothing untrusted is let in, and
what was committed is right after any fault. `make faults` runs this table against real processes, SQLite and Mosquitto,
and writes it here; each row is a test. The network faults are made by a user-space TCP link, as `tc netem` is refused
in many containers: delay, stalls, cuts, and loss of whole connections.

| fault | expected | seen | test |
|---|---|---|---|
"""


class Watch:
    """Runs the rows' tests alone, and keeps what became of each."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = {row.test for row in ROWS}
        items[:] = [item for item in items if item.nodeid.split("[")[0] in wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("[")[0]
        if report.failed:
            self.seen[name] = f"FAILED in {report.when}"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.seen.setdefault(name, f"not run: {str(reason).removeprefix('Skipped: ')}")
        elif report.when == "call" and "FAILED" not in self.seen.get(name, ""):
            self.seen[name] = str(dict(report.user_properties).get("seen", "as expected"))


def main(arguments: list[str]) -> int:
    docs = Path(arguments.pop(arguments.index("--docs") + 1)) if "--docs" in arguments else None
    arguments = [each for each in arguments if each != "--docs"]
    watch, files = Watch(), dict.fromkeys(row.test.split("::")[0] for row in ROWS)
    status = int(pytest.main(["-q", "-m", "", *files, *arguments], plugins=[watch]))
    lines = [(row, watch.seen.get(row.test, "not run")) for row in ROWS]
    width = max(len(row.fault) for row in ROWS)
    for row, seen in lines:
        print(f"{row.fault:{width}}  {row.expected}\n{'':{width}}  → {seen}")
    failed = [row for row, seen in lines if seen.startswith(("FAILED", "not run"))]
    print(f"{len(lines) - len(failed)} of {len(lines)} rows as expected")
    if docs is not None:
        cells = [(row.fault, row.expected, seen, f"`{row.test.split('::')[1]}`") for row, seen in lines]
        docs.write_text(HEAD + "".join(f"| {' | '.join(c.replace('|', '·') for c in row)} |\n" for row in cells))
    return status or bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
