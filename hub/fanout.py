"""One job for every device of a group: the children are jobs like any other, at most `at_once` of them at a time.

Invariants: the children are made in one transaction, so a fan-out is whole or not there; the same idempotency key
gives the same fan-out, and each child carries it, so no device does it twice; a child that is held counts no time; a
child is sent when one that went before has ended or was cancelled, those of devices that are there first; no body is
read more than once for all of them.
"""

import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa

from edge_agent.wire.messages import JobKind, JobState
from hub import audit
from hub.db import Database, among, devices, fanouts, jobs, row_dict
from hub.errors import Refused
from hub.jobs import MAX_FANOUT, MAX_OPEN, Jobs, Send, check, new, take_back, wire

_OPEN = [state.value for state in (JobState.QUEUED, JobState.DELIVERED, JobState.RUNNING)]
_SHOWN = ("id", "device", "state", "held", "progress", "error", "updated", "cancelled_by")
_HELD = sa.and_(jobs.c.held, jobs.c.state == JobState.QUEUED.value)
_OUT = sa.and_(jobs.c.held.is_(False), jobs.c.state.in_(_OPEN), jobs.c.cancelled_by.is_(None))
_SMALL = [column for column in jobs.c if column.name not in ("body", "result")]


class Fanouts:
    def __init__(self, db: Database, jobs: Jobs, send: Send) -> None:
        self._db, self._jobs, self._send = db, jobs, send
        self._holding = True  # there may be children that are held

    async def create(
        self,
        group: str,
        kind: JobKind,
        body: dict[str, Any],
        *,
        subject: str,
        roles: list[str],
        may: Callable[[str], bool],
        there: Collection[str] = (),
        idempotency_key: str = "",
        ttl_s: float = 3600.0,
        at_once: int = 0,
    ) -> dict[str, Any]:
        """Give each device of the group the job; `at_once` 0 is all of them at a time, `there` are sent first.

        Raises Refused 403 (a device on which the subject may not), 404, 409 (key used otherwise), 413, 422, 429.
        """
        check(kind, body, idempotency_key, ttl_s)
        if not 0 <= at_once <= MAX_FANOUT:
            raise Refused(422, f"at_once {at_once} is out of range", f"0 (all) to {MAX_FANOUT}")

        def change(connection: sa.Connection) -> tuple[str, list[dict[str, Any]]]:
            if known := _same(connection, group, idempotency_key, kind, body, subject):
                return known, []
            names = _members(connection, group, may)
            names.sort(key=lambda name: name not in there)
            whole = {"id": f"f{secrets.token_hex(8)}", "group": group, "subject": subject, "created": time.time()}
            whole |= {"ttl_s": ttl_s, "at_once": at_once, "idempotency_key": idempotency_key or None}
            connection.execute(fanouts.insert().values(**whole))
            children = [new(name, kind, body, subject, roles, idempotency_key, ttl_s) for name in names]
            for n, child in enumerate(children):
                child |= {"fanout": whole["id"], "held": 0 < at_once <= n}
            try:
                connection.execute(jobs.insert(), children)
            except sa.exc.IntegrityError:
                said = "a device of the group has another job of that idempotency key"
                raise Refused(409, said, "use a new key") from None
            told = {"group": group, "fanout": whole["id"], "devices": len(names)}
            audit.append(connection, subject, f"run:{kind.value}", told)
            return str(whole["id"]), [child for child in children if not child["held"]]

        made, first = await self._db.write(change)
        self._holding = True
        for child in first:
            await self._send(child["device"], wire(child))
        return await self.get(made)

    async def get(
        self, fanout: str, after: str = "", limit: int = 1000, only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """How its children fare: how many by state, and each by its device's name past `after`. Raises Refused 404.

        `only` of these devices, if given.
        """
        columns = [jobs.c[name] for name in _SHOWN]
        mine = sa.and_(jobs.c.fanout == fanout, sa.true() if only is None else among(jobs.c.device, only))
        page = sa.select(*columns).where(mine, jobs.c.device > after)
        counts = sa.select(jobs.c.state, jobs.c.held, sa.func.count().label("n")).where(mine)

        def look(connection: sa.Connection) -> dict[str, Any]:
            whole = _row(connection, fanout)
            states: dict[str, int] = {}
            for row in connection.execute(counts.group_by(jobs.c.state, jobs.c.held)):
                name = "held" if row.held else row.state
                states[name] = states.get(name, 0) + row.n
            children = connection.execute(page.order_by(jobs.c.device).limit(limit))
            return row_dict(whole) | {"states": states, "jobs": [row_dict(row) for row in children]}

        return await self._db.read(look)

    async def cancel(
        self, fanout: str, by: str, may: Callable[[str], bool], only: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Cancel every child that has not ended; of these devices `only` the answer tells, if given.

        Raises Refused 403 (a device of any child on which `by` may not), 404.
        """

        def change(connection: sa.Connection) -> list[dict[str, Any]]:
            _row(connection, fanout)
            mine = jobs.c.fanout == fanout
            _require(connection.execute(sa.select(jobs.c.device).where(mine)).scalars().all(), may)
            rows = connection.execute(sa.select(*_SMALL).where(mine, jobs.c.state.in_(_OPEN))).all()
            audit.append(connection, by, "cancel:fanout", {"fanout": fanout, "jobs": len(rows)})
            return [take_back(connection, row, by) for row in rows]

        for job in await self._db.write(change):
            await self._jobs.send_cancel(job)
        return await self.get(fanout, only=only)

    async def release(self, there: Collection[str]) -> int:
        """Send held children in the place of those that ended or were cancelled. How many were sent."""
        if not self._holding:
            return 0

        def change(connection: sa.Connection) -> list[dict[str, Any]] | None:
            holding = sa.select(fanouts).where(fanouts.c.id.in_(sa.select(jobs.c.fanout).where(_HELD)))
            wholes, released = connection.execute(holding).all(), list[dict[str, Any]]()
            for whole in wholes:
                mine = jobs.c.fanout == whole.id
                out = sa.select(sa.func.count()).select_from(jobs).where(mine, _OUT)
                room = whole.at_once - (connection.execute(out).scalar() or 0)
                if room <= 0:
                    continue
                held = connection.execute(
                    sa.select(jobs.c.id, jobs.c.device, jobs.c.created).where(mine, _HELD).order_by(jobs.c.device)
                ).all()
                alike = row_dict(connection.execute(sa.select(jobs).where(mine, _HELD).limit(1)).one())
                for row in sorted(held, key=lambda row: row.device not in there)[:room]:
                    values = {"held": False, "expires": time.time() + whole.ttl_s}
                    connection.execute(jobs.update().where(jobs.c.id == row.id).values(**values))
                    released.append(alike | row._asdict() | values)
            return released if wholes else None

        released = await self._db.write(change)
        self._holding = released is not None
        for job in released or ():
            await self._send(job["device"], wire(job))
        return len(released or ())


def _row(connection: sa.Connection, fanout: str) -> sa.Row[Any]:
    row = connection.execute(sa.select(fanouts).where(fanouts.c.id == fanout)).first()
    if row is None:
        raise Refused(404, f"no fan-out {fanout}", "POST /v1/groups/{group}/jobs makes one")
    return row


def _same(
    connection: sa.Connection, group: str, key: str, kind: JobKind, body: dict[str, Any], subject: str
) -> str | None:
    query = sa.select(fanouts.c.id).where(fanouts.c.group == group, fanouts.c.idempotency_key == key)
    known = connection.execute(query).scalar() if key else None
    if known is None:
        return None
    child = connection.execute(sa.select(jobs).where(jobs.c.fanout == known).limit(1)).first()
    if child is None or (child.kind, child.body, child.subject) != (kind.value, body, subject):
        raise Refused(409, "the idempotency key was used for another job", "use a new key for new work")
    return str(known)


def _members(connection: sa.Connection, group: str, may: Callable[[str], bool]) -> list[str]:
    rows = connection.execute(sa.select(devices.c.name, devices.c.labels).where(devices.c.revoked.is_(None)))
    names = sorted(row.name for row in rows if group in row.labels.get("groups", ()))
    if not names:
        raise Refused(404, f"no device is in the group {group}", "outrider rollout label DEVICE --group GROUP")
    if len(names) > MAX_FANOUT:
        raise Refused(413, f"{len(names)} devices are in {group}", f"at most {MAX_FANOUT}: make smaller groups")
    _require(names, may)
    waiting = sa.select(jobs.c.device).where(jobs.c.state == JobState.QUEUED.value).group_by(jobs.c.device)
    full = set(connection.execute(waiting.having(sa.func.count() >= MAX_OPEN)).scalars()).intersection(names)
    if full:
        raise Refused(429, f"{min(full)} has {MAX_OPEN} jobs waiting", "wait until it takes some", retry_after_s=60)
    return names


def _require(names: Collection[str], may: Callable[[str], bool]) -> None:
    if forbidden := sum(not may(name) for name in names):
        said = f"you may not run jobs on {forbidden} of the {len(names)} devices"
        raise Refused(403, said, "ask an admin, give a smaller group, or cancel the jobs one by one")
