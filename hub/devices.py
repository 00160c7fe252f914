"""Enrolment and the list of devices.

Invariants: an enrolment token is single-use, kept only as a hash and expires; a name belongs to the first key that
enrolled with it, and another key takes it over only with a token made for that name, which is audited; certificates
are for the enrolled key and each is on record; a revoked device has a key that nobody holds, so that nothing signed
for it counts, and its certificates are on the broker's list; what is shown as online has proven it (see `liveness`).
"""

import hashlib
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from edge_agent.sync.https import MARK
from edge_agent.wire.messages import Presence
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import check_name
from hub import audit
from hub.ca import Authority
from hub.db import Database, certificates, devices, enrolments, row_dict
from hub.errors import Refused
from hub.liveness import Heard, Liveness

MAX_TOKEN_LIFETIME_S = 30 * 86400.0
KEPT_S = 366 * 86400.0  # a certificate that has run out, to say so


class Devices:
    """Enrolment, certificates, list and detail, presence."""

    def __init__(self, db: Database, authority: Authority, ca: str = "") -> None:
        self._db = db
        self._authority = authority
        self.fleet = authority.fleet
        self.ca = ca
        self.liveness = Liveness()
        self.doubled = 0  # records that came again and were skipped, since this process started

    async def create_enrolment(self, by: str, name: str | None = None, ttl_s: float = 3600.0) -> str:
        """A single-use token for one device, of the given name if there is one.

        It carries the fingerprint `ca`, if there is one, of the CA of the hub's HTTPS: whom the device is to believe.
        """
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
        return token + MARK + self.ca if self.ca else token

    async def enrol(self, token: str, name: str, public_key: str, csr: str = "") -> str:
        """Bind a name to a key: its certificate chain when a CSR came.

        Raises:
            Refused: 403 for an unknown or expired token or another name's, 409 for a used one or a taken name, 422.
        """
        token = token.partition(MARK)[0]
        _checked(name)
        try:
            VerifyKey.from_text(public_key)
        except ValueError as error:
            raise Refused(422, f"public_key: {error}", "send the device's Ed25519 public key as base64url") from None

        def change(connection: sa.Connection) -> str:
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
                _void(connection, name, now)
                values = {"public_key": public_key, "enrolled": now, "revoked": None}
                connection.execute(devices.update().where(devices.c.name == name).values(**values))
                audit.append(connection, name, "rekey:device", {"old": known, "new": public_key})
            audit.append(connection, name, "enrol:device", {"public_key": public_key})
            return self._certify(connection, csr, name, public_key) if csr else ""

        return await self._db.write(change)

    async def renew(self, name: str, csr: str) -> str:
        """A new certificate chain for the enrolled key. Raises Refused 404, 422."""
        key = (await self.row(name)).public_key
        return await self._db.write(lambda c: self._certify(c, csr, name, key))

    def _certify(self, connection: sa.Connection, csr: str, name: str, public_key: str) -> str:
        made = self._authority.certify(csr, name, public_key)
        expires = made.not_valid_after_utc.timestamp()
        connection.execute(certificates.delete().where(certificates.c.expires < time.time() - KEPT_S))
        row = {"serial": f"{made.serial_number:x}", "device": name, "expires": expires}
        connection.execute(certificates.insert().values(**row))
        audit.append(connection, name, "issue:certificate", {"serial": row["serial"], "expires": expires})
        return self._authority.chain(made)

    async def revoke(self, name: str, by: str) -> None:
        """Void a device's key and certificates. A token made for its name lets it enrol again. Raises Refused 404."""

        def change(connection: sa.Connection) -> None:
            nobodys, now = SigningKey.generate().public.text, time.time()
            done = devices.update().where(devices.c.name == name).values(public_key=nobodys, revoked=now)
            if connection.execute(done).rowcount == 0:
                raise Refused(404, f"no device {name}", "see GET /v1/devices")
            _void(connection, name, now)
            audit.append(connection, by, "revoke:device", {"device": name})

        await self._db.write(change)

    async def void(self) -> tuple[list[tuple[str, float]], list[str]]:
        """What a broker must refuse: serials of revoked certificates and when each was, names of revoked devices."""
        serials = sa.select(certificates.c.serial, certificates.c.revoked).where(certificates.c.revoked.is_not(None))
        names = sa.select(devices.c.name).where(devices.c.revoked.is_not(None))

        def look(connection: sa.Connection) -> tuple[list[tuple[str, float]], list[str]]:
            listed = connection.execute(serials.order_by(certificates.c.serial)).all()
            return [(row.serial, row.revoked) for row in listed], list(connection.execute(names).scalars())

        return await self._db.read(look)

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
        rows = await self._db.read(lambda c: c.execute(_WITH_CERTIFICATE.order_by(devices.c.name)).all())
        return [self._show(row) for row in rows]

    async def names(self) -> Sequence[str]:
        return await self._db.read(lambda c: c.execute(sa.select(devices.c.name)).scalars().all())

    async def get(self, name: str) -> dict[str, Any]:
        """One device. Raises Refused 404."""
        return self._show(await self.row(name))

    async def row(self, name: str) -> sa.Row[Any]:
        query = _WITH_CERTIFICATE.where(devices.c.name == name)
        row = await self._db.read(lambda c: c.execute(query).first())
        if row is None:
            raise Refused(404, f"no device {name}", "see GET /v1/devices")
        return row

    async def rows(self, names: set[str]) -> dict[str, Any]:
        """Those of these devices that there are: name, public key, epoch and watermark."""
        columns = (devices.c.name, devices.c.public_key, devices.c.epoch, devices.c.watermark)
        query = sa.select(*columns).where(devices.c.name.in_(names))
        return {row.name: row for row in await self._db.read(lambda c: c.execute(query).all())}

    async def heard(self, presences: Sequence[tuple[str, Presence]], received: float) -> Sequence[tuple[str, Heard]]:
        """Take note of presences whose signatures were checked. A fresh one also tells the clock's offset."""
        told, values = list[tuple[str, Heard]](), list[dict[str, Any]]()
        for name, presence in presences:
            heard = self.liveness.heard(name, presence, time.monotonic())
            told.append((name, heard))
            if heard in (Heard.FRESH, Heard.BACK):
                offset, agent = presence.ts - received, presence.agent.replace("\0", "")[:64]
                values.append({"of": name, "last_seen": received, "clock_offset_s": offset, "agent": agent})
        if values:
            columns: dict[str, Any] = {each: sa.bindparam(each) for each in ("last_seen", "clock_offset_s", "agent")}
            update = devices.update().where(devices.c.name == sa.bindparam("of")).values(**columns)
            await self._db.write(lambda c: c.execute(update, values))
        return told

    def online(self, name: str) -> bool:
        return self.liveness.online(name, time.monotonic())

    def _show(self, row: sa.Row[Any]) -> dict[str, Any]:
        device = row_dict(row)
        age = None if device["last_seen"] is None else max(0.0, time.time() - device["last_seen"])
        bundles = device["desired"].get("bundles", {})
        state, reason = self.liveness.state(row.name, time.monotonic())
        if device["revoked"] is not None:
            state, reason = "offline", "revoked"
        elif state != "online" and (device["certificate_expires"] or math.inf) < time.time():
            reason = "certificate expired"
        elif state == "offline" and device["last_seen"] is None:
            reason = "never heard"
        told = {"online": state == "online", "state": state, "reason": reason, "heartbeat_age_s": age}
        return device | told | {"bundles": bundles}


_EXPIRES = sa.select(sa.func.max(certificates.c.expires)).where(
    certificates.c.device == devices.c.name, certificates.c.revoked.is_(None)
)
_WITH_CERTIFICATE = sa.select(devices, _EXPIRES.scalar_subquery().label("certificate_expires"))


def _void(connection: sa.Connection, device: str, now: float) -> None:
    good = sa.and_(certificates.c.device == device, certificates.c.revoked.is_(None))
    connection.execute(certificates.update().where(good).values(revoked=now))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _checked(name: str) -> None:
    try:
        check_name(name, "device")
    except ValueError as error:
        raise Refused(422, str(error), "such as press-7") from None
