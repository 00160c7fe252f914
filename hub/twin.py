"""Desired and reported documents of devices.

Invariants: a desired document is at most 32 KiB and its version only grows, that of what the broker retains too; one
that could not be published is published again; a reported document is replaced only from a record the ingest accepts
once and in order, so it never goes back.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire.bundle import Directive, Manifest, Sealed, Target, open_directive, seal_directive
from edge_agent.wire.errors import Undecodable
from edge_agent.wire.messages import TWIN_LIMIT, Desired, check_depth, merge_patch
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.updates import Updates
from hub import audit
from hub.db import Database, devices
from hub.errors import Refused

Send = Callable[[str, Desired], Awaitable[bool]]
Patch = dict[str, Any] | Callable[[sa.Row[Any]], dict[str, Any]]
"""A merge patch, or what makes one of the device's row."""
_ELSEWHERE = {
    "director": "outrider hub assign signs it",
    "bundles": "outrider hub assign DEVICE NAME VERSION",
    "updates": "PATCH /v1/devices/{device}/updates",
    "activation": "PATCH /v1/devices/{device}/updates",
}


def apply_reported(connection: sa.Connection, device: str, body: dict[str, Any]) -> None:
    """Take the body of a `reported` record: the whole document, alone or under `doc`."""
    document, version = body["doc"] if isinstance(body.get("doc"), dict) else body, body.get("version")
    if len(msgspec.json.encode(document)) <= TWIN_LIMIT:
        values = {"reported": document}
        if isinstance(version, int) and 0 <= version < 1 << 63:
            values["reported_version"] = version
        connection.execute(devices.update().where(devices.c.name == device).values(**values))


def free(patch: dict[str, Any]) -> dict[str, Any]:
    """A patch that anybody who may configure a device may make. Raises Refused 422 for what other routes make."""
    for taken, route in _ELSEWHERE.items():
        if taken in patch:
            raise Refused(422, f"{taken!r} of the desired document is not changed here", route)
    return patch


def patch_desired(
    connection: sa.Connection, device: str, patch: Patch, by: str, action: str, expected: int | None = None
) -> Desired:
    """Merge into the device's desired document, to be sent.

    Raises Refused 404, 412 (it is not at the expected version), 413 (size), 422 (depth, rules for updates).
    """
    row = connection.execute(sa.select(devices).where(devices.c.name == device).with_for_update()).first()
    if row is None:
        raise Refused(404, f"no device {device}", "see GET /v1/devices")
    if expected not in (None, row.desired_version):
        hint = f'look at it, and send If-Match: "{row.desired_version}"'
        raise Refused(412, f"the desired document is at version {row.desired_version}, not {expected}", hint)
    given = patch(row) if callable(patch) else patch
    try:
        check_depth(given)
    except Undecodable as error:
        raise Refused(422, f"the desired document is refused: {error}", "flatten it") from None
    document = merge_patch(row.desired, given)
    try:
        msgspec.convert({name: document[name] for name in given if name in document}, Updates)
    except msgspec.ValidationError as error:
        raise Refused(422, f"no device takes these rules for updates: {error}", "see docs/updates.md") from None
    if len(msgspec.json.encode(document)) > TWIN_LIMIT:
        raise Refused(413, f"the desired document of {device} would pass {TWIN_LIMIT} bytes", "remove something")
    values = {"desired": document, "desired_version": row.desired_version + 1}
    connection.execute(devices.update().where(devices.c.name == device).values(**values))
    audit.append(connection, by, action, {"device": device, "patch": given})
    return Desired(version=row.desired_version + 1, ts=time.time(), doc=document)


def direction(key: SigningKey, fleet: str, name: str, manifest: Manifest | None, target: Target | None) -> Patch:
    """A patch that directs a device to a version of a bundle, or to none; it raises Refused 409 for other hardware."""

    def direct(row: sa.Row[Any]) -> dict[str, Any]:
        agent = row.reported.get("agent")
        hardware = str(agent.get("machine", "")) if isinstance(agent, dict) else ""  # whatever a device put there
        if manifest and hardware and manifest.hardware and hardware not in manifest.hardware:
            need = f"{name} {manifest.version} is for {', '.join(manifest.hardware)}"
            raise Refused(409, f"{need}, {row.name} is {hardware}", "assign a version for its hardware")
        before = row.desired.get("director")
        known = open_directive(key.public, msgspec.convert(before, Sealed)) if before else None
        bundles = dict(known.bundles) if known else {}
        bundles.pop(name, None)
        bundles |= {name: target} if target else {}
        counter = known.counter + 1 if known else 1
        sealed = seal_directive(key, Directive(fleet, row.name, hardware, counter, time.time(), bundles))
        patch: dict[str, Any] = msgspec.to_builtins({"bundles": {name: None} | bundles, "director": sealed})
        return patch

    return direct


class Twin:
    """Changing desired documents; the given `send` publishes one, signed and retained, and says whether it could."""

    def __init__(self, db: Database, send: Send) -> None:
        self._db, self._send = db, send
        self._published: dict[str, int] = {}  # the newest version, by device
        self._owed: set[str] = set()  # devices that could not be told

    async def patch_desired(
        self, device: str, patch: Patch, by: str, action: str = "patch:desired", expected: int | None = None
    ) -> Desired:
        """`patch_desired` above, and publish it."""
        desired = await self._db.write(lambda c: patch_desired(c, device, patch, by, action, expected))
        await self.send(device, desired)
        return desired

    async def send(self, device: str, desired: Desired) -> None:
        """Publish it, unless a newer one went out since it was read: the broker would retain the older one."""
        if desired.version >= self._published.get(device, 0):
            self._published[device] = desired.version
            (self._owed.discard if await self._send(device, desired) else self._owed.add)(device)

    async def send_owed(self) -> None:
        """Tell those that could not be told, while the connection stood: no other comes to tell them."""
        if self._owed:
            await self.send_all(devices.c.name.in_(sorted(self._owed)[:500]))

    async def send_all(self, which: sa.ColumnElement[bool] = devices.c.desired_version > 0) -> None:
        """Publish every desired document again: a broker that forgot its retained messages gets them back."""
        query = sa.select(devices.c.name, devices.c.desired_version, devices.c.desired)
        rows = await self._db.read(lambda c: c.execute(query.where(which)).all())
        for row in rows:
            await self.send(row.name, Desired(version=row.desired_version, ts=time.time(), doc=row.desired))
