"""An update that ends at every enter and leave of its machine's states: by kill -9, and by a loss of power."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.disk import Disk
from tests.update.plant_hub import PlantHub
from tests.update.test_update import BIG, _crash

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]
Seen = Callable[[str, object], None]
STATES = ("resolving", "downloading", "staged", "verifying", "trial", "committed")


async def ended_everywhere(tmp_path: Path, record_property: Seen, *, power: bool) -> None:
    with PlantHub().serving() as hub:
        old = hub.publish("net", "1", {"model.bin": BIG, "same.txt": b"same"}, tmp_path)
        new = hub.publish("net", "2", {"model.bin": BIG + b"2", "same.txt": b"same", "more": b"x" * 9000}, tmp_path)
        ends = (await asyncio.to_thread(_crash, "states", tmp_path, hub, old, new, disk=power))["kills"]
    names = [end["at"] for end in ends]
    assert {f"{when} {state}" for state in STATES for when in ("enter", "in")} <= set(names)
    assert {f"leave {state}" for state in STATES if state != "committed"} <= set(names)
    assert {"before current moves", "after current moved", "after previous moved"} <= set(names)
    for end in ends:
        assert end["current"] in ("1", "2"), end  # read again byte by byte
        assert end["after"] == "2", end
    count = Counter(end["current"] for end in ends)
    record_property("seen", f"{len(ends)} points: a whole version at each ({count['1']} old, {count['2']} new), then 2")


@pytest.mark.fault(
    "update: kill -9 at every enter and leave of a state, and around the pointers' moves",
    "a verified version loads at once; then the wanted one",
    "real: each point by its name, in a forked process",
)
async def test_an_update_killed_at_every_state_leaves_a_whole_version(tmp_path: Path, record_property: Seen) -> None:
    await ended_everywhere(tmp_path, record_property, power=False)


@pytest.mark.fault(
    "update: power fails at every enter and leave of a state, and around the pointers' moves",
    "a verified version loads at once; then the wanted one",
    "real: ext4 shut down with no flush of its journal, then mounted again",
)
async def test_power_lost_at_every_state_leaves_a_whole_version(tmp_path: Path, record_property: Seen) -> None:
    try:
        await asyncio.to_thread(lambda: Disk(tmp_path / "probe", 8).unmount())
    except OSError:
        pytest.skip("needs the right to mount a loop device")
    await ended_everywhere(tmp_path, record_property, power=True)
