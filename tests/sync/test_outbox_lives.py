"""Through many lives, SIGKILL and a full disk: a seq is delivered or told lost, never silently gone."""

import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.errors import Retry
from edge_agent.store import Store
from edge_agent.sync.outbox import Limits, Outbox
from tests.sync.reading import everything


class OutboxMachine(RuleBasedStateMachine):
    """Appends, acks, batches, restarts and time: every seq is delivered or told lost, never silently gone."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.now = 1000.0
        self.sent: dict[int, bytes] = {}  # what a batch once said of a seq
        self.delivered: set[int] = set()
        self.lost = 0
        self.restarted = False
        self.appended = 0
        self._open()

    def _open(self) -> None:
        self.store = Store(self.folder / "s.db")
        limits = Limits(rows=40, bytes=8000)
        clocks = (lambda: self.now, lambda: self.now)
        self.outbox = self.loop.run_until_complete(Outbox.open(self.store, limits, *clocks))

    def _said(self) -> tuple[int, ...]:
        box = self.outbox
        return box.epoch, box.last_seq, box.acked, box.depth, box.size

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(
        sizes=st.lists(st.integers(0, 300), max_size=20), priority=st.integers(0, 9), ttl=st.none() | st.integers(1, 50)
    )
    def append(self, sizes: list[int], priority: int, ttl: int | None) -> None:
        before = self.outbox.last_seq
        seqs = self.run(self.outbox.append_many("telemetry", [{"x": "y" * n} for n in sizes], priority, ttl))
        assert len(seqs) == len(sizes)
        assert not sizes or seqs[0] == before + 1
        self.appended += len(sizes)

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def send(self) -> None:
        after = self.outbox.acked
        while part := self.run(self.outbox.batch(after)):
            for line in part.lines:
                seq = json.loads(line)["seq"]
                assert part.first <= seq <= part.last
                assert self.sent.setdefault(seq, line) == line, "a seq names one content for ever"
            after = part.last

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.sent)))
        if seq > self.outbox.acked:
            for each, line in self.sent.items():
                if self.outbox.acked < each <= seq and each not in self.delivered:
                    self.delivered.add(each)
                    record = json.loads(line)
                    self.lost += record["body"]["count"] if record["kind"] == "loss" else 0
        self.run(self.outbox.ack(seq))

    @rule()
    def restart(self) -> None:
        before = self._said()
        self.store.close()
        self._open()
        assert self._said() == before

    @invariant()
    def disk_is_bounded_and_counted(self) -> None:
        count, size, kept, kept_size = self.run(self.store.read(_measure))
        assert (count, size) == (self.outbox.depth, self.outbox.size)
        assert count - kept <= 40
        assert size - kept_size <= 8000

    def teardown(self) -> None:
        self.run(self.outbox.expire())
        told = self.lost
        waiting: set[int] = set()
        blocks = self.run(self.store.read(lambda db: db.execute("SELECT first, last, lines FROM outbox").fetchall()))
        for first, last, lines in blocks:
            assert [json.loads(line)["seq"] for line in lines.splitlines()] == list(range(first, last + 1))
        for record in (json.loads(line) for _, _, lines in blocks for line in lines.splitlines()):
            waiting.add(record["seq"])
            told += record["body"]["count"] if record["kind"] == "loss" else 0
        gone = set(range(1, self.outbox.last_seq + 1)) - waiting - self.delivered
        assert len(gone) <= told, "a record went and nobody said so"
        self.store.close()
        self.loop.close()


def _measure(db: Any) -> tuple[int, int, int, int]:
    sums = "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(lines)), 0) FROM outbox"
    (whole,), (kept,) = db.execute(sums).fetchall(), db.execute(f"{sums} WHERE priority < 0").fetchall()
    return (*whole, *kept)


TestOutboxMachine = OutboxMachine.TestCase
TestOutboxMachine.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)

APPENDER = """
import asyncio, sys
from pathlib import Path
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox

async def main():
    outbox = await Outbox.open(Store(Path(sys.argv[1])))
    async def one(lane):
        n = 0
        while True:
            seq = await outbox.append("telemetry", {"lane": lane, "n": n})
            print(seq, lane, n, flush=True)
            n += 1
    await asyncio.gather(*(one(lane) for lane in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 50, 700])
async def test_every_seq_that_append_returned_survives_kill_9(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "s.db"
    ledger: dict[int, tuple[int, int]] = {}
    for _ in range(2):  # the second life begins on what the first left
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", APPENDER, str(path), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        for _ in range(lines):
            seq, lane, n = map(int, (await child.stdout.readline()).split())
            ledger[seq] = (lane, n)
        child.send_signal(signal.SIGKILL)
        rest = (await child.stdout.read()).decode().splitlines(keepends=True)
        ledger |= {int(s): (int(a), int(b)) for s, a, b in (line.split() for line in rest if line.endswith("\n"))}
        await child.wait()
    store = Store(path)
    outbox = await Outbox.open(store)
    kept = {r.seq: (r.body["lane"], r.body["n"]) for r in await everything(outbox)}
    assert {seq: kept.get(seq) for seq in ledger} == ledger
    assert sorted(kept) == list(range(1, outbox.last_seq + 1))
    store.close()


def make_room(disk: Path) -> None:
    (disk / "filler").unlink()


async def test_a_full_disk_is_a_retry_that_loses_nothing(small_disk: Path) -> None:
    store = Store(small_disk / "s.db")
    outbox = await Outbox.open(store)
    stored: list[int] = []

    async def fill() -> None:
        while True:
            stored.extend(await outbox.append_many("telemetry", [{"x": "y" * 1000} for _ in range(10)]))

    with pytest.raises(Retry, match="free some space"):
        await fill()
    assert [r.seq for r in await everything(outbox)] == stored
    assert outbox.last_seq == stored[-1]
    make_room(small_disk)
    await outbox.ack(stored[-1])
    assert await outbox.append("telemetry", {}) == stored[-1] + 1
    store.close()
