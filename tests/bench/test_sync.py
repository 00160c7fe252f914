"""The benchmarks of the way to the hub: their judge sees what is wrong, and they hold on a small scale."""

from pathlib import Path

import pytest

from bench import jetstream, offline, simulate, soak, uplink
from bench.rows import FIELDS, show
from bench.virtual import body, judge, line
from edge_agent.errors import Refused


def rows(*seqs: int) -> list[tuple[int, bytes]]:
    return [(seq, b'{"n":%d}' % seq) for seq in seqs]


LEDGER = [line(seq, {"n": seq}) for seq in (1, 2, 3)]


def test_the_judge_sees_what_is_lost_doubled_changed_and_out_of_order() -> None:
    whole = judge(LEDGER, rows(1, 2, 3))
    assert (whole.promised, whole.committed, whole.lost, whole.doubled, whole.ordered) == (3, 3, 0, 0, True)
    assert judge(LEDGER, rows(1, 3)).lost == 1
    assert judge(LEDGER, rows(1, 2, 2, 3)).doubled == 1
    assert not judge(LEDGER, rows(2, 1, 3)).ordered
    assert judge(LEDGER, [*rows(1, 2), (3, b'{"n":4}')]).lost == 1


def test_a_growing_process_is_not_called_flat() -> None:
    steady = [(100.0, 20)] * 30
    assert soak._flat(steady)["flat"]
    assert not soak._flat([*steady, *[(100.0 + 2 * n, 20) for n in range(30)]])["flat"]
    assert not soak._flat([*steady, *[(100.0, 20 + n) for n in range(30)]])["flat"]


def test_uplink_says_what_to_install_when_its_peer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Refused) as caught:
        next(iter(uplink.run()))
    assert "apt-get install nats-server" in caught.value.hint


@pytest.mark.slow
def test_records_queued_while_cut_off_come_home_in_order() -> None:
    found = {row["name"]: row for row in show(offline.run(count=3000), True)}
    assert list(found) == ["queued", "catchup", "memory", "order"]
    assert all(set(FIELDS) <= row.keys() for row in found.values())
    assert (found["order"]["value"], found["order"]["n"]) == (1, 3000)
    assert body(1) != body(2)


@pytest.mark.slow
def test_a_short_soak_is_exact(tmp_path: Path) -> None:
    report = soak.run(tmp_path, 0.25, 2, 3, lambda _: None)
    assert sum(report["faults"].values()) > 1
    assert (report["exact"], report["lost"], report["wrong"]) == (True, 0, {})
    assert report["made"] == report["rows"] >= report["promised"] > 50


SCRIPT = """
jobs = 5
[[behaviour]]
share = 0.5
per_minute = 60.0
[[behaviour]]
name = "doubler"
per_minute = 120.0
doubles = true
[[fault]]
at_s = 1.0
kind = "forge"
share = 0.2
[[fault]]
at_s = 3.0
kind = "cut"
share = 0.5
for_s = 1.0
[[fault]]
at_s = 4.0
kind = "mute"
for_s = 1.0
"""


@pytest.mark.slow
def test_a_simulated_fleet_under_faults_is_committed_exactly_and_nothing_forged_gets_in(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(SCRIPT)
    report = simulate.run(tmp_path, 20, 0.15, simulate.load(tmp_path / "script"), lambda _: None)
    assert report["held"], report
    assert (report["forged"], report["audited_refusals"]) == (4, 4)
    assert 1 <= report["jobs_done"] <= 5  # the others were asked for too late for a slow machine
    assert report["committed"] == report["made"] > 150
    assert report["connections"] >= 30


def test_a_script_with_an_unknown_word_is_refused(tmp_path: Path) -> None:
    (tmp_path / "script").write_text('[[fault]]\nat_s = 1.0\nkind = "earthquake"')
    with pytest.raises(Refused) as caught:
        simulate.load(tmp_path / "script")
    assert "earthquake" in str(caught.value)
