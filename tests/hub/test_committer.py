"""The rules by which batches become records, against redelivery, reordering, gaps, forgeries and rubbish."""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_agent.wire.batch import Header, encode_batch
from edge_agent.wire.errors import Undecodable
from edge_agent.wire.messages import JobState, Record, encode
from edge_agent.wire.signing import SigningKey
from hub.committer import MAX_DEAD_LETTERS, MAX_GAPS, Ackable, Committed, Committer, Verdict, judge, replay
from hub.db import Database, audit, dead_letters, devices, gaps, jobs, telemetry
from hub.jobs import SILENT
from tests.hub.rig import pack
from tests.hub.rig import telemetry as make


@dataclass
class Came:
    topic: str
    payload: bytes
    properties: dict[str, str]


@dataclass
class Sender:
    """An enrolled device and a committer over one database."""

    database: Database
    name: str = field(default_factory=lambda: f"d{secrets.token_hex(6)}")
    key: SigningKey = field(default_factory=SigningKey.generate)
    committer: Committer = field(default_factory=lambda: Committer("main"))

    def __post_init__(self) -> None:
        row = {"name": self.name, "public_key": self.key.public.text, "enrolled": 0.0, "desired": {}, "reported": {}}
        with self.database.engine.begin() as connection:
            connection.execute(devices.insert().values(**row))

    @property
    def topic(self) -> str:
        return f"outrider/1/main/{self.name}/up"

    def batch(self, records: list[Record], epoch: int = 1, **more: Any) -> Came:
        batch = pack(self.key, self.topic, records, epoch, **more)
        return Came(self.topic, batch.payload, dict(batch.properties))

    def commit(self, *messages: Came, condemn: str = "") -> Committed:
        with self.database.engine.begin() as connection:
            return self.committer.commit(connection, messages, condemn)

    def rows(self, query: sa.Select[Any]) -> list[Any]:
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def committed(self) -> list[tuple[int, int, str]]:
        columns = (telemetry.c.epoch, telemetry.c.seq, telemetry.c.body)
        return self.rows(sa.select(*columns).where(telemetry.c.device == self.name).order_by(telemetry.c.id))

    def device(self) -> tuple[int, int, int]:
        columns = (devices.c.epoch, devices.c.watermark, devices.c.lost)
        return self.rows(sa.select(*columns).where(devices.c.name == self.name))[0]

    def told(self, action: str) -> int:
        return len(self.rows(sa.select(audit.c.id).where(audit.c.action == action, audit.c.actor == self.name)))

    def dead(self) -> list[tuple[int, int]]:
        columns = (dead_letters.c.first, dead_letters.c.last)
        return self.rows(sa.select(*columns).where(dead_letters.c.device == self.name).order_by(dead_letters.c.id))


@pytest.fixture
def sender(database: Database) -> Sender:
    return Sender(database)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(f"sqlite:///{tmp_path_factory.mktemp('db') / 'hub.db'}")


@given(epoch=st.integers(0, 3), watermark=st.integers(0, 9), batch=st.tuples(*[st.integers(1, 12)] * 3))
def test_the_watermark_rule_never_skips_and_never_goes_back(
    epoch: int, watermark: int, batch: tuple[int, int, int]
) -> None:
    header = Header(batch[0] % 4, min(batch[1:]), max(batch[1:]))
    verdict, reached = judge(epoch, watermark, header)
    if verdict is Verdict.TAKE:
        assert header.epoch >= epoch
        assert header.first <= reached + 1 <= header.last
        assert header.epoch > epoch or reached == watermark
    if header.epoch == epoch and header.last <= watermark:
        assert verdict is Verdict.SEEN
    if header.epoch < epoch:
        assert verdict is Verdict.OLD_EPOCH


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_redelivery_and_reordering_give_every_record_once_and_in_order(shared: Database, data: st.DataObject) -> None:
    sender = Sender(shared)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    records = make(range(1, sum(sizes) + 1))
    batches, at = [], 0
    for size in sizes:
        batches.append(sender.batch(records[at : at + size]))
        at += size
    overlap = data.draw(st.integers(1, len(records)))
    batches.append(sender.batch(records[overlap - 1 :]))
    order = data.draw(st.lists(st.integers(0, len(batches) - 1), max_size=30))
    groups = data.draw(st.lists(st.integers(1, 4), min_size=len(order), max_size=len(order)))
    at = 0
    for size in groups:
        group = [batches[n] for n in order[at : at + size]]
        at += size
        if group:
            before = sender.device()[1]
            done = sender.commit(*group)
            assert done.acks[sender.name].seq == sender.device()[1] >= before
    while (watermark := sender.device()[1]) < len(records):  # what the device does: from the ack on
        sender.commit(sender.batch(records[watermark : watermark + 7]))
    assert sender.committed() == [(1, r.seq, f'{{"n":{r.seq}}}') for r in records]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 10_000), where=st.sampled_from(["payload", "epoch", "first", "last", "sig", "v", "ct"]))
def test_any_flipped_bit_moves_nothing_and_is_audited(shared: Database, bit: int, where: str) -> None:
    sender = Sender(shared)
    came = sender.batch(make(range(1, 4)))
    target = bytearray(came.payload if where == "payload" else came.properties[where].encode())
    target[bit // 8 % len(target)] ^= 1 << bit % 8
    if where == "payload":
        came.payload = bytes(target)
    else:
        came.properties[where] = target.decode("latin-1")
    done = sender.commit(came)
    assert done.acks == {}
    assert done.records == 0
    assert sender.device() == (0, 0, 0)
    assert sender.told("refuse:batch") == 1
    assert sender.commit(sender.batch(make(range(1, 4)))).records == 3


def test_a_batch_replayed_as_another_device_is_refused(sender: Sender) -> None:
    other = Sender(sender.database)
    came = sender.batch(make([1, 2]))
    came.topic = other.topic
    assert sender.commit(came).records == 0
    assert other.device() == (0, 0, 0)


def test_a_gap_commits_nothing_and_is_answered_with_the_watermark(sender: Sender) -> None:
    sender.commit(sender.batch(make([1, 2])))
    done = sender.commit(sender.batch(make([5, 6])))
    assert done.records == 0
    assert done.acks[sender.name] == Ackable(1, 2)
    assert sender.device()[:2] == (1, 2)


def test_evicted_seqs_are_covered_and_their_loss_counted(sender: Sender) -> None:
    loss = {"reason": "quota", "first_seq": 2, "last_seq": 9, "count": 7, "by_priority": {"9": 7}}
    records = [*make([1]), *make([10]), Record(11, 1.0, "loss", 0, loss)]
    done = sender.commit(sender.batch(records))
    assert done.acks[sender.name] == Ackable(1, 11)
    assert sender.device() == (1, 11, 7)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_never_came_is_counted_exactly_and_kept_with_its_ends(shared: Database, data: st.DataObject) -> None:
    sender = Sender(shared)
    kept = sorted(data.draw(st.sets(st.integers(1, 40), min_size=1)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 40), max_size=5)) | {40})
    first = 1
    for last in cuts:
        again = data.draw(st.integers(0, 2))  # a device that sends again may begin below the watermark
        seqs = [seq for seq in kept if first <= seq <= last]
        sender.commit(sender.batch(make(seqs), first=max(1, first - again), last=last))
        first = last + 1
    absent = set(range(1, 41)) - set(kept)
    (missing,) = sender.rows(sa.select(devices.c.missing).where(devices.c.name == sender.name))[0]
    found = sender.rows(sa.select(gaps.c.first, gaps.c.last, gaps.c.count).where(gaps.c.device == sender.name))
    assert missing == len(absent) == sum(count for *_, count in found)
    assert all({low, high} <= absent for low, high, _ in found)
    assert all(any(low <= seq <= high for low, high, _ in found) for seq in absent)


def test_gaps_are_bounded_however_wide_and_many_they_are(sender: Sender) -> None:
    for n in range(1, MAX_GAPS + 5):
        sender.commit(sender.batch(make([2 * n]), first=2 * n - 1))
    sender.commit(sender.batch(make([2**62]), first=2 * MAX_GAPS + 9))
    ends = sender.rows(sa.select(gaps.c.first, gaps.c.last).where(gaps.c.device == sender.name).order_by(gaps.c.id))
    assert len(ends) == MAX_GAPS
    assert ends[-1] == (2 * MAX_GAPS + 9, 2**62)


def test_a_commit_longer_than_a_statement_is_whole_and_counted(sender: Sender) -> None:
    first = 1
    for count in (1, 249, 250, 251, 503):
        records = make(range(first, first + count))
        messages = [sender.batch(part) for part in (records[: count // 2], records[count // 2 :]) if part]
        assert sender.commit(*messages).records == count
        first += count
    assert [seq for _, seq, _ in sender.committed()] == list(range(1, first))


def test_a_dead_letter_is_taken_after_all_and_only_once(sender: Sender) -> None:
    loss = Record(3, 1.0, "loss", 0, {"reason": "ttl", "first_seq": 9, "last_seq": 9, "count": 4})
    sender.commit(sender.batch([*make([1, 2]), loss]), condemn="a fault of ours")
    sender.commit(sender.batch(make([4])))
    (id, properties) = sender.rows(
        sa.select(dead_letters.c.id, dead_letters.c.properties).where(dead_letters.c.device == sender.name)
    )[0]
    assert properties["first"] == "1"
    with sender.database.engine.begin() as connection:
        assert [replay(connection, id) for _ in range(2)] == [3, 0]
        assert replay(connection, id + 1) is None
    assert sorted(seq for _, seq, _ in sender.committed()) == [1, 2, 3, 4]
    assert sender.device() == (1, 4, 4)
    replayed = sender.rows(sa.select(dead_letters.c.replayed).where(dead_letters.c.id == id))
    assert replayed[0][0] > 0


def test_a_letter_that_still_cannot_be_read_stays_dead(sender: Sender) -> None:
    batch = encode_batch([b"rubbish"], sender.key, sender.topic, Header(1, 1, 1))
    sender.commit(Came(sender.topic, batch.payload, dict(batch.properties)))
    (id,) = sender.rows(sa.select(dead_letters.c.id).where(dead_letters.c.device == sender.name))[0]
    with sender.database.engine.begin() as connection, pytest.raises(Undecodable):
        replay(connection, id)


def test_a_new_epoch_starts_over_and_an_old_one_is_refused_but_answered(sender: Sender) -> None:
    sender.commit(sender.batch(make([1, 2, 3]), epoch=1))
    assert sender.commit(sender.batch(make([3, 4]), epoch=2)).acks[sender.name] == Ackable(2, 0)
    assert sender.commit(sender.batch(make([1, 2]), epoch=2)).records == 2
    late = sender.commit(sender.batch(make([4]), epoch=1))
    assert late.records == 0
    assert late.acks[sender.name] == Ackable(2, 2)
    assert sender.told("refuse:epoch") == 1
    assert [(epoch, seq) for epoch, seq, _ in sender.committed()] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    "lines",
    [
        [b"not json"],
        [b'{"seq":1}'],
        [encode(Record(1, 1.0, "k" * 65, 5, {}))],
        [encode(Record(1, 1.0, "a\0b", 5, {}))],
        [encode(Record(1, 1.0, "telemetry", 2**40, {}))],
        [encode(Record(7, 1.0, "telemetry", 5, {}))],
    ],
)
def test_what_is_signed_but_unusable_is_dead_lettered_and_covered(sender: Sender, lines: list[bytes]) -> None:
    batch = encode_batch(lines, sender.key, sender.topic, Header(1, 1, 2))
    done = sender.commit(Came(sender.topic, batch.payload, dict(batch.properties)), sender.batch(make([3, 4])))
    assert done.acks[sender.name] == Ackable(1, 4)
    assert sender.dead() == [(1, 2)]
    assert [seq for _, seq, _ in sender.committed()] == [3, 4]


def test_a_batch_of_another_content_type_is_dead_lettered_with_its_name(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.wire.batch.CONTENT_TYPE", "parquet")
    came = sender.batch(make([1]))
    monkeypatch.undo()
    assert sender.commit(came).acks[sender.name] == Ackable(1, 1)
    assert sender.committed() == []
    (reason,) = sender.rows(sa.select(dead_letters.c.reason).where(dead_letters.c.device == sender.name))[0]
    assert "'parquet'" in reason


def test_dead_letters_are_bounded(sender: Sender) -> None:
    for n in range(1, MAX_DEAD_LETTERS + 20):
        batch = encode_batch([b"rubbish"], sender.key, sender.topic, Header(1, n, n))
        sender.commit(Came(sender.topic, batch.payload, dict(batch.properties)))
    assert len(sender.rows(sa.select(dead_letters.c.id))) == MAX_DEAD_LETTERS
    assert sender.dead()[-1] == (MAX_DEAD_LETTERS + 19,) * 2
    assert sender.told("dead:batch") == 1


def test_a_condemned_batch_is_covered_without_its_records(sender: Sender) -> None:
    done = sender.commit(sender.batch(make([1, 2])), condemn="the database refuses it")
    assert (done.records, done.acks[sender.name]) == (0, Ackable(1, 2))
    assert sender.dead() == [(1, 2)]


def test_unknown_devices_and_foreign_topics_are_audited_boundedly(sender: Sender) -> None:
    came = sender.batch(make([1]))
    strangers = [
        Came(topic, came.payload, came.properties)
        for topic in ("outrider/1/main/nobody/up", "outrider/1/other/x/up", "outrider/2/main/x/up", "rubbish")
    ]
    for _ in range(5):
        assert sender.commit(*strangers) == Committed()
    refused = sender.rows(sa.select(audit.c.actor).where(audit.c.action == "refuse:device"))
    assert sorted(actor for (actor,) in refused) == ["nobody", "unknown"]


def job_row(sender: Sender, job: str, **more: Any) -> None:
    row = {
        "id": job, "device": sender.name, "kind": "task", "body": {}, "subject": "a", "roles": [], "state": "queued",
        "created": 0.0, "expires": time.time() + 60, "updated": 0.0, "result": {}, "error": "",
    }  # fmt: skip
    with sender.database.engine.begin() as connection:
        connection.execute(jobs.insert().values(**row | more))


def state_of(sender: Sender, job: str) -> tuple[str, Any]:
    return sender.rows(sa.select(jobs.c.state, jobs.c.result).where(jobs.c.id == job))[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reports=st.lists(st.sampled_from([*JobState, "from-the-future"]), max_size=8))
def test_a_job_never_leaves_a_final_state_whatever_is_reported(shared: Database, reports: list[str]) -> None:
    sender, job = Sender(shared), secrets.token_hex(8)
    job_row(sender, job)
    final: tuple[str, Any] | None = None
    for seq, state in enumerate(reports, 1):
        body = {"id": job, "state": str(state), "ts": 1.0, "result": {"seq": seq}}
        sender.commit(sender.batch([Record(seq, 1.0, "job", 1, body)]))
        now = state_of(sender, job)
        assert final is None or now == final
        final = now if now[0] in ("succeeded", "failed", "rejected", "expired", "cancelled") else None
        assert now[0] != "unknown"


def test_reports_of_other_devices_jobs_and_rubbish_reports_change_nothing(sender: Sender) -> None:
    other = Sender(sender.database)
    job_row(sender, "j1")
    bodies = [{"id": "j1", "state": "succeeded", "ts": 1.0}, {"id": 3}, {}]
    other.commit(other.batch([Record(n, 1.0, "job", 1, body) for n, body in enumerate(bodies, 1)]))
    assert state_of(sender, "j1") == ("queued", {})
    assert other.device()[1] == 3


def test_what_a_device_reports_beats_the_hubs_guess_of_expiry(sender: Sender) -> None:
    job_row(sender, "j2", state="expired", error="no device confirmed it in time")
    body = {"id": "j2", "state": "succeeded", "ts": 1.0, "result": {"answer": "42"}}
    sender.commit(sender.batch([Record(1, 1.0, "job", 1, body)]))
    assert state_of(sender, "j2") == ("succeeded", {"answer": "42"})


def test_a_job_that_was_given_up_runs_on_and_ends_once_where_its_device_does(sender: Sender) -> None:
    job_row(sender, "j3", state="expired", error=SILENT)
    query = sa.select(jobs.c.state, jobs.c.error, jobs.c.progress).where(jobs.c.id == "j3")
    reports: list[tuple[str, dict[str, Any]]] = [("running", {"progress": {"done": 2}}), ("succeeded", {})]
    for seq, (state, more) in enumerate([*reports, ("running", {"progress": {"done": 3}})], 1):
        body = {"id": "j3", "state": state, "ts": 1.0, **more}
        sender.commit(sender.batch([Record(seq, 1.0, "job", 1, body)]))
        now, error, progress = sender.rows(query)[0]
        assert (now, error, progress["done"]) == (state if seq < 3 else "succeeded", "", 2)


def test_reported_state_is_kept_as_the_device_sent_it(sender: Sender) -> None:
    body = {"version": 4, "doc": {"line": {"speed": 3}}}
    sender.commit(sender.batch([Record(1, 1.0, "reported", 2, body)]))
    assert sender.rows(sa.select(devices.c.reported).where(devices.c.name == sender.name)) == [
        ({"line": {"speed": 3}},)
    ]


def test_a_fleet_of_batches_in_one_commit_is_fast_enough(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    sender = Sender(database)
    batches = [sender.batch(make(range(n, n + 200))) for n in range(1, 20_001, 200)]
    began = time.perf_counter()
    for at in range(0, len(batches), 16):
        sender.commit(*batches[at : at + 16])
    rate = 20_000 / (time.perf_counter() - began)
    database.close()
    assert rate > 10_000, f"{rate:.0f} records/s"
