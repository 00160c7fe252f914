"""Enrolment and the list of devices.

Invariants: an enrolment token is single-use, kept only as a hash and expires; a name belongs to the first key that
enrolled with it, and another key takes it over only with a token made for that name, which is audited; what is shown
as online has proven it (see `liveness`).
"""

import hashlib
import secrets
import time
from typing import Any

import sqlalchemy as sa

from edge_agent.wire.messages import Presence
from edge_agent.wire.signing import VerifyKey
from edge_agent.wire.topics import check_name
from hub import audit
from hub.db import Database, devices, enrolments, row_dict
from hub.errors import Refused
from hub.liveness import Heard, Liveness

MAX_TOKEN_LIFETIME_S = 30 * 86400.0


class Devices:
    """Enrolment, list and detail, presence."""

    def __init__(self, db: Database, fleet: str) -> None:
        self._db = db
        self.fleet = fleet
        self.liveness = Liveness()
        self.doubled = 0  # records that came again and were skipped, since this process started

    async def create_enrolment(self, by: str, name: str | None = None, ttl_s: float = 3600.0) -> str:
        """A single-use token for one device, of the given name if there is one."""
        if name is not None:
            _checked(name)
        if not 0 < ttl_s <= MAX_TOKEN_LIFETIME_S:
            raise Refused(422, f"ttl_s {ttl_s:g} is out of range", f"0 to {MAX_TOKEN_LIFETIME_S:g} seconds")
        token, now = secrets.token_urlsafe(24), time.time()
        row = {"token_hash": _hash(token), "name": name, "created_by": by, "created": now, "expires": now + ttl_s}

        def change(connection: sa.Connection) -> None:
            connection.execute(enrolments.delete().where(enrolments.c.expires < now - MAX_TOKEN_LIFETIME_S))
            connection.execute(enrolments.insert().values(**row))
            audit.append(connection, by, "create:enrolment", {"name": name, "expires": now + ttl_s})

        await self._db.write(change)
        return token

    async def enrol(self, token: str, name: str, public_key: str) -> None:
        """Bind a name to a key.

        Raises:
            Refused: 403 for an unknown or expired token or another name's, 409 for a used one or a taken name, 422.
        """
        _checked(name)
        try:
            VerifyKey.from_text(public_key)
        except ValueError as error:
            raise Refused(422, f"public_key: {error}", "send the device's Ed25519 public key as base64url") from None

        def change(connection: sa.Connection) -> None:
            now = time.time()
            named = self._use_token(connection, token, name, now)
            known = connection.execute(sa.select(devices.c.public_key).where(devices.c.name == name)).scalar()
            if known is None:
                row = {"name": name, "public_key": public_key, "enrolled": now, "desired": {}, "reported": {}}
                connection.execute(devices.insert().values(**row))
            elif known != public_key:
                if not named:
                    hint = f"choose another name, or replace the device: outrider hub enrol-token --name {name}"
                    raise Refused(409, f"the name {name} belongs to another key", hint)
                changed = devices.update().where(devices.c.name == name).values(public_key=public_key, enrolled=now)
                connection.execute(changed)
                audit.append(connection, name, "rekey:device", {"old": known, "new": public_key})
            audit.append(connection, name, "enrol:device", {"public_key": public_key})

        await self._db.write(change)

    def _use_token(self, connection: sa.Connection, token: str, name: str, now: float) -> bool:
        """Whether the token was made for this very name."""
        known = sa.select(enrolments).where(enrolments.c.token_hash == _hash(token)).with_for_update()
        row = connection.execute(known).first()
        if row is None:
            raise Refused(403, "the enrolment token is not known", "make one: outrider hub enrol-token")
        if row.used is not None:
            raise Refused(409, f"the enrolment token was used by {row.used_by}", "a token is good once: make a new one")
        if row.expires < now:
            raise Refused(403, "the enrolment token has expired", "make a new one: outrider hub enrol-token")
        if row.name not in (None, name):
            raise Refused(403, f"the enrolment token is for the name {row.name}", f"enrol as {row.name}")
        used = enrolments.update().where(enrolments.c.token_hash == _hash(token))
        connection.execute(used.values(used=now, used_by=name))
        return row.name is not None

    async def list(self) -> list[dict[str, Any]]:
        """Every device, by name."""
        rows = await self._db.read(lambda c: c.execute(sa.select(devices).order_by(devices.c.name)).all())
        return [self._show(row) for row in rows]

    async def get(self, name: str) -> dict[str, Any]:
        """One device. Raises Refused 404."""
        return self._show(await self.row(name))

    async def row(self, name: str) -> sa.Row[Any]:
        query = sa.select(devices).where(devices.c.name == name)
        row = await self._db.read(lambda c: c.execute(query).first())
        if row is None:
            raise Refused(404, f"no device {name}", "see GET /v1/devices")
        return row

    async def heard(self, name: str, presence: Presence, received: float) -> Heard:
        """Take note of a presence whose signature was checked. A fresh one also tells the clock's offset."""
        heard = self.liveness.heard(name, presence, time.monotonic())
        if heard in (Heard.FRESH, Heard.BACK):
            values = {
                "last_seen": received,
                "clock_offset_s": presence.ts - received,
                "agent": presence.agent.replace("\0", "")[:64],
            }
            await self._db.write(lambda c: c.execute(devices.update().where(devices.c.name == name).values(**values)))
        return heard

    def online(self, name: str) -> bool:
        return self.liveness.online(name, time.monotonic())

    def _show(self, row: sa.Row[Any]) -> dict[str, Any]:
        device = row_dict(row)
        age = None if device["last_seen"] is None else max(0.0, time.time() - device["last_seen"])
        bundles = device["desired"].get("bundles", {})
        return device | {"online": self.online(row.name), "heartbeat_age_s": age, "bundles": bundles}


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _checked(name: str) -> None:
    try:
        check_name(name, "device")
    except ValueError as error:
        raise Refused(422, str(error), "such as press-7") from None
