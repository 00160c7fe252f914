"""A plan played against virtual devices: the hub's own rules, on a clock that jumps, against fleets that misbehave.

Invariants: a seed gives the same play again; nothing is decided here, so what happens is what would happen.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from hub.rollout import command, tick
from hub.rollout_plan import Plan
from hub.rollout_state import ACTIVE, Decision, Run, Seen, Status, Step

STEP_S = (10.0, 600.0)  # between ticks while something happens, and at most
START, LONGEST_S = 1_800_000_000.0, 120 * 86400.0
WIDTH, ROWS = 60, 24
MARKS = {"█": {Step.SUCCEEDED}, "▒": ACTIVE, "x": {Step.FAILED}, "?": {Step.MISSED}, "·": {Step.PENDING}}


class Model(msgspec.Struct, frozen=True):
    """How the devices behave: shares are 0 to 1, `wave` counts from 1 (0: every wave), times are in seconds."""

    failing: float = 0.0
    wave: int = 0
    reason: str = "the golden probe answers otherwise"
    offline: float = 0.0  # half of them for good
    slow: float = 0.0  # take ten times as long
    silent: float = 0.0  # take the version and say nothing
    install_s: float = 120.0
    approve_s: float = 3600.0  # how long a person takes to approve
    size: int = 90_000_000


class Play(msgspec.Struct):
    """How it went; `course` has (seconds since the start, wave, devices by step)."""

    run: Run
    seconds: float
    course: list[tuple[float, int, dict[str, int]]]

    @property
    def told(self) -> int:
        """How many devices were given the version."""
        return sum(place.assigned > 0 for place in self.run.places.values())


def play(
    plan: Plan,
    devices: int,
    model: Model,
    seed: int = 1,
    watch: Callable[[Run, dict[str, Seen], list[Decision]], None] | None = None,
) -> Play:
    """Until it has ended or paused; `watch` is called after every tick."""
    chance, now, step = random.Random(seed), START, STEP_S[0]
    names = plan.select.devices or [f"device-{n:05}" for n in range(devices)]
    fleet = {name: Seen(name, wanted="0", version="0", target="0", state="committed") for name in names}
    run, course, asked = Run(f"sim-{seed}", plan, model.size), list[tuple[float, int, dict[str, int]]](), 0.0
    events: list[tuple[float, int, str, dict[str, str | bool]]] = []

    def happens(at: float, name: str, **change: str | bool) -> None:
        heapq.heappush(events, (at, len(events) + chance.getrandbits(32), name, change))

    for name, seen in fleet.items():
        if chance.random() < model.offline:
            seen.online = False
            if chance.random() < 0.5:
                happens(now + chance.uniform(0, 2 * plan.timeout_s), name, online=True)
    while run.live and run.status is not Status.PAUSED and now - START < LONGEST_S:
        while events and events[0][0] <= now:
            _, _, name, change = heapq.heappop(events)
            for field, value in change.items():
                setattr(fleet[name], field, value)
        decisions = tick(run, fleet, {}, now)
        for decision in decisions:
            if decision.version is None:
                continue
            name, version = decision.device, decision.version
            fleet[name].wanted = version
            took = chance.lognormvariate(0, 0.4) * model.install_s * (10 if chance.random() < model.slow else 1)
            bad = model.wave in (0, run.places[name].wave + 1) and chance.random() < model.failing
            if decision.to == Step.ASSIGNED and chance.random() < model.silent:
                continue
            happens(now + took * 0.1, name, target=version, state="downloading", error="")
            happens(now + took * 0.8, name, state="trial")
            if bad and decision.to == Step.ASSIGNED:
                happens(now + took, name, state="quarantined", error=model.reason)
            else:
                happens(now + took, name, state="committed", version=version)
        if watch:
            watch(run, fleet, decisions)
        if decisions:
            counts = Counter(str(place.step) for place in run.places.values())
            course.append((now - START, run.wave, dict(counts)))
        if "waits for approval" in run.reason:
            asked = asked or now
            if now - asked >= model.approve_s:
                command(run, "approve", "the simulator", now)
                asked = 0.0
        step = STEP_S[0] if decisions else min(step * 2, STEP_S[1])
        now = min(now + step, max(now + STEP_S[0], events[0][0])) if events else now + step
    return Play(run, now - START, course)


def facts(play: Play) -> dict[str, Any]:
    """The play as JSON data."""
    run = play.run
    waves: list[Counter[str]] = [Counter() for _ in run.plan.stages]
    for place in run.places.values():
        waves[place.wave][place.step] += 1
    said = {"status": run.status, "reason": run.reason, "wave": run.wave + 1, "seconds": play.seconds}
    said |= {"devices": len(run.places), "told": play.told, "waves": [dict(sorted(each.items())) for each in waves]}
    return said | {"course": [{"seconds": at, "wave": wave + 1, "steps": steps} for at, wave, steps in play.course]}


def show(play: Play) -> str:
    """What happened, in words and as a plot: a row a moment, a column a share of the devices."""
    total, every = len(play.run.places), max(1, len(play.course) // ROWS)
    lines = [f"{'time':>10}  wave  {' '.join(f'{mark} {min(steps)}' for mark, steps in MARKS.items())}"]
    for at, wave, counts in [*play.course[::every], *play.course[-1:]]:
        bar = ""
        for mark, steps in MARKS.items():
            count = sum(counts.get(step, 0) for step in steps)
            bar += mark * (max(1, round(count * WIDTH / total)) if count else 0)
        lines.append(f"{_clock(at):>10}  {wave + 1:4}  {bar}")
    for number, stage in enumerate(play.run.plan.stages):
        counts = Counter(str(p.step) for p in play.run.places.values() if p.wave == number)
        title = f"wave {number + 1}{', the canaries' if number == 0 and play.run.plan.canary else ''}"
        ends = ", ".join(f"{count} {step}" for step, count in sorted(counts.items()))
        lines.append(f"{title}{', approved first' if stage.approval else ''}: {ends or 'nobody'}")
    verdict = f"{play.run.status} after {_clock(play.seconds)}: {play.run.reason}"
    return "\n".join([*lines, f"{play.told} of {total} devices were given the version", verdict])


def _clock(seconds: float) -> str:
    days, rest = divmod(round(seconds), 86400)
    return f"{f'{days}d ' if days else ''}{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
