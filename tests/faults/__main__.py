"""`python -m tests.faults [--docs FILE] [pytest arguments]`: run the fault matrix, print fault, expectation, seen.

A row is a test of this folder with the marker `fault(fault, expected, how)`, or one that rows.toml names elsewhere.
"""

import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent


class Row(NamedTuple):
    fault: str
    expected: str
    test: str
    how: str = "real"


ELSEWHERE = [Row(**row) for row in tomllib.loads((HERE / "rows.toml").read_text())["row"]]

HEAD = """# Reliability

What is promised: no record is lost outside a declared quota or TTL, none counts twice, nothing untrusted is let in, and
what was committed is right after any fault. `make faults` runs this table and writes it here; each row is a test, most
against real processes, SQLite and Mosquitto. *How* says how the fault is made: packets are lost
and delayed by `tc netem` where it works, else in a process that carries them from a TUN interface to the kernel's own
TCP, and the row says which; connections are cut
and stalled by a user-space link; small disks are loop-mounted ext4 images, and power fails by ext4's own shutdown
without a flush of its journal.

"""


class Watch:
    """Runs the rows' tests alone, and keeps what became of each."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.seen: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = {
            name(item.nodeid): Row(mark.args[0], mark.args[1], name(item.nodeid), *mark.args[2:])
            for item in items
            if (mark := item.get_closest_marker("fault"))
        }
        self.rows = [*marked.values(), *ELSEWHERE]
        wanted = {row.test for row in self.rows}
        items[:] = [item for item in items if name(item.nodeid) in wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = name(report.nodeid)
        if report.failed:
            self.seen[test] = f"FAILED in {report.when}"
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.seen.setdefault(test, f"not run: {str(reason).removeprefix('Skipped: ')}")
        elif report.when == "call" and "FAILED" not in self.seen.get(test, ""):
            self.seen[test] = str(dict(report.user_properties).get("seen", "as expected"))


def name(nodeid: str) -> str:
    return nodeid.split("[")[0]


def main(arguments: list[str]) -> int:
    docs = Path(arguments.pop(arguments.index("--docs") + 1)) if "--docs" in arguments else None
    arguments = [each for each in arguments if each != "--docs"]
    files = dict.fromkeys(["tests/faults", *(row.test.split("::")[0] for row in ELSEWHERE)])
    watch, began = Watch(), time.monotonic()
    status = int(pytest.main(["-q", "-m", "", *files, *arguments], plugins=[watch]))
    took = time.monotonic() - began
    lines = [(row, watch.seen.get(row.test, "not run")) for row in watch.rows]
    width = max((len(row.fault) for row in watch.rows), default=0)
    for row, seen in lines:
        print(f"{row.fault:{width}}  {row.expected}  ({row.how})\n{'':{width}}  → {seen}")
    failed = [row for row, seen in lines if seen.startswith(("FAILED", "not run"))]
    verdict = f"{len(lines) - len(failed)} of {len(lines)} rows as expected, in {took / 60:.1f} minutes"
    print(verdict)
    if docs is not None:
        cells = [("fault", "expected", "how", "seen", "test"), ("---",) * 5]
        cells += [(row.fault, row.expected, row.how, seen, f"`{row.test.split('::')[1]}`") for row, seen in lines]
        table = "".join(f"| {' | '.join(c.replace('|', '·') for c in row)} |\n" for row in cells)
        docs.write_text(f"{HEAD}{verdict} ({_where()}).\n\n{table}")
    return status or bool(failed)


def _where() -> str:
    said = subprocess.run(["git", "log", "-1", "--format=%h"], capture_output=True, text=True, check=False)
    return f"{time.strftime('%Y-%m-%d')}, after commit {said.stdout.strip() or 'unknown'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
