"""Which request runs next: classes, aging, batches of what is alike, deadlines, barriers, bounds."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import Refused, Retry
from edge_agent.serving import batching
from edge_agent.serving.cache import Cache, key
from edge_agent.serving.schedule import AGING_S, LOWEST, WAITING, Entry, Lanes, Pace, Schedule, Serving, Way
from edge_agent.wire.tensor import Tensor

BATCH = Pace(Serving(max_batch=4), way=(1, 4))


def schedule(*entries: Entry[str]) -> Schedule[str]:
    made = Schedule[str]()
    for entry in entries:
        made.add(entry)
    return made


def names(entries: list[Entry[str]]) -> list[str]:
    return [entry.request for entry in entries]


def test_a_better_class_goes_first_and_equals_in_the_order_they_came() -> None:
    waiting = schedule(Entry("late", 1, 0.2, 1), Entry("low", 2, 0.0, 3), Entry("first", 3, 0.1, 1))
    order = [names(waiting.take(0.2, BATCH)[0]) for _ in range(3)]
    assert order == [["first"], ["late"], ["low"]]


def test_the_lowest_class_is_not_starved_by_a_stream_of_the_best() -> None:
    waiting, now, ran = schedule(Entry("low", 0, 0.0, LOWEST)), 0.0, 0
    for id in itertools.count(1):
        waiting.add(Entry("best", id, now, 0))
        taken, _ = waiting.take(now, BATCH)
        now, ran = now + 0.1, ran + 1
        if names(taken) == ["low"]:
            break
    assert now <= (LOWEST + 1) * AGING_S + 0.2
    assert ran > 20


def test_what_is_alike_runs_together_up_to_the_pace() -> None:
    alike = [Entry(str(i), i, float(i), key="a") for i in range(6)]
    waiting = schedule(alike[0], Entry("other", 9, 0.5, key="b"), *alike[1:])
    assert names(waiting.take(6.0, BATCH)[0]) == ["0", "1", "2", "3"]
    assert names(waiting.take(6.0, BATCH)[0]) == ["other"]
    assert names(waiting.take(6.0, BATCH)[0]) == ["4", "5"]


def test_a_request_of_many_rows_counts_as_many_and_one_too_large_runs_alone() -> None:
    waiting = schedule(Entry("three", 1, 0.0, key="a", rows=3), Entry("two", 2, 0.1, key="a", rows=2))
    waiting.add(Entry("one", 3, 0.2, key="a"))
    assert names(waiting.take(1.0, BATCH)[0]) == ["three", "one"]
    waiting.add(Entry("nine", 4, 0.0, key="a", rows=9))
    assert names(waiting.take(1.0, BATCH)[0]) == ["nine"]


def test_the_first_waits_for_others_no_longer_than_it_may() -> None:
    pace = Pace(Serving(max_batch=2, max_delay_ms=10), way=(1, 2))
    waiting = schedule(Entry("one", 1, 0.0, key="a"))
    taken, wait = waiting.take(0.004, pace)
    assert (taken, wait) == ([], pytest.approx(0.006))
    waiting.add(Entry("two", 2, 0.005, key="a"))
    assert names(waiting.take(0.005, pace)[0]) == ["one", "two"]
    waiting.add(Entry("three", 3, 0.006, key="a"))
    assert names(waiting.take(0.016, pace)[0]) == ["three"]


def test_nothing_passes_a_barrier() -> None:
    waiting = schedule(Entry("before", 1, 5.0, 3), Entry("adapter", 2, 1.0, barrier=True), Entry("after", 3, 0.0, 0))
    assert [names(waiting.take(9.0, BATCH)[0]) for _ in range(3)] == [["before"], ["adapter"], ["after"]]


def test_what_is_past_its_deadline_is_given_back() -> None:
    waiting = schedule(Entry("late", 1, 0.0, until=1.0), Entry("fine", 2, 0.0))
    assert names(waiting.expired(1.5)) == ["late"]
    assert names(waiting.take(1.5, BATCH)[0]) == ["fine"]
    assert not waiting._sizes


def test_too_many_or_too_large_is_a_retry_and_a_barrier_always_has_room() -> None:
    waiting = schedule(*(Entry(str(i), i, 0.0) for i in range(WAITING)))
    with pytest.raises(Retry, match="requests are waiting"):
        waiting.add(Entry("x", 99, 0.0))
    waiting.add(Entry("adapter", 100, 0.0, barrier=True))
    small = Serving(queue_mb=1e-4)
    waiting = Schedule[str]()
    waiting.add(Entry("alone is fine", 1, 0.0, size=500), small)
    with pytest.raises(Retry, match="MiB"):
        waiting.add(Entry("x", 2, 0.0, size=1), small)


def settled(pace: Pace, took: Callable[[int, int], float], runs: int = 600) -> Counter[Way]:
    """How often a busy model ran in which way at last, where each run takes `took(lanes, rows)`."""
    ways = Counter[Way]()
    for run in range(runs):
        lanes, rows = pace.way
        ways[pace.way] += run > runs / 2
        pace.ran(rows, rows * 100, took(lanes, rows), took(lanes, rows) / lanes, company=lanes > 1)
    return ways


def test_a_busy_model_runs_in_the_way_that_takes_the_least_time_a_row() -> None:
    def fixed(lanes: int, rows: int) -> float:
        return 0.010 * lanes

    def dearer(lanes: int, rows: int) -> float:
        return 0.010 * rows**1.1 * lanes

    def idle(lanes: int, rows: int) -> float:
        return 0.010 * rows * (1.6 if lanes == 2 else 1.0)

    for took, best in ((fixed, 8), (dearer, 1)):
        ways = settled(Pace(lanes=2), took)
        assert {rows for (_, rows), _ in ways.most_common(1)} == {best}
        assert settled(Pace(), took).most_common(1)[0][0] == (1, best)
    ways = settled(Pace(lanes=2), idle)
    assert sum(count for (lanes, _), count in ways.items() if lanes == 2) > 0.8 * ways.total()


def test_a_model_follows_the_load_and_tries_other_ways_seldom() -> None:
    pace = Pace()
    assert settled(pace, lambda lanes, rows: 0.010).most_common(1)[0][0] == (1, 8)
    pace_now = settled(pace, lambda lanes, rows: 0.010 * rows**1.2, 4000)
    assert pace_now.most_common(1)[0] == ((1, 1), pytest.approx(2000, rel=0.1))


def test_a_way_that_is_later_than_the_target_is_none() -> None:
    pace = Pace(Serving(max_batch=8, target_ms=25))
    ways = settled(pace, lambda lanes, rows: 0.018 + 0.001 * rows)
    assert ways.most_common(1)[0][0] == (1, 4)
    assert settled(pace, lambda lanes, rows: 0.050, 3000).most_common(1)[0][0] == (1, 1)
    assert pace.ewma_ms == pytest.approx(50, rel=0.05)
    with pytest.raises(ValueError, match="max_batch"):
        Serving(max_batch=0)


def test_a_model_that_nobody_waits_for_keeps_its_way() -> None:
    pace = Pace(lanes=2)
    for _ in range(100):
        pace.ran(1, 100, 0.01, 0.01, waiting=False)
    assert pace.way == (1, 1)


def test_runs_at_the_same_time_share_it() -> None:
    lanes = Lanes()
    assert lanes.free(1)
    one = lanes.begin(10.0, 2)
    assert (lanes.free(2), lanes.free(1)) == (True, False)
    two = lanes.begin(11.0, 2)
    assert not lanes.free(3)
    assert lanes.end(13.0, one) == (3.0, 2.0)
    assert lanes.end(14.0, two) == (3.0, 2.0)
    alone = lanes.begin(20.0, 1)
    assert not lanes.free(2)
    assert lanes.end(21.0, alone) == (1.0, 1.0)


entries = st.builds(
    Entry,
    st.just("r"),
    st.integers(0, 10**6),
    st.floats(0, 10),
    st.integers(0, LOWEST),
    st.floats(0, 40),
    st.sampled_from([None, "a", "b"]),
    st.integers(1, 5),
    st.integers(0, 100),
    st.booleans(),
)


@given(st.lists(entries, max_size=40), st.integers(1, 8))
def test_every_request_leaves_exactly_once_and_in_the_order_of_barriers(given: list[Entry[str]], rows: int) -> None:
    waiting = schedule(*given)
    now, left, pace = 10.0, list[Entry[str]](), Pace(Serving(max_batch=rows), way=(1, rows))
    while waiting.waiting:
        left += waiting.expired(now)
        taken, wait = waiting.take(now, pace)
        assert wait is None
        assert len(taken) <= 1 or (sum(e.rows for e in taken) <= rows and len({(e.key, e.era) for e in taken}) == 1)
        assert len(taken) <= 1 or all(e.key is not None for e in taken)
        left += taken
        now += 0.5
    assert sorted(map(id, left)) == sorted(map(id, given))
    assert not waiting._sizes
    ran = [e.era for e in left if e.until >= 10.0 + 0.5 * len(given)]
    assert ran == sorted(ran)


def tensor(rows: int, *rest: int, fill: int = 0) -> Tensor:
    count = rows
    for n in rest:
        count *= n
    return Tensor("uint8", [rows, *rest], bytes([fill] * count))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_joined_rows_come_apart_as_they_were(rows: list[int]) -> None:
    asked = [{"x": tensor(n, 3, fill=i)} for i, n in enumerate(rows)]
    assert {batching.alike("m", inputs)[1] for inputs in asked} == set(rows)
    assert len({batching.alike("m", inputs)[0] for inputs in asked}) == 1
    assert batching.parted(batching.joined(asked), rows) == asked


def test_what_differs_in_more_than_its_rows_is_not_alike() -> None:
    keys = [
        batching.alike(model, inputs)[0]
        for model, inputs in [
            ("m", {"x": tensor(2, 3)}),
            ("n", {"x": tensor(2, 3)}),
            ("m", {"x": tensor(2, 4)}),
            ("m", {"y": tensor(2, 3)}),
            ("m", {"x": Tensor("int8", [2, 3], bytes(6))}),
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert batching.alike("m", {"x": tensor(2, 3), "y": tensor(1, 3)}) == (None, 1)
    assert batching.alike("m", {"x": Tensor("uint8", [], b"1")}) == (None, 1)
    assert batching.alike("m", {"x": Tensor("float32", [2], b"123")}) == (None, 1)
    with pytest.raises(Refused, match="for 3 rows"):
        batching.parted({"x": tensor(2, 3)}, [1, 2])


def test_the_cache_keeps_what_fits_and_forgets_what_was_used_least() -> None:
    kept = Cache(1000)
    one, two, three = ({"x": tensor(150, fill=i)} for i in range(3))
    for inputs in (one, two):
        kept.put(key(inputs), inputs)
    assert kept.get(key(one)) == one
    kept.put(key(three), three)
    assert (kept.get(key(one)), kept.get(key(two)), kept.get(key(three))) == (one, None, three)
    large = {"x": tensor(2000)}
    kept.put(key(large), large)
    assert kept.get(key(large)) is None
    assert key(one) != key({"x": Tensor("uint8", [150, 1], one["x"].data)})


def test_a_busy_model_fills_its_own_queue_and_nobody_elses() -> None:
    waiting, short = Schedule[str](), Serving(queue=2, queue_mb=1)
    for id in range(2):
        waiting.add(Entry("a", id, 0.0, model="a"), short)
    with pytest.raises(Retry, match="2 requests are waiting for a"):
        waiting.add(Entry("a", 2, 0.0, model="a"), short)
    waiting.add(Entry("b", 3, 0.0, model="b", size=900_000), short)
    with pytest.raises(Retry, match="MiB of requests are waiting for b"):
        waiting.add(Entry("b", 4, 0.0, model="b", size=900_000), short)
    waiting.add(Entry("adapter", 5, 0.0, barrier=True), short)
    assert names(waiting.take(0.0, BATCH)[0]) == ["a"]
    waiting.add(Entry("a", 6, 0.0, model="a"), short)
    while waiting.waiting:
        waiting.take(9.0, BATCH)
    assert not waiting._held
    assert not waiting._sizes
    with pytest.raises(ValueError, match="at least 1"):
        Serving(queue=0)
