"""The rules of a rollout, pure: a run and what is known of the fleet go in, decisions come out.

Invariants: `tick` moves the run along the tables of rollout_state and along nothing else; equal inputs give equal
decisions; a wave opens only when every device of those before it has an end, their soak is over and enough of them
succeeded: all being at an end is not enough; a wave gives to no more devices than its minimum sample before that sample
is in, so a failure threshold pauses within it, and then to no more at once than have had their result; at most
`max_active` devices install at once; a device is in one rollout of a bundle at a time, the newest; who took the version
of a rollout that is rolled back is told to go back.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping

from hub.errors import Refused
from hub.rollout_plan import split
from hub.rollout_state import (
    ACTIVE,
    COMMANDS,
    ENDED,
    LEFT,
    MOVING,
    REPORTED,
    STATUSES,
    STEPS,
    Decision,
    Place,
    Run,
    Seen,
    Status,
    Step,
)

TICK_S = 1.0  # between ticks; what a budget of bytes may be behind
AT_ONCE = 200  # devices that are told something in a tick
HISTORY = 16  # entries kept of a device


class _Ticking:
    """One tick, or one command, of a run."""

    def __init__(self, run: Run, fleet: Mapping[str, Seen], newer: Mapping[str, str], now: float) -> None:
        self.run, self.plan, self.fleet, self.newer, self.now = run, run.plan, fleet, newer, now
        self.stages = run.plan.stages
        self.decisions: list[Decision] = []

    def turn(self, to: Status, reason: str) -> None:
        if to is not self.run.status and to not in STATUSES[self.run.status]:
            raise Refused(409, f"rollout {self.run.id} cannot go from {self.run.status} to {to}")
        if (to, reason) != (self.run.status, self.run.reason):
            self.run.status, self.run.reason = to, reason
            self.decisions.append(Decision("", to, reason))

    def move(self, place: Place, to: Step, reason: str = "", version: str | None = None) -> None:
        if (to, reason, version) == (place.step, place.reason, None):
            return
        assert to is place.step or to in STEPS[place.step], f"{place.device}: {place.step} to {to}"
        if place.step is Step.REVERTING and to is not Step.REVERTING:
            place.assigned = 0.0
        if to is not place.step and place.changed <= self.run.resumed:
            self._unforgive(place, to)
        place.step, place.reason, place.changed = to, reason, self.now
        place.history = [*place.history[1 - HISTORY :], (self.now, str(to), reason)]
        self.decisions.append(Decision(place.device, to, reason, version))

    def tally(self) -> list[Counter[Step]]:
        """How many devices of each wave are where."""
        steps = [[] for _ in self.stages]  # type: list[list[Step]]
        for place in self.run.places.values():
            steps[place.wave].append(place.step)
        return [Counter(each) for each in steps]

    def join(self) -> None:
        """Give devices their waves, in an order that is this rollout's own; late ones come into the last wave."""
        run, frozen = self.run, self.plan.select.frozen
        if run.joined and frozen:
            return
        new = [name for name, seen in self.fleet.items() if seen.selected and name not in run.places]
        if not new:
            return
        new.sort(key=lambda name: order(run.id, name))
        sizes = [0] * (len(self.stages) - 1) + [len(new)] if run.joined else split(self.stages, len(new))
        waves = (wave for wave, size in enumerate(sizes) for _ in range(size))
        for name, wave in zip(new, waves, strict=True):
            seen, step, reason = self.fleet[name], Step.PENDING, "joined late" if run.joined else "selected"
            if seen.version == seen.wanted == self.plan.version and seen.state == "committed":
                step, reason = Step.SKIPPED, "it has this version already"
            history = [(self.now, str(step), reason)]
            run.places[name] = Place(name, wave, step, reason, changed=self.now, history=history)
            self.decisions.append(Decision(name, step, reason))
        run.joined = True

    def observe(self) -> None:
        """Take what devices report; those whose turn has not come are not looked at."""
        begun = len(self.stages) if self.run.status in ENDED or self.newer else self.run.wave + 1
        fleet, done = self.fleet, LEFT | {Step.REVERTED}
        for place in self.run.places.values():
            if place.wave >= begun or place.step in done:
                continue
            seen = fleet.get(place.device)
            if seen is None:
                if Step.SKIPPED in STEPS[place.step]:
                    self.move(place, Step.SKIPPED, "no longer in the fleet")
            elif place.step is Step.SUCCEEDED:
                if seen.state != "committed" or not place.figures:
                    self._follow(place, seen, self.plan.version, Step.SUCCEEDED)
            elif newer := self.newer.get(place.device):
                self.move(place, Step.SUPERSEDED, f"rollout {newer} took over")
            elif place.step is Step.PENDING:
                self._wait(place, seen)
            elif place.step is Step.REVERTING:
                self._follow(place, seen, place.before, Step.REVERTED)
            else:
                self._follow(place, seen, self.plan.version, Step.SUCCEEDED)

    def _wait(self, place: Place, seen: Seen) -> None:
        """For a device that has been given nothing."""
        if self.run.status in ENDED:
            self.move(place, Step.SKIPPED, f"the rollout is {self.run.status.replace('_', ' ')}")
        elif not seen.selected and not self.plan.select.frozen:
            self.move(place, Step.SKIPPED, "no longer selected")
        elif self.run.status is Status.RUNNING and place.wave <= self.run.wave and not seen.online:
            waited = self.now - max(self.run.opened, place.changed)
            if waited > self.plan.timeout_s and self.plan.open(self.now, seen.zone):
                self.move(place, Step.MISSED, f"offline since its wave began, {waited:.0f} s ago")

    def _follow(self, place: Place, seen: Seen, version: str, good: Step) -> None:
        """Take what a device says of the version that it was given."""
        of_it, silent = seen.target == version, place.step is Step.MISSED
        if place.step in ACTIVE and seen.wanted != version:
            self.move(place, Step.SKIPPED, f"somebody directed it to {seen.wanted or 'nothing'}")
        elif of_it and (seen.state != "committed" or seen.version == version):
            step = REPORTED.get(seen.state, Step.TRYING)
            if seen.figures and place.figures != seen.figures:
                place.figures = seen.figures
            if step is Step.SUCCEEDED:
                if place.step is not good:
                    self.move(place, good)
            elif step is Step.FAILED:
                if place.step is not Step.FAILED:
                    late = "after it had succeeded: " if place.step is Step.SUCCEEDED else ""
                    self.move(place, step, late + (seen.error or "quarantined, with no reason given"))
            elif place.step in MOVING and not self._too_late(place, seen.error if seen.state == "failed" else ""):
                again = seen.state == "failed" or place.step is Step.REVERTING
                self.move(place, place.step if again else step, seen.error if seen.state == "failed" else "")
        elif silent and not place.assigned and seen.online and self.run.status is Status.RUNNING:
            self.move(place, Step.PENDING, "it is back")
        elif place.step in MOVING:
            self._too_late(place, "")

    def _too_late(self, place: Place, error: str) -> bool:
        if self.now - place.assigned <= self.plan.timeout_s:
            return False
        within = f"within {self.plan.timeout_s:.0f} s"
        if error:
            self.move(place, Step.FAILED, f"not installed {within}: {error}")
        else:
            self.move(place, Step.MISSED, f"it did not say that it is done {within}")
        return True

    def judge(self) -> None:
        """Pause when a wave that has begun shows more failures than are allowed, or go on."""
        if not self.run.places:
            return self.turn(Status.PAUSED, "no device is selected")
        counts = self.tally()
        for number in range(self.run.wave + 1):
            count, (failed, _, done) = counts[number], self._forgiven(number)
            failed, done = count[Step.FAILED] - failed, count[Step.FAILED] + count[Step.SUCCEEDED] - done
            limit = self.plan.rule(self.stages[number], "failure")
            if done and done >= self._sample(number, count) and failed > limit * done:
                shares = f"{failed} of {done} failed ({failed / done:.1%}, at most {limit:.1%} may)"
                return self.turn(Status.PAUSED, f"wave {number + 1}: {shares}{self._mostly(number)}")
        self._advance(counts)

    def _sample(self, number: int, count: Counter[Step]) -> int:
        """How many results the failure threshold is asked after: all of them in a wave that has no more."""
        left = count.total() - sum(count[step] for step in (*LEFT, Step.MISSED))
        wanted: int = self.plan.rule(self.stages[number], "min_sample")
        return max(1, min(wanted, left - self._forgiven(number)[2]))

    def _forgiven(self, number: int) -> tuple[int, int, int]:
        return self.run.forgiven.get(number, (0, 0, 0))

    def _unforgive(self, place: Place, to: Step) -> None:
        """One that stood where it was forgiven and moves on excuses no other."""
        (failed, missed, done), was, results = self._forgiven(place.wave), place.step, (Step.FAILED, Step.SUCCEEDED)
        less = (was is Step.FAILED, was is Step.MISSED, was in results and to not in results)
        self.run.forgiven |= {place.wave: (failed - less[0], missed - less[1], done - less[2])}

    def _mostly(self, number: int) -> str:
        why = Counter(p.reason for p in self.run.places.values() if p.wave == number and p.step is Step.FAILED)
        reason, times = why.most_common(1)[0]
        return f"; {times} of them: {reason[:200]}"

    def _advance(self, counts: list[Counter[Step]]) -> None:
        run, number = self.run, self.run.wave
        sofar = sum(counts[: number + 1], Counter[Step]())
        if sofar[Step.PENDING] or any(sofar[step] for step in ACTIVE):
            run.complete = 0.0
            return self.turn(Status.RUNNING, "")
        run.complete = run.complete or self.now
        failed, missed, _ = self._forgiven(number)
        count, wave = counts[number], self.stages[number]
        counted = count.total() - sum(count[step] for step in LEFT) - failed - missed
        share, least = count[Step.SUCCEEDED] / counted if counted else 1.0, self.plan.rule(wave, "success")
        if share < least:
            ended = f"{count[Step.FAILED] - failed} failed, {count[Step.MISSED] - missed} were missed"
            return self.turn(
                Status.PAUSED, f"wave {number + 1} ended with {share:.1%} success, under {least:.1%}: {ended}"
            )
        soak = self.plan.rule(wave, "soak_s") if counted else 0.0
        if self.now < run.complete + soak:
            return self.turn(Status.RUNNING, f"wave {number + 1} soaks for {soak:.0f} s")
        if number + 1 == len(self.stages):
            return self._end(sofar)
        if self.stages[number + 1].approval and number + 1 not in run.approved:
            return self.turn(Status.RUNNING, f"wave {number + 2} waits for approval")
        self.open(number + 1)

    def _end(self, counts: Counter[Step]) -> None:
        taken = counts[Step.SUPERSEDED]
        more = f"; a newer rollout took over {taken}" if taken else ""
        to = Status.ABORTED if taken and not counts[Step.SUCCEEDED] else Status.SUCCEEDED
        self.turn(to, f"{counts[Step.SUCCEEDED]} devices have it{more}")

    def open(self, number: int) -> None:
        self.run.wave, self.run.opened, self.run.complete = number, self.now, 0.0
        self.turn(Status.RUNNING, f"wave {number + 1} of {len(self.stages)} begins")

    def begin(self) -> None:
        zones = {seen.zone for seen in self.fleet.values() if seen.selected} or {""}
        if self.now < self.plan.begins() or not any(self.plan.open(self.now, zone) for zone in zones):
            return
        if self.stages[0].approval and 0 not in self.run.approved:
            return self.turn(Status.SCHEDULED, "wave 1 waits for approval")
        self.open(0)
        self.join()

    def release(self) -> None:
        """Give the version to the next devices, as far as rules and bounds let it."""
        run, plan, open_in = self.run, self.plan, dict[str, bool]()
        counts, active = self.tally(), Counter[int]()
        if not any(count[Step.PENDING] for count in counts[: run.wave + 1]):
            return
        for place in run.places.values():
            if place.step in ACTIVE and (seen := self.fleet.get(place.device)) and seen.online:
                active[place.wave] += 1
        room = AT_ONCE
        if plan.max_active:
            room = min(room, plan.max_active - sum(count[step] for count in counts for step in ACTIVE))
        sample = {}
        for number in range(run.wave + 1):
            count = counts[number]
            done = count[Step.FAILED] + count[Step.SUCCEEDED] - self._forgiven(number)[2]
            wanting = self._sample(number, count) - done
            sample[number] = (wanting if wanting > 0 else done) - active[number]
        run.next_at = max(run.next_at, self.now - TICK_S)
        for place in run.places.values():
            if place.step is not Step.PENDING or place.wave > run.wave or sample[place.wave] <= 0:
                continue
            if room <= 0 or (plan.bytes_per_s and run.next_at > self.now):
                return
            seen = self.fleet.get(place.device)
            if seen is None or not (seen.selected or plan.select.frozen):
                continue  # the next look at it says so
            if seen.zone not in open_in:
                open_in[seen.zone] = plan.open(self.now, seen.zone)
            if not seen.online or not open_in[seen.zone]:
                continue
            room, sample[place.wave] = room - 1, sample[place.wave] - 1
            run.next_at += run.size / plan.bytes_per_s if plan.bytes_per_s else 0.0
            bad = seen.target if seen.state == "quarantined" else ""
            place.before = next((v for v in (seen.wanted, seen.version) if v not in ("", bad, plan.version)), "")
            place.assigned = self.now
            self.move(place, Step.ASSIGNED, "", plan.version)

    def revert(self) -> None:
        """Send devices back that were given the version, so many in a tick."""
        room = AT_ONCE
        for place in self.run.places.values():
            if not place.goes_back or room <= 0:
                continue
            seen, room = self.fleet.get(place.device, Seen(place.device)), room - 1
            if seen.wanted != self.plan.version:
                self.move(place, Step.SUPERSEDED, f"it is directed to {seen.wanted or 'nothing'} by now")
                continue
            why, place.assigned = f"rolled back{f', had failed: {place.reason}' if place.reason else ''}", self.now
            self.move(place, Step.REVERTING, why, place.before)
            if not place.before:
                self.move(place, Step.SKIPPED, f"{why}; it had no version before, so what it has stays")


def tick(run: Run, fleet: Mapping[str, Seen], newer: Mapping[str, str], now: float) -> list[Decision]:
    """Advance a run; what changed. `fleet` has the selected devices and those of the run, `newer` the devices that a
    newer rollout of the same bundle has, and its id."""
    at = _Ticking(run, fleet, newer, now)
    if run.status is Status.SCHEDULED:
        if run.plan.select.frozen:
            at.join()
        at.begin()
    elif run.status in (Status.RUNNING, Status.PAUSED):
        at.join()
    at.observe()
    if run.status is Status.RUNNING:
        at.judge()
    if run.status is Status.RUNNING:
        at.release()
    elif run.status is Status.ROLLED_BACK:
        at.revert()
    return at.decisions


def command(run: Run, verb: str, by: str, now: float) -> list[Decision]:
    """What a person wants: pause, resume, approve (the next wave), abort, rollback. Raises Refused 404, 409."""
    if verb not in COMMANDS:
        raise Refused(404, f"no command {verb}", f"one of {', '.join(COMMANDS)}")
    statuses, to = COMMANDS[verb]
    at = _Ticking(run, {}, {}, now)
    if run.status not in statuses:
        hint = f"it can: {', '.join(can)}" if (can := possible(run)) else "make a new one"
        raise Refused(409, f"rollout {run.id} is {run.status}: no {verb} now", hint)
    if verb == "approve":
        due = [n for n, wave in enumerate(at.stages) if n > run.wave and wave.approval and n not in run.approved]
        if not due:
            raise Refused(
                409, f"no wave of rollout {run.id} waits for approval", "outrider rollout show says why it waits"
            )
        run.approved = [*run.approved, due[0]]
        at.decisions.append(Decision("", run.status, f"wave {due[0] + 1} approved by {by}"))
        return at.decisions
    if verb == "resume":
        to, run.resumed = Status.RUNNING if run.wave >= 0 else Status.SCHEDULED, now
        for number, count in enumerate(at.tally()[: run.wave + 1]):
            failed, missed = count[Step.FAILED], count[Step.MISSED]
            run.forgiven = run.forgiven | {number: (failed, missed, failed + count[Step.SUCCEEDED])}
    at.turn(to, f"{verb} by {by}")
    return at.decisions


def possible(run: Run) -> list[str]:
    """The commands that it can be given now."""
    gates = [n for n, wave in enumerate(run.plan.stages) if n > run.wave and wave.approval and n not in run.approved]
    return [name for name, (statuses, _) in COMMANDS.items() if run.status in statuses and (name != "approve" or gates)]


def leave_out(run: Run, device: str, reason: str, now: float) -> None:
    """Of a device that cannot be directed as was decided."""
    _Ticking(run, {}, {}, now).move(run.places[device], Step.SKIPPED, reason)


def order(run: str, device: str) -> bytes:
    """What devices are sorted by: each rollout has an order of its own, and keeps it."""
    return hashlib.sha256(f"{run} {device}".encode()).digest()
