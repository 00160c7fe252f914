"""Rollouts in the database, and the loop that carries them out: once a second the rules are asked, and obeyed.

Invariants: what a tick decided is committed, with the signed directives that it means, before a device hears of it, and
a hub that was killed goes on from what it committed; a device is directed as by `assign`; new reports are read past the
last one seen, everything again each REFRESH_S; a tick tells a bounded number of devices; one that raises is taken again
from the disk at the next tick and stops no other. One hub process runs them.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

from edge_agent.wire.bundle import Manifest, Target
from edge_agent.wire.messages import Desired
from edge_agent.wire.signing import SigningKey
from hub import audit, rollout
from hub.db import Database, among, devices, rollout_devices, rollouts, row_dict, telemetry
from hub.devices import Devices
from hub.errors import Refused
from hub.registry import Registry
from hub.rollout import TICK_S
from hub.rollout_plan import Plan, parse, selects, zone_of
from hub.rollout_state import LEFT, Decision, Place, Run, Seen, Status, Step
from hub.twin import Twin, direction, patch_desired

log = logging.getLogger(__name__)
T = TypeVar("T")
REFRESH_S = 60.0
GRACE_S = 60.0  # after a start nobody has shown yet that it is online
REPORTS = 4000  # read in a tick
TOGETHER = 50  # devices directed in one transaction
MAX_PAGE = 1000


class _Live(msgspec.Struct):
    run: Run
    created: float
    fleet: dict[str, Seen] = {}
    fresh: float = float("-inf")  # when the fleet was read (monotonic)
    waits: float = 0.0  # until when nothing is decided (monotonic)


class Rollouts:
    """Making, showing, steering rollouts; `run` carries them out."""

    def __init__(self, db: Database, twin: Twin, registry: Registry, known: Devices, key: SigningKey) -> None:
        self._db, self._twin, self._registry, self._devices, self._key = db, twin, registry, known, key
        self._lives: dict[str, _Live] = {}
        self._heard: int | None = None  # the id of the last report taken
        self._lock = asyncio.Lock()
        self._errors: dict[str, str] = {}  # why a rollout cannot go on, by id
        self.took: deque[float] = deque(maxlen=600)  # how long the last decisions took, in seconds

    async def create(self, document: Any, by: str, draft: bool = False) -> dict[str, Any]:
        """Raises Refused 404 (no such bundle), 422."""
        plan = parse(document)
        manifest, _ = await self._registry.get(plan.bundle, plan.version)
        status = Status.DRAFT if draft else Status.SCHEDULED
        run, now = Run(secrets.token_hex(4), plan, manifest.size, status, f"made by {by}"), time.time()
        row = _row(run) | {"id": run.id, "bundle": plan.bundle, "version": plan.version}
        row |= {"created": now, "created_by": by, "updated": now}

        def change(connection: sa.Connection) -> None:
            connection.execute(rollouts.insert().values(**row))
            detail = {"rollout": run.id, "bundle": plan.bundle, "version": plan.version, "draft": draft}
            audit.append(connection, by, "create:rollout", detail)

        async with self._lock:
            await self._db.write(change)
            if run.live:
                self._lives[run.id] = _Live(run, now)
        return await self.get(run.id)

    async def get(self, id: str, only: Collection[str] | None = None) -> dict[str, Any]:
        """With `only` these of its devices, if given; one that has none of them is as if not there: Refused 404."""
        query = sa.select(rollouts).where(rollouts.c.id == id)
        found = await self._db.read(lambda c: _show(c, c.execute(query).all(), only, self._errors))
        if not found or (only is not None and not any(wave["devices"] for wave in found[0]["waves"])):
            raise Refused(404, f"no rollout {id}", "outrider rollout list")
        took = sorted(self.took) or [0.0]
        return found[0] | {"tick_ms": {"p50": took[len(took) // 2] * 1000, "max": took[-1] * 1000, "ticks": len(took)}}

    async def devices(
        self, id: str, step: str = "", after: str = "", limit: int = 100, only: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """Devices of a rollout, by name, those past `after`: wave, step, reason, figures, history."""
        await self.get(id, only)
        query = sa.select(rollout_devices.c.place).where(rollout_devices.c.rollout == id, _of(only))
        query = query.where(rollout_devices.c.step == step) if step else query
        query = query.where(rollout_devices.c.device > after).order_by(rollout_devices.c.device)
        found = await self._db.read(lambda c: c.execute(query.limit(min(limit, MAX_PAGE))).scalars().all())
        return list(found)

    async def command(self, id: str, verb: str, by: str) -> dict[str, Any]:
        """Pause, resume, approve, abort or roll back. Raises Refused 404, 409."""
        async with self._lock:
            if id not in self._lives:
                await self._load(rollouts.c.id == id)
            if (live := self._lives.get(id)) is None:
                if id in self._errors:
                    raise Refused(409, self._errors[id], "the hub's log says more")
                raise Refused(404, f"no rollout {id}", "outrider rollout list")
            try:
                decisions = rollout.command(live.run, verb, by, time.time())
                live.waits = live.waits if live.run.status is Status.RUNNING else 0.0  # for who is online after a start
                await self._carry_out(live, decisions, by, f"{verb}:rollout")
            finally:
                if id in self._lives and not self._lives[id].run.live:
                    self._lives.pop(id)
        return await self.get(id)

    async def label(self, device: str, labels: dict[str, Any], by: str) -> dict[str, Any]:
        """Set a device's groups, tags and zone. Raises Refused 404, 422."""
        try:
            zone_of(labels.get("zone") or "UTC")
        except ValueError as error:
            raise Refused(422, str(error)) from None

        def change(connection: sa.Connection) -> None:
            values = devices.update().where(devices.c.name == device).values(labels=labels)
            if connection.execute(values).rowcount == 0:
                raise Refused(404, f"no device {device}", "see GET /v1/devices")
            audit.append(connection, by, "label:device", {"device": device, "labels": labels})

        await self._db.write(change)
        for live in self._lives.values():
            live.fresh = float("-inf")
        return labels

    async def run(self) -> None:
        """Go on with what is under way, until cancelled."""
        async with self._lock:
            self._lives.clear()
            await self._load(rollouts.c.live)
            for live in self._lives.values():
                live.waits = time.monotonic() + GRACE_S
        while True:
            await asyncio.sleep(TICK_S)
            await self.tick()

    async def tick(self) -> None:
        """Ask the rules about every rollout under way, the oldest first, and do what they say."""
        async with self._lock:
            if not self._lives:
                self._heard = None
                return
            await self._hear()
            now = time.monotonic()
            lives = sorted(self._lives.values(), key=lambda live: (live.created, live.run.id))
            for number, live in enumerate(lives):
                try:
                    await self._advance(live, lives[number + 1 :], now)
                except (sa.exc.OperationalError, sa.exc.InterfaceError):
                    raise  # the database gives or takes nothing: no other would fare better
                except Exception as error:
                    if self._errors.get(live.run.id) != (said := f"{type(error).__name__}: {error}"):
                        log.exception("rollout %s cannot go on; it is tried again each tick", live.run.id)
                    self._errors[live.run.id] = said
                    await self._again(live)
                else:
                    if self._errors.pop(live.run.id, ""):
                        log.info("rollout %s goes on again", live.run.id)

    async def _advance(self, live: _Live, later: Sequence[_Live], now: float) -> None:
        run = live.run
        if now - live.fresh > REFRESH_S:
            live.fleet = await self._db.read(lambda c: _fleet(c, run))
            live.fresh = now
        if now < live.waits:
            return
        began = time.perf_counter()
        for seen in live.fleet.values():
            seen.online = self._devices.liveness.online(seen.name, now)
        decisions = await asyncio.to_thread(rollout.tick, run, live.fleet, _newer(live, later), time.time())
        self.took.append(time.perf_counter() - began)
        await self._carry_out(live, decisions, "hub", "advance:rollout")
        if not run.live:
            self._lives.pop(run.id)

    async def _hear(self) -> None:
        """Take the reports that came since the last tick."""

        def look(connection: sa.Connection) -> tuple[int, Sequence[Any]]:
            top: int = connection.execute(sa.select(sa.func.max(telemetry.c.id))).scalar() or 0
            if self._heard is None:
                return top, []  # the fleet is read whole below
            query = sa.select(telemetry.c.id, telemetry.c.device, telemetry.c.body)
            query = query.where(telemetry.c.id > self._heard, telemetry.c.id <= top, telemetry.c.kind == "reported")
            return top, connection.execute(query.order_by(telemetry.c.id).limit(REPORTS)).all()

        top, rows = await self._db.read(look)
        self._heard = rows[-1].id if len(rows) == REPORTS else top
        for row in rows:
            body = msgspec.json.decode(row.body)
            document = body["doc"] if isinstance(body.get("doc"), dict) else body
            for live in self._lives.values():
                if (seen := live.fleet.get(row.device)) is not None:
                    _take(seen, document.get("bundles"), live.run.plan.bundle)

    async def _load(self, which: sa.ColumnElement[bool]) -> None:
        found = await self._db.read(lambda c: _load(c, which, self._errors))
        self._lives |= {live.run.id: live for live in found}

    async def _again(self, live: _Live) -> None:
        """As it is on disk: what is in memory is ahead of that."""
        self._lives.pop(live.run.id, None)
        await self._load(sa.and_(rollouts.c.id == live.run.id, rollouts.c.live))
        if (again := self._lives.get(live.run.id)) is not None:
            again.waits = live.waits

    async def _carry_out(self, live: _Live, decisions: list[Decision], by: str, action: str) -> None:
        """Commit decisions with what they mean for devices, then tell these."""
        try:
            await self._commit(live, decisions, by, action)
        except BaseException:
            await self._again(live)
            raise

    async def _commit(self, live: _Live, decisions: list[Decision], by: str, action: str) -> None:
        run, told = live.run, [d for d in decisions if d.version is not None]
        versions = {version: await self._version(run, version) for version in {d.version or "" for d in told}}
        plain = {d.device for d in decisions if d.device} - {d.device for d in told}
        turns = [d for d in decisions if not d.device]
        row = _row(run) | ({"live": True} if told else {})  # until they are directed: a start would not go on else

        def save(connection: sa.Connection) -> None:
            connection.execute(rollouts.update().where(rollouts.c.id == run.id).values(updated=time.time(), **row))
            for turn in turns:
                audit.append(connection, by, action, {"rollout": run.id, "to": turn.to, "reason": turn.reason})
            _keep(connection, run, plain)

        if decisions:
            await self._db.write(save)
        for some in _parts(told, TOGETHER):
            sent = await self._db.write(lambda c, some=some: self._direct(c, run, some, versions))  # type: ignore[misc]
            for decision in some:
                if (seen := live.fleet.get(decision.device)) is not None and decision.device in sent:
                    seen.wanted = decision.version or ""
            for device, desired in sent.items():
                await self._twin.send(device, desired)
                await asyncio.sleep(0)
        if not run.live and (told or not decisions):
            await self._db.write(
                lambda c: c.execute(rollouts.update().where(rollouts.c.id == run.id).values(live=False))
            )

    def _direct(
        self,
        connection: sa.Connection,
        run: Run,
        decisions: Sequence[Decision],
        versions: dict[str, tuple[Manifest, Target] | Refused | None],
    ) -> dict[str, Desired]:
        sent = {}
        for decision in decisions:
            found = versions[decision.version or ""]
            try:
                if isinstance(found, Refused):
                    raise found
                manifest, target = found or (None, None)
                patch = direction(self._key, self._devices.fleet, run.plan.bundle, manifest, target)
                by = f"rollout:{run.id}"
                sent[decision.device] = patch_desired(connection, decision.device, patch, by, "assign:bundle")
            except Refused as refused:
                rollout.leave_out(run, decision.device, str(refused), time.time())
        _keep(connection, run, {decision.device for decision in decisions})
        return sent

    async def _version(self, run: Run, version: str) -> tuple[Manifest, Target] | Refused | None:
        try:
            return await self._registry.get(run.plan.bundle, version) if version else None
        except Refused as refused:
            return refused

    async def list(self, limit: int = 100, only: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Newest first."""
        query = sa.select(rollouts).order_by(rollouts.c.created.desc(), rollouts.c.id).limit(min(limit, MAX_PAGE))
        if only is not None:
            query = query.where(rollouts.c.id.in_(sa.select(rollout_devices.c.rollout).where(_of(only))))
        return await self._db.read(lambda c: _show(c, c.execute(query).all(), only, self._errors))


def _parts(of: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (of[at : at + size] for at in range(0, len(of), size))


def _row(run: Run) -> dict[str, Any]:
    return {
        "status": str(run.status),
        "live": run.live,
        "run": msgspec.to_builtins(msgspec.structs.replace(run, places={}), str_keys=True),
    }


def _keep(connection: sa.Connection, run: Run, names: set[str]) -> None:
    """Store where these devices stand."""
    columns = rollout_devices.c
    for some in _parts(sorted(names), 500):
        connection.execute(rollout_devices.delete().where(columns.rollout == run.id, columns.device.in_(some)))
        places = [run.places[name] for name in some]
        rows = [
            {
                "rollout": run.id,
                "device": p.device,
                "wave": p.wave,
                "step": str(p.step),
                "place": msgspec.to_builtins(p),
            }
            for p in places
        ]
        connection.execute(rollout_devices.insert(), rows)


def _load(connection: sa.Connection, which: sa.ColumnElement[bool], errors: dict[str, str]) -> list[_Live]:
    found = []
    for row in connection.execute(sa.select(rollouts).where(which)).all():
        try:
            run = msgspec.convert(row.run, Run, str_keys=True)
        except msgspec.ValidationError as error:
            errors[row.id] = f"it cannot be read: {error}"
            log.error("rollout %s: %s", row.id, errors[row.id])
            continue
        query = sa.select(rollout_devices.c.place).where(rollout_devices.c.rollout == row.id)
        places = msgspec.convert(list(connection.execute(query).scalars()), list[Place])
        run.places = {
            place.device: place for place in sorted(places, key=lambda p: (p.wave, rollout.order(row.id, p.device)))
        }
        found.append(_Live(run, row.created))
    return found


def _fleet(connection: sa.Connection, run: Run) -> dict[str, Seen]:
    """The devices that the plan selects, and those that are in the run."""
    plan, fleet = run.plan, dict[str, Seen]()
    wanted = devices.c.desired[("bundles", plan.bundle)].label("wanted")
    query = sa.select(devices.c.name, devices.c.labels, devices.c.reported, wanted).where(devices.c.revoked.is_(None))
    with connection.execution_options(yield_per=500).execute(query) as rows:
        for row in rows:
            selected = selects(plan.select, row.name, row.labels, row.reported)
            if selected or row.name in run.places:
                want = row.wanted.get("version", "") if isinstance(row.wanted, dict) else ""
                fleet[row.name] = seen = Seen(row.name, selected, False, str(row.labels.get("zone", "")), want)
                _take(seen, row.reported.get("bundles"), plan.bundle)
    return fleet


def _take(seen: Seen, bundles: Any, name: str) -> None:
    """What a device reported of a bundle, whatever it put there."""
    report = bundles.get(name) if isinstance(bundles, dict) else None
    if isinstance(report, dict):
        for field in ("version", "target", "state", "error"):
            setattr(seen, field, str(report.get(field) or "")[:2000])
        why = report.get("why")  # of a version that rolled back
        found = (report.get("trial"), why.get("figures") if isinstance(why, dict) else None)
        seen.figures = next((figures for figures in found if isinstance(figures, dict)), {})


def _newer(live: _Live, later: Sequence[_Live]) -> dict[str, str]:
    """Devices that newer rollouts of the same bundle have, and in which."""
    same = [each.run for each in later if each.run.plan.bundle == live.run.plan.bundle and each.run.wave >= 0]
    gone = LEFT | {Step.REVERTED, Step.REVERTING}
    return {name: run.id for run in same for name, place in run.places.items() if place.step not in gone}


def _of(only: Collection[str] | None) -> sa.ColumnElement[bool]:
    return sa.true() if only is None else among(rollout_devices.c.device, only)


def _show(
    connection: sa.Connection, rows: Sequence[sa.Row[Any]], only: Collection[str] | None, errors: dict[str, str]
) -> list[dict[str, Any]]:
    """Rollouts as they are shown, with the devices of each wave by step; to who sees `only` some, nothing of others."""
    columns = rollout_devices.c
    key = (columns.rollout, columns.wave, columns.step)
    counted = sa.select(*key, sa.func.count()).where(columns.rollout.in_([row.id for row in rows]), _of(only))
    counts: dict[str, dict[int, Counter[str]]] = {}
    for id, wave, step, count in connection.execute(counted.group_by(*key)):
        counts.setdefault(id, {}).setdefault(wave, Counter())[step] = count
    shown = [_shown(row, counts.get(row.id, {}), errors.get(row.id, "")) for row in rows]
    for each in shown if only is not None else ():
        each["reason"], each["error"], each["plan"]["select"] = "", "", {}
    return shown


def _shown(row: sa.Row[Any], counts: dict[int, Counter[str]], error: str) -> dict[str, Any]:
    try:
        run = msgspec.convert(row.run, Run, str_keys=True)
    except msgspec.ValidationError as unread:  # of a newer hub: what the columns tell, and nothing it can be told
        run = Run(row.id, Plan(row.bundle, row.version), status=Status.ROLLED_BACK)
        error = f"it cannot be read: {unread}"

    def waves() -> Iterator[dict[str, Any]]:
        for number, stage in enumerate(run.plan.stages):
            steps = counts.get(number, Counter())
            yield {
                "wave": number + 1,
                "devices": steps.total(),
                "steps": dict(sorted(steps.items())),
                "approval": stage.approval,
                "approved": number in run.approved,
                "canary": number == 0 and run.plan.canary > 0,
            }

    shown = {name: value for name, value in row_dict(row).items() if name != "run"}
    reason = f"cannot go on: {error} ({run.reason or 'nothing before'})" if error else run.reason
    shown |= {"reason": reason, "error": error, "wave": run.wave + 1, "waves": list(waves()), "size": run.size}
    return shown | {"plan": msgspec.to_builtins(run.plan), "commands": rollout.possible(run)}
