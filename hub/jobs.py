"""Work for devices: `queued → delivered → running → succeeded | failed | rejected | expired | cancelled`.

Invariants: a job is stored before it is sent; it is sent again, with the same id, while it is queued, and the device
does it once; its state moves only along `JOB_TRANSITIONS`, so a late or doubled report changes nothing; the same
idempotency key gives the same job. A job nobody confirmed past its expiry is shown as expired, but that is the hub's
guess: what the device then reports of it counts.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire.errors import Undecodable
from edge_agent.wire.messages import JOB_TRANSITIONS, TERMINAL, Job, JobKind, JobReport, JobState, check_depth
from hub import audit
from hub.db import Database, devices, jobs, row_dict
from hub.errors import Refused

DEFAULT_TTL_S = 3600.0
MAX_TTL_S = 30 * 86400.0
MAX_BODY = 64 * 1024
MAX_TEXT = 2000  # characters of a task: a device takes no longer one
MAX_OPEN = 1000  # jobs a device may have waiting
UNCONFIRMED = "no device confirmed it in time"
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
    state = JobState.QUEUED if row.error == UNCONFIRMED else JobState(row.state)
    if report.state not in JOB_TRANSITIONS[state]:
        return False
    values: dict[str, Any] = {
        "state": report.state.value,
        "updated": time.time(),
        "error": report.error.replace("\0", "")[:4000],
    }
    if report.state in TERMINAL:
        values["result"] = report.result
    connection.execute(jobs.update().where(jobs.c.id == report.id).values(**values))
    return True


class Jobs:
    """Creating, sending and showing jobs; `send` publishes one, signed, with its expiry."""

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
        if not 0 < ttl_s <= MAX_TTL_S:
            raise Refused(422, f"ttl_s {ttl_s:g} is out of range", f"0 to {MAX_TTL_S:g} seconds")
        if len(idempotency_key) > 128 or "\0" in idempotency_key:
            raise Refused(422, "the idempotency key is too long", "at most 128 characters")
        _check_body(kind, body)
        now = time.time()
        values = {
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
            "idempotency_key": idempotency_key or None,
            "result": {},
            "error": "",
        }

        def change(connection: sa.Connection) -> tuple[dict[str, Any], bool]:
            if known := _same_job(connection, values):
                return known, False
            _check_room(connection, device)
            connection.execute(jobs.insert().values(**values))
            audit.append(connection, subject, f"run:{kind.value}", {"device": device, "job": values["id"]})
            return values, True

        job, created = await self._db.write(change)
        if created:
            await self._send(device, _wire(job))
        return job

    async def get(self, job_id: str) -> dict[str, Any]:
        """One job. Raises Refused 404."""
        row = await self._db.read(lambda c: c.execute(sa.select(jobs).where(jobs.c.id == job_id)).first())
        if row is None:
            raise Refused(404, f"no job {job_id}", "see GET /v1/jobs")
        return row_dict(row)

    async def list(self, device: str | None = None, state: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
        """Newest first."""
        query = sa.select(jobs).order_by(jobs.c.created.desc(), jobs.c.id).limit(limit)
        if device is not None:
            query = query.where(jobs.c.device == device)
        if state is not None:
            query = query.where(jobs.c.state == state)
        return [row_dict(row) for row in await self._db.read(lambda c: c.execute(query).all())]

    async def send_queued(self, device: str) -> int:
        """Send again what the device has not confirmed, oldest first. How many were sent."""
        queued = sa.select(jobs).where(
            jobs.c.device == device, jobs.c.state == JobState.QUEUED.value, jobs.c.expires > time.time()
        )
        rows = await self._db.read(lambda c: c.execute(queued.order_by(jobs.c.created).limit(100)).all())
        for row in rows:
            await self._send(device, _wire(row_dict(row)))
        return len(rows)

    async def waiting(self) -> set[str]:
        """The devices that have not confirmed something."""
        queued = sa.select(jobs.c.device).where(jobs.c.state == JobState.QUEUED.value).distinct()
        return set(await self._db.read(lambda c: c.execute(queued).scalars().all()))

    async def expire(self) -> None:
        """Mark queued jobs past their expiry."""
        now = time.time()
        overdue = jobs.update().where(jobs.c.state == JobState.QUEUED.value, jobs.c.expires < now)
        values = {"state": JobState.EXPIRED.value, "updated": now, "error": UNCONFIRMED}
        await self._db.write(lambda c: c.execute(overdue.values(**values)))


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


def _wire(job: dict[str, Any]) -> Job:
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
