"""Installs what the hub assigns, one bundle after the other, and keeps one good model at every instant.

Invariants: `current` moves only to a version whose signature and every byte were checked on this device and that
passed its trial in a worker. A failure is reported with its reason and never blocks the other bundles; a
Retry (no hub, full disk) comes back with a capped delay, a Refused quarantines the version. What runs is announced
through `switch`; when the new version is refused there, the one before comes back. An adapter runs only with the very
base model it is for: until that runs it waits with a reason, and it is switched in again whenever its base is. Nothing
is fetched or tried at a bad moment (update/moments.py), but what is installed never waits for a good one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.rhythm import wait_up_to
from edge_agent.update import disk, moments
from edge_agent.update.download import Downloads
from edge_agent.update.machine import Machine, State, Update
from edge_agent.update.moments import Facts, Hold, NotNow
from edge_agent.update.neighbours import Neighbours
from edge_agent.update.slots import Installed, Slots
from edge_agent.update.staging import Staging
from edge_agent.update.timing import Timing
from edge_agent.update.trial import Figures, Untried, Why, activation
from edge_agent.update.trust import Director, Trust
from edge_agent.wire.bundle import SHA256, Manifest, Target
from edge_agent.wire.topics import check_name
from edge_agent.wire.updates import Activation

log = logging.getLogger("outrider.update")
RETRY_S = (2.0, 300.0)
MAX_ERROR = 2000  # characters
WANTED_S = 0.5
"""How often a trial asks whether it is still wanted."""


class Prober(Protocol):
    """Tries a candidate beside what runs: its golden probe (update/probe.py), then live traffic (update/trial.py)."""

    async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
        """Raises Worse or Refused when it does not load or is not as good, Untried when it cannot be tried now.

        Retry when it did not answer, which is borne a few times.
        """
        ...


class BundleReport(msgspec.Struct, frozen=True):
    """`reported.bundles[name]`: what is current (version, digest, kind; empty: nothing), how the target fares.

    `trial`: what the last trial saw; `why`: the evidence against a version that rolled back, cut short.
    """

    version: str
    digest: str
    state: str
    error: str
    target: str
    kind: str = ""
    trial: Figures | None = None
    why: Why | None = None


Switch = Callable[[str, Installed], Awaitable[None]]
"""Told which version of a bundle is to run, at start and after each change. Raises Refused (back to the one before)."""
Report = Callable[[str, BundleReport], Awaitable[None]]


class UpdateService:
    """Composed by the daemon. `direct` takes what the hub assigns; `run` does the rest."""

    def __init__(
        self,
        root: Path,
        director: Director,
        trust: Trust,
        downloads: Downloads,
        prober: Prober,
        switch: Switch,
        report: Report,
        *,
        retry_s: tuple[float, float] = RETRY_S,
        reserve: int = disk.RESERVE,
        budget: int | None = None,
        agent_version: str = "",
        rules: Mapping[str, Any] | None = None,
        facts: Callable[[], Facts] = moments.facts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.slots = Slots(root)
        self.staging = Staging(
            self.slots,
            director,
            trust,
            downloads,
            self._needs_base,
            reserve=reserve,
            budget=budget,
            agent_version=agent_version,
        )
        self._director, self._prober, self._switch, self._report = director, prober, switch, report
        self._retry_s = retry_s
        self._machines: dict[str, Machine] = {}
        self._desired: dict[str, Target] = {}
        self._directed = False
        self._active: dict[str, str] = {}
        self._due: dict[str, float] = {}  # when to try again (monotonic)
        self._delay: dict[str, float] = {}  # how long to wait after the next failure
        self._waiting: set[str] = set()  # for a better moment
        self._waits: dict[str, str] = {}  # adapters and the model they wait for
        self._wake = asyncio.Event()
        self._timing = Timing(root / "hold.json", rules or {}, facts, clock)
        self.neighbours: Neighbours | None = None
        self._activation: dict[str, Mapping[str, Any]] = {}

    @property
    def time_zone(self) -> str:
        """The site's, an IANA name."""
        return self._timing.rules.time_zone

    @property
    def holding(self) -> Hold | None:
        """The last hold, over or not."""
        return self._timing.holding

    def configure(self, document: Mapping[str, Any]) -> None:
        """Take `updates` and `activation` of the desired document. Raises Refused, and keeps what was before."""
        asked, plans = document.get("updates") or {}, document.get("activation") or {}
        if not isinstance(asked, dict) or not isinstance(plans, dict):
            raise Refused("updates and activation are tables", "see docs/updates.md")
        for plan in plans.values():
            activation(plan)
        self._timing.configure(asked)
        self._activation = plans
        self._hurry()

    async def hold(self, minutes: float, reason: str) -> Hold:
        """An application's "not now": nothing is downloaded or activated, what runs goes on. Raises Refused."""
        kept = await self._timing.hold(minutes, reason)
        self._hurry()
        return kept

    async def release(self) -> None:
        """End a hold."""
        await self._timing.release()
        self._hurry()

    def evidence(self) -> dict[str, Update]:
        """The whole records, evidence included."""
        return {name: machine.update for name, machine in self._machines.items()}

    def _hurry(self) -> None:
        """Ask again whether what waits may go on."""
        for name in self._waiting:
            self._due.pop(name, None)
        self._waiting.clear()
        self._wake.set()

    async def direct(self, document: Mapping[str, Any]) -> None:
        """Take `desired.director`. Raises Refused, naming what is wrong: what was wanted before is still wanted."""
        wanted: dict[str, Target] = {}
        for name, target in (await asyncio.to_thread(self._director.accept, document)).items():
            try:
                if not SHA256.fullmatch(target.manifest_sha256):
                    raise ValueError(f"{target.manifest_sha256!r} is no SHA-256")
                wanted[check_name(name, "bundle")] = target
            except ValueError as error:
                log.error("the bundle %r is ignored: %s", name, error)
        for name, target in wanted.items():
            if self._desired.get(name) != target:
                self._due.pop(name, None)
                self._delay.pop(name, None)
        self._desired, self._directed = wanted, True
        self._wake.set()

    def retry_now(self) -> None:
        """Forget the waits: the hub is there again."""
        self._due.clear()
        self._wake.set()

    async def run(self) -> None:
        """Recover, announce what is installed, then install what is desired, until cancelled."""
        await self._recover()
        while True:
            self._wake.clear()
            await self._pass()
            wait = max(0.05, min(self._due.values()) - time.monotonic()) if self._due else None
            await wait_up_to(wait, self._wake)

    async def reject(self, name: str, reason: str) -> Installed | None:
        """Quarantine the version that runs and go back to the one before, which is returned."""
        bad = await asyncio.to_thread(self.slots.current, name)
        if bad is None:
            return None
        back = await asyncio.to_thread(self.slots.roll_back, name)
        await self._end(name, State.QUARANTINED, reason, Target(bad.manifest.version, bad.id))
        self._wake.set()
        return back

    async def _recover(self) -> None:
        """After a start: finish or undo what was cut off, then read every current version again."""
        folders = await asyncio.to_thread(lambda: sorted(p.name for p in self.slots.root.glob("*") if p.is_dir()))
        for name in folders:
            machine = self._machines[name] = Machine(self.slots.root / name / "update.json")
            left = await asyncio.to_thread(machine.load)
            if left not in (State.IDLE, State.COMMITTED, State.QUARANTINED, State.WAITING):
                log.warning("%s: the update was cut off in state %s", name, left)
            if left is State.COMMITTED and await asyncio.to_thread(self.slots.has, name, machine.update.id):
                await asyncio.to_thread(self.slots.commit, name, machine.update.id)
            await self._keep_one_good(name)

    async def _keep_one_good(self, name: str) -> None:
        while (id := await asyncio.to_thread(self.slots.pointed, name)) is not None:
            try:
                await asyncio.to_thread(self.slots.check, name, id)
                return
            except Refused as error:
                log.error("%s; going back to the version before", error)
                await asyncio.to_thread(self.slots.roll_back, name)
                await asyncio.to_thread(self.slots.discard, name, id)

    async def _pass(self) -> None:
        names = {*await asyncio.to_thread(self.slots.names), *self._desired}
        self._due = {name: due for name, due in self._due.items() if name in names}
        for name in await asyncio.to_thread(self._ordered, names):
            if self._due.get(name, 0.0) > time.monotonic():
                continue
            self._due.pop(name, None)
            try:
                await self._bring(name)
                self._delay.pop(name, None)
            except NotNow as error:
                self._waiting.add(name)
                self._due[name] = time.monotonic() + self._timing.left(error.until)
                update, target = self._machine(name).update, self._desired.get(name)
                if (update.state, update.error, target and target.manifest_sha256) != (
                    State.WAITING,
                    str(error),
                    update.id,
                ):
                    await self._end(name, State.WAITING, str(error), target)
            except _Superseded as error:
                await self._end(name, State.FAILED, str(error))
            except Retry as error:
                if isinstance(error, _NoBase):
                    self._waits[name] = error.base
                await self._fail(name, error)
            except Refused as error:
                await self._end(name, State.QUARANTINED, str(error), why=getattr(error, "why", None))
            except OSError as error:
                await self._fail(name, _disk_error(error))

    def _ordered(self, names: Iterable[str]) -> list[str]:
        """Adapters after what they are for."""
        return sorted(names, key=lambda name: (bool((i := self.slots.current(name)) and i.manifest.base), name))

    async def _bring(self, name: str) -> None:
        target = self._desired.get(name)
        try:
            await self._activate(name)
            await self._tidy(name)
        except _NoBase:
            current = await asyncio.to_thread(self.slots.current, name)
            if target is None or current is None or current.id == target.manifest_sha256:
                raise
        if target is not None:
            await self._install(name, target)
            if self._machine(name).update.state is not State.QUARANTINED:
                await self._activate(name)

    async def _activate(self, name: str) -> None:
        """Bring the pointer's version to run; when it is refused, the one before."""
        while (current := await asyncio.to_thread(self.slots.current, name)) is not None:
            if self._active.get(name) == current.id:
                return
            await asyncio.to_thread(self._needs_base, current.manifest)
            for follower in await asyncio.to_thread(self._followers, name):
                self._active.pop(follower, None)
            try:
                await self._switch(name, current)
            except Refused as error:
                log.error("%s %s does not run: %s", name, current.manifest.version, error)
                await self.reject(name, str(error))
                continue
            self._active[name] = current.id
            await self._tidy(name)
            await self._tell(name)
            for adapter in [adapter for adapter, base in self._waits.items() if base == name]:
                del self._waits[adapter]
                self._due.pop(adapter, None)
                self._wake.set()

    async def _tidy(self, name: str) -> None:
        """Give back the room of what an ended wish left; before the first directive nobody can say what is wanted."""
        if self._directed:
            wanted = self._desired.get(name)
            await asyncio.to_thread(self.slots.collect, name, wanted.manifest_sha256 if wanted else "")

    def _needs_base(self, manifest: Manifest) -> None:
        """Raises _NoBase when a manifest is an adapter's and its base model does not run here."""
        if (base := manifest.base) is None:
            return
        there = self.slots.current(base.name)
        need = f"{manifest.name} {manifest.version} is for {base.name} of digest {base.digest[:12]}"
        if there is not None and there.digest != base.digest:
            hint = "assign an adapter for that, or the base model again: this one follows"
            raise _NoBase(f"{need}, installed is {there.manifest.version} of {there.digest[:12]}", hint, base.name)
        if there is None or self._active.get(base.name) != there.id:
            raise _NoBase(f"{need}, which does not run here", "assign it too: the adapter follows", base.name)

    def _followers(self, name: str) -> list[str]:
        """Installed adapters for a model."""
        currents = {other: self.slots.current(other) for other in self.slots.names()}
        return [other for other, i in currents.items() if i and (base := i.manifest.base) and base.name == name]

    async def _install(self, name: str, target: Target) -> None:
        machine, id = self._machine(name), target.manifest_sha256
        current = await asyncio.to_thread(self.slots.current, name)
        known = machine.update.id == id
        if current is not None and current.id == id:
            if not known or machine.update.state is not State.COMMITTED:
                await asyncio.to_thread(machine.aim, target, State.COMMITTED)
                await self._tell(name)
            return
        if id in machine.update.quarantine:
            if not known or machine.update.state is not State.QUARANTINED:
                await self._end(name, State.QUARANTINED, machine.update.quarantine[id], target)
            return
        await self._timing.check("activate" if await asyncio.to_thread(self.slots.has, name, id) else "download")
        await asyncio.to_thread(machine.aim, target, State.RESOLVING)
        while machine.update.state is not State.COMMITTED:
            await self._tell(name)
            self._still_wanted(name, target)
            await asyncio.to_thread(machine.to, await self._step(name, machine.update.state, target))
        await asyncio.to_thread(self.slots.commit, name, id)

    async def _step(self, name: str, state: State, target: Target) -> State:
        """Do the action of the saved state; the next state is returned."""
        id = target.manifest_sha256
        match state:
            case State.RESOLVING:
                there = await self.staging.resolve(name, target)
                return State.VERIFYING if there else State.DOWNLOADING
            case State.DOWNLOADING:
                await self.staging.download(name, target, self.neighbours, lambda _: self._goes_on(name, target))
                return State.STAGED
            case State.STAGED:
                await asyncio.to_thread(self.slots.stage, name, id)
                return State.VERIFYING
            case State.VERIFYING:
                await asyncio.to_thread(self.staging.read_again, name, target)
                await self._timing.check("activate")
                return State.TRIAL
            case State.TRIAL:
                await self._try(name, await asyncio.to_thread(self.slots.open, name, id), target)
                return State.COMMITTED
            case _:
                raise Fatal(f"{name}: state {state} has no action")

    async def _try(self, name: str, candidate: Installed, target: Target) -> None:
        """The trial, for as long as it is wanted."""
        machine, given = self._machine(name), candidate.manifest.meta.get("activation") or {}
        plan = activation(given if isinstance(given, dict) else {"policy": given}, self._activation.get(name) or {})
        trying = asyncio.ensure_future(self._prober.probe(name, candidate, plan))
        try:
            while not (await asyncio.wait([trying], timeout=WANTED_S))[0]:
                self._still_wanted(name, target)
            machine.update.trial, machine.update.trials = await trying, 0
            self._timing.check_hold()
        except Untried:
            machine.update.trials -= 1
            raise
        finally:
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)
            if plan.policy == "kill-then-load":  # what runs was moved, and perhaps put back without its adapters
                for model in (name, *await asyncio.to_thread(self._followers, name)):
                    self._active.pop(model, None)
                self._wake.set()

    def _still_wanted(self, name: str, target: Target) -> None:
        if self._desired.get(name) != target:
            raise _Superseded(f"{name} {target.version} is no longer wanted")

    def _goes_on(self, name: str, target: Target) -> None:
        """Asked at each piece of a download."""
        self._still_wanted(name, target)
        self._timing.check_window("download")

    async def _fail(self, name: str, error: Retry) -> None:
        delay = self._delay.get(name, self._retry_s[0])
        self._due[name] = time.monotonic() + delay
        self._delay[name] = min(delay * 2, self._retry_s[1])
        await self._end(name, State.FAILED, str(error))

    async def _end(
        self, name: str, state: State, error: str, target: Target | None = None, why: Why | None = None
    ) -> None:
        """End the update of a bundle and say why; a disk too full to save it does not hide it."""
        machine, error = self._machine(name), error[:MAX_ERROR]
        target = target or Target(machine.update.version, machine.update.id)
        log.log(
            logging.INFO if state is State.WAITING else logging.ERROR,
            "%s %s: %s: %s",
            name,
            target.version,
            state,
            error,
        )
        known = machine.update.why
        if state is State.QUARANTINED and (why is not None or known is None or known.version != target.version):
            machine.update.why = msgspec.structs.replace(why or Why(Figures("check")), version=target.version)
        try:
            await asyncio.to_thread(machine.aim, target, state, error)
            if state is State.QUARANTINED:
                await asyncio.to_thread(self.slots.discard, name, target.manifest_sha256)
        except OSError as problem:
            log.error("%s: the state could not be saved: %s", name, problem)
        await self._tell(name)

    async def _tell(self, name: str) -> None:
        current = await asyncio.to_thread(self.slots.current, name)
        update = self._machine(name).update
        version, digest = (current.manifest.version, current.digest) if current else ("", "")
        kind = str(current.manifest.kind) if current else ""
        evidence = update.trial, update.why and update.why.short()
        shown = BundleReport(version, digest, str(update.state), update.error, update.version, kind, *evidence)
        await self._report(name, shown)

    def _machine(self, name: str) -> Machine:
        if name not in self._machines:
            self._machines[name] = Machine(self.slots.root / name / "update.json")
        return self._machines[name]


class _NoBase(Retry):
    """An adapter waits for its base model."""

    def __init__(self, message: str, hint: str, base: str) -> None:
        super().__init__(message, hint)
        self.base = base


class _Superseded(Retry):
    """The hub wants something else by now."""


def _disk_error(error: OSError) -> Retry:
    if disk.is_full(error):
        return Retry(f"the disk is full: {error}", "free space on the device; the update is tried again")
    return Retry(f"the disk does not take the update: {error}", "see the device's log")
