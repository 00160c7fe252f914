"""People, their passwords and tokens, and the signed grants that say what a role may do.

Invariants: passwords are kept as argon2id; a token is an `at+jwt` signed by the hub's key; `require` is the same
`allowed` that a device asks, over the same grants; every change of grants has a higher epoch. Guessing is slowed per
client and name with a bounded memory, and an unknown name costs as much time as a wrong password.
"""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from edge_agent.wire import tokens
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed, public_jwk, sign_grants
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import check_name
from hub import audit
from hub.db import Database, settings, users
from hub.errors import Refused

TOKEN_LIFETIME_S = 3600.0
GRANTS_LIFETIME_S = 30 * 86400.0  # a device without network keeps its permissions this long
GRANTS_RENEWAL_S = 86400.0
MIN_PASSWORD = 8
_hasher = PasswordHasher()
_DUMMY_HASH = _hasher.hash(secrets.token_hex(8))


class Backoff:
    """Failed logins per client and name: free tries, then a doubling pause; at most `MAX` remembered."""

    FREE, LONGEST_S, MAX = 5, 300.0, 4096

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until this key may try again."""
        count, since = self._failures.get(key, (0, 0.0))
        if count < self.FREE:
            return 0.0
        return max(0.0, since + min(self.LONGEST_S, 2.0 ** min(count - self.FREE, 16)) - self._clock())

    def failed(self, key: str) -> None:
        count, _ = self._failures.pop(key, (0, 0.0))
        self._failures[key] = (count + 1, self._clock())
        if len(self._failures) > self.MAX:
            self._failures.popitem(last=False)

    def succeeded(self, key: str) -> None:
        self._failures.pop(key, None)


class Auth:
    """Who somebody is and what they may do. `grants` is the current document, `grants_text` its signed form."""

    def __init__(self, db: Database, key: SigningKey) -> None:
        self._db = db
        self._key = key
        self._backoff = Backoff()
        self._hashing = asyncio.Semaphore(2)  # argon2 takes 64 MiB a go
        self.grants: Grants
        self.grants_text = ""

    async def first_admin(self, admin_password: str | None = None) -> str | None:
        """Make the first admin where there is nobody. Returns a generated password, once."""
        generated = None
        if await self._db.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(users)).scalar()) == 0:
            generated = None if admin_password else secrets.token_urlsafe(12)
            await self.add_user("admin", ["admin"], admin_password or generated or "", by="hub")
        return generated

    async def issue_grants(self) -> None:
        """New grants with the next epoch and a fresh hard expiry."""

        def change(connection: sa.Connection) -> Grants:
            query = sa.select(settings.c.value).where(settings.c.key == "grants_epoch").with_for_update()
            epoch = int(connection.execute(query).scalar() or 0) + 1
            connection.execute(settings.delete().where(settings.c.key == "grants_epoch"))
            connection.execute(settings.insert().values(key="grants_epoch", value=str(epoch)))
            revoked = connection.execute(sa.select(users.c.name, users.c.revoked).where(users.c.revoked.is_not(None)))
            now = time.time()
            return Grants(
                epoch=epoch,
                issued_at=now,
                hard_expiry=now + GRANTS_LIFETIME_S,
                roles=SHIPPED_ROLES,
                jwks=[public_jwk(self._key.public)],
                revoked={row.name: row.revoked for row in revoked},
            )

        self.grants = await self._db.write(change)
        self.grants_text = sign_grants(self._key, self.grants)

    async def add_user(self, name: str, roles: list[str], password: str, by: str) -> None:
        """Raises Refused for a bad name, role or password, and 409 when the name is taken."""
        try:
            check_name(name, "user")
        except ValueError as error:
            raise Refused(422, str(error)) from None
        if unknown := sorted(set(roles) - set(SHIPPED_ROLES)):
            raise Refused(422, f"unknown roles {unknown}", f"roles are {', '.join(SHIPPED_ROLES)}")
        if not MIN_PASSWORD <= len(password) <= 1024:
            raise Refused(422, "the password is too short or too long", f"use {MIN_PASSWORD} to 1024 characters")
        async with self._hashing:
            hashed = await asyncio.to_thread(_hasher.hash, password)

        def change(connection: sa.Connection) -> None:
            if connection.execute(sa.select(users.c.name).where(users.c.name == name)).first():
                raise Refused(409, f"user {name} exists", "choose another name")
            row = {"name": name, "password_hash": hashed, "roles": roles, "created": time.time()}
            connection.execute(users.insert().values(**row))
            audit.append(connection, by, "create:user", {"user": name, "roles": roles})

        await self._db.write(change)

    async def users(self) -> list[dict[str, Any]]:
        """Name, roles, created and revoked; never a hash."""
        query = sa.select(users.c.name, users.c.roles, users.c.created, users.c.revoked).order_by(users.c.name)
        return [dict(row) for row in await self._db.read(lambda c: c.execute(query).mappings().all())]

    async def revoke(self, name: str, by: str) -> None:
        """No more logins, and every token issued until now is void here and, with the next grants, on devices."""

        def change(connection: sa.Connection) -> None:
            if name == by:
                raise Refused(409, "you cannot revoke yourself", "ask another admin")
            done = connection.execute(users.update().where(users.c.name == name).values(revoked=time.time()))
            if done.rowcount == 0:
                raise Refused(404, f"no user {name}")
            audit.append(connection, by, "revoke:user", {"user": name})

        await self._db.write(change)
        await self.issue_grants()

    async def login(self, name: str, password: str, client: str) -> tuple[str, float]:
        """An access token and its lifetime in seconds. Raises Refused 401, or 429 after too many failures."""
        keys = (client, f"{client} {name[:64]}")
        query = sa.select(users).where(users.c.name == name[:64], users.c.revoked.is_(None))
        row = await self._db.read(lambda c: c.execute(query).first())
        async with self._hashing:
            if wait := max(self._backoff.wait_s(key) for key in keys):
                seconds = int(wait) + 1
                raise Refused(429, "too many failed logins", f"try again in {seconds} s", retry_after_s=seconds)
            right = await asyncio.to_thread(_password_matches, row.password_hash if row else _DUMMY_HASH, password)
        if row is None or not right:
            for key in keys:
                self._backoff.failed(key)
            raise Refused(401, "wrong user or password", "the first admin's password was printed at the first start")
        for key in keys:
            self._backoff.succeeded(key)
        token = tokens.issue_access_token(self._key, name, row.roles, now=time.time(), lifetime_s=TOKEN_LIFETIME_S)
        return token, TOKEN_LIFETIME_S

    def subject(self, token: str) -> Subject:
        """Who shows the token. Raises Refused 401."""
        try:
            return tokens.verify_access_token(self.grants.jwks, token, now=time.time())
        except WireError as error:
            raise Refused(401, str(error), "log in again: outrider hub login") from None

    def require(self, subject: Subject, action: str, resource: str = "") -> None:
        """Raises Refused 403 when the subject may not."""
        if not allowed(self.grants, subject, action, resource, now=time.time()):
            roles = ", ".join(subject.roles) or "no role"
            raise Refused(403, f"{subject.name} may not {action}", f"{subject.name} has {roles}; ask an admin")


def _password_matches(hashed: str, password: str) -> bool:
    try:
        return _hasher.verify(hashed, password[:1024])
    except (Argon2Error, InvalidHashError):
        return False
