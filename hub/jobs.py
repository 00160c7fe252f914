"""Work for devices: `queued → delivered → running → succeeded | failed | rejected | expired | cancelled`.

Invariants: a job is stored before it is sent; it is sent again, with the same id, while it is queued, and the device
does it once; its state moves only along `JOB_TRANSITIONS`, so a late or doubled report changes nothing; the same
idempotency key gives the same job. A job nobody confirmed past its expiry is shown as expired, so is one of which its
device told nothing for GRACE_S past that, and one that was cancelled before anybody confirmed it as cancelled, but that
is the hub's guess: what the device then reports of it counts. Of a fan-out at most `at_once` jobs are with their
devices; the others are held here, where their time does not run and from where they can be taken back for certain.
"""

import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire.errors import Undecodable
from edge_agent.wire.messages import JOB_TRANSITIONS, TERMINAL, Job, JobKind, JobReport, JobState, check_depth
from hub import audit
from hub.db import Database, among, devices, jobs, row_dict
from hub.errors import Refused

DEFAULT_TTL_S = 3600.0
MAX_TTL_S = 30 * 86400.0
MAX_BODY = 64 * 1024
MAX_TEXT = 2000  # characters of a task: a device takes no longer one
MAX_OPEN = 1000  # jobs a device may have waiting
UNCONFIRMED = "no device confirmed it in time"
WITHDRAWN = "cancelled before a device confirmed it"
SILENT = "its device took it and then told nothing more of it"
_GUESSED = {UNCONFIRMED: JobState.QUEUED, WITHDRAWN: JobState.QUEUED, SILENT: JobState.DELIVERED}  # where reports go on
GRACE_S = 86400.0  # of silence past its expiry: an outage, an approval that is waited for
CANCEL_TTL_S = 3600.0  # at least; then the cancellation is sent again
MAX_FANOUT = 10_000  # devices
Send = Callable[[str, Job], Awaitable[object]]


def apply_report(connection: sa.Connection, device: str, body: dict[str, Any]) -> bool:
    """Take the body of a `job` record. False when it changes nothing: late, doubled, unknown or not a report."""
    try:
        report = msgspec.convert(body, JobReport)
    except msgspec.ValidationError:
        return False
    query = sa.select(jobs.c.state, jobs.c.error).where(jobs.c.id == report.id, jobs.c.device == device)
    row = connection.execute(query.with_for_update()).first()
    if row is None:
        return False
    this, told = jobs.update().where(jobs.c.id == report.id), dict[str, Any]()
    if report.progress is not msgspec.UNSET:
        progress = msgspec.structs.replace(report.progress, text=report.progress.text.replace("\0", "")[:200])
        told["progress"] = msgspec.to_builtins(progress)
    state = _GUESSED.get(row.error, JobState(row.state))
    if told and report.state is JobState.RUNNING is state:
        connection.execute(this.values(updated=time.time(), **told))
        return True
    if report.state not in JOB_TRANSITIONS[state]:
        return False
    values: dict[str, Any] = told | {
        "state": report.state.value,
        "updated": time.time(),
        "error": report.error.replace("\0", "")[:4000],
    }
    if report.state in TERMINAL:
        values["result"] = report.result
    connection.execute(this.values(**values))
    return True


class Jobs:
    """Creating, sending, cancelling and showing jobs; `send` publishes one, signed, with its expiry."""

    def __init__(self, db: Database, send: Send) -> None:
        self._db = db
        self._send = send

    async def create(
        self,
        device: str,
        kind: JobKind,
        body: dict[str, Any],
        *,
        subject: str,
        roles: list[str],
        idempotency_key: str = "",
        ttl_s: float = DEFAULT_TTL_S,
    ) -> dict[str, Any]:
        """Store and send a job. Raises Refused 404, 409 (key used for something else), 413, 422, 429."""
        check(kind, body, idempotency_key, ttl_s)
        values = new(device, kind, body, subject, roles, idempotency_key, ttl_s)

        def change(connection: sa.Connection) -> tuple[dict[str, Any], bool]:
            if known := _same_job(connection, values):
                return known, False
            _check_room(connection, device)
            connection.execute(jobs.insert().values(**values))
            audit.append(connection, subject, f"run:{kind.value}", {"device": device, "job": values["id"]})
            return values, True

        job, created = await self._db.write(change)
        if created:
            await self._send(device, wire(job))
        return job

    async def cancel(self, job_id: str, by: str) -> dict[str, Any]:
        """Take a job back, or have its device end it. Raises Refused 404, 409 (it has ended)."""

        def change(connection: sa.Connection) -> dict[str, Any]:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).first()
            if row is None:
                raise Refused(404, f"no job {job_id}", "see GET /v1/jobs")
            if JobState(row.state) in TERMINAL and not row.cancelled_by:
                raise Refused(409, f"the job has {row.state} already", "there is nothing left to cancel")
            audit.append(connection, by, "cancel:job", {"device": row.device, "job": row.id, "was": row.state})
            return take_back(connection, row, by)

        job = await self._db.write(change)
        await self.send_cancel(job)
        return job

    async def send_cancel(self, job: dict[str, Any]) -> None:
        """Tell the device, if it may have the job."""
        if JobState(job["state"]) not in TERMINAL or job["error"] in _GUESSED:
            now = time.time()
            until, who = max(job["expires"], now + CANCEL_TTL_S), job["cancelled_by"]
            told = Job(f"cancel-{job['id']}", JobKind.CANCEL, {"job": job["id"]}, who, [], now, until)
            await self._send(job["device"], told)

    async def get(self, job_id: str) -> dict[str, Any]:
        """One job. Raises Refused 404."""
        row = await self._db.read(lambda c: c.execute(sa.select(jobs).where(jobs.c.id == job_id)).first())
        if row is None:
            raise Refused(404, f"no job {job_id}", "see GET /v1/jobs")
        return row_dict(row)

    async def list(
        self,
        device: str | None = None,
        state: str | None = None,
        limit: int = 100,
        only: Collection[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Newest first; `only` of these devices, if given."""
        query = sa.select(jobs).order_by(jobs.c.created.desc(), jobs.c.id).limit(limit)
        if only is not None:
            query = query.where(among(jobs.c.device, only))
        if device is not None:
            query = query.where(jobs.c.device == device)
        if state is not None:
            query = query.where(jobs.c.state == state)
        return [row_dict(row) for row in await self._db.read(lambda c: c.execute(query).all())]

    async def send_queued(self, device: str) -> int:
        """Send again what the device has not confirmed, oldest first, cancellations too. How many were sent."""
        good = jobs.c.expires > time.time()
        queued = sa.and_(jobs.c.state == JobState.QUEUED.value, good, jobs.c.held.is_(False))
        taken_back = sa.and_(jobs.c.state == JobState.CANCELLED.value, jobs.c.error == WITHDRAWN, good)
        given_up = sa.and_(jobs.c.error == SILENT, jobs.c.cancelled_by.is_not(None))  # its device may be back with it
        mine = sa.select(jobs).where(jobs.c.device == device, sa.or_(queued, taken_back, given_up, _ENDING))
        rows = await self._db.read(lambda c: c.execute(mine.order_by(jobs.c.created).limit(100)).all())
        for job in map(row_dict, rows):
            await (self.send_cancel(job) if job["cancelled_by"] else self._send(device, wire(job)))
        return len(rows)

    async def waiting(self) -> set[str]:
        """The devices that have not confirmed something."""
        unsent = sa.and_(jobs.c.state == JobState.QUEUED.value, jobs.c.held.is_(False))
        queued = sa.select(jobs.c.device).where(sa.or_(unsent, _ENDING)).distinct()
        return set(await self._db.read(lambda c: c.execute(queued).scalars().all()))

    async def expire(self) -> None:
        """Mark jobs past their expiry: queued ones, and those of whose device nothing more was heard."""
        now = time.time()
        waits = sa.and_(jobs.c.state == JobState.QUEUED.value, jobs.c.held.is_(False), jobs.c.expires < now)
        silent = sa.and_(_TAKEN, jobs.c.expires < now - GRACE_S, jobs.c.updated < now - GRACE_S)

        def change(connection: sa.Connection) -> None:
            for overdue, why in ((waits, UNCONFIRMED), (silent, SILENT)):
                values = {"state": JobState.EXPIRED.value, "updated": now, "error": why}
                connection.execute(jobs.update().where(overdue).values(**values))

        await self._db.write(change)


_TAKEN = jobs.c.state.in_([JobState.DELIVERED.value, JobState.RUNNING.value])
_ENDING = sa.and_(_TAKEN, jobs.c.cancelled_by.is_not(None))


def take_back(connection: sa.Connection, row: sa.Row[Any], by: str) -> dict[str, Any]:
    """The job as it is then: ended where no device can have it, withdrawn where one may, to be ended where one does."""
    job = row_dict(row)
    if JobState(row.state) not in TERMINAL:
        job |= {"cancelled_by": by, "updated": time.time(), "held": False}
        if row.state == JobState.QUEUED:
            why = f"cancelled by {by} before it was sent" if row.held else WITHDRAWN
            job |= {"state": JobState.CANCELLED.value, "error": why}
        connection.execute(jobs.update().where(jobs.c.id == row.id).values(**job))
    return job


def new(
    device: str, kind: JobKind, body: dict[str, Any], subject: str, roles: list[str], key: str, ttl_s: float
) -> dict[str, Any]:
    """The row of a job that nobody has yet."""
    now = time.time()
    return {
        "id": secrets.token_hex(8),
        "device": device,
        "kind": kind.value,
        "body": body,
        "subject": subject,
        "roles": roles,
        "state": JobState.QUEUED.value,
        "created": now,
        "expires": now + ttl_s,
        "updated": now,
        "idempotency_key": key or None,
        "result": {},
        "error": "",
        "cancelled_by": None,
        "progress": None,
        "fanout": None,
        "held": False,
    }


def check(kind: JobKind, body: dict[str, Any], key: str, ttl_s: float) -> None:
    """Raises Refused 413, 422."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise Refused(422, f"ttl_s {ttl_s:g} is out of range", f"0 to {MAX_TTL_S:g} seconds")
    if len(key) > 128 or "\0" in key:
        raise Refused(422, "the idempotency key is too long", "at most 128 characters")
    _check_body(kind, body)


def _check_body(kind: JobKind, body: dict[str, Any]) -> None:
    try:
        check_depth(body)
        size = len(msgspec.json.encode(body))
    except (Undecodable, UnicodeEncodeError) as error:
        hint = "flatten it" if isinstance(error, Undecodable) else "send text that UTF-8 can carry"
        raise Refused(422, f"the job's body is refused: {error}", hint) from None
    if size > MAX_BODY:
        raise Refused(413, "the job is too big", f"at most {MAX_BODY} bytes of JSON")
    if kind is JobKind.TOOL:
        if not isinstance(body.get("tool"), str) or not isinstance(body.get("args", {}), dict):
            raise Refused(422, "the job names no tool or its args are no object", 'body: {"tool": "name", "args": {…}}')
    elif not isinstance(text := body.get("text"), str) or not 0 < len(text) <= MAX_TEXT:
        raise Refused(422, "the task's text is missing or too long", f"write 1 to {MAX_TEXT} characters")


def _same_job(connection: sa.Connection, values: dict[str, Any]) -> dict[str, Any] | None:
    if values["idempotency_key"] is None:
        return None
    query = sa.select(jobs).where(
        jobs.c.device == values["device"], jobs.c.idempotency_key == values["idempotency_key"]
    )
    row = connection.execute(query).first()
    if row is None:
        return None
    known = row_dict(row)
    if any(known[field] != values[field] for field in ("kind", "body", "subject")):
        raise Refused(409, "the idempotency key was used for another job", "use a new key for new work")
    return known


def _check_room(connection: sa.Connection, device: str) -> None:
    if connection.execute(sa.select(devices.c.name).where(devices.c.name == device)).first() is None:
        raise Refused(404, f"no device {device}", "see GET /v1/devices")
    waiting = sa.select(sa.func.count()).select_from(jobs)
    waiting = waiting.where(jobs.c.device == device, jobs.c.state == JobState.QUEUED.value)
    if (connection.execute(waiting).scalar() or 0) >= MAX_OPEN:
        raise Refused(429, f"{device} has {MAX_OPEN} jobs waiting", "wait until it takes some", retry_after_s=60)


def wire(job: dict[str, Any]) -> Job:
    """What the device is sent."""
    return Job(
        id=job["id"],
        kind=JobKind(job["kind"]),
        body=job["body"],
        subject=job["subject"],
        roles=job["roles"],
        created=job["created"],
        expires=job["expires"],
        idempotency_key=job["idempotency_key"] or "",
    )
