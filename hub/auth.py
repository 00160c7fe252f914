"""People, their passwords and tokens, and the signed grants that say what a role may do.

Invariants: passwords are kept as argon2id; an access token is an `at+jwt`, signed by a key that devices knew as the
next one before it came into use; a refresh token is kept as a hash and good once, and one that comes again ends all
that came of the same login; `require` is the same `allowed` that a device asks, over the same grants; every change of
grants has a higher epoch. Guessing is slowed per client and name, a name that is guessed at from everywhere is locked
for a while, both with a bounded memory, and an unknown name is treated like a known one in words, time and locks.
"""

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from edge_agent.wire import tokens
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed, groups_named, public_jwk, sign_grants
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import check_name
from hub import audit
from hub.db import Database, devices, refresh_tokens, roles, settings, users
from hub.errors import Refused

TOKEN_LIFETIME_S = 3600.0
log = logging.getLogger(__name__)
GRANTS_LIFETIME_S = 30 * 86400.0  # a device without network keeps its permissions this long
GRANTS_RENEWAL_S = 3600.0  # also how old a device's floor of time may be while it is connected
REFRESH_LIFETIME_S = 30 * 86400.0  # from the login on, however often it is renewed
KEY_LIFETIME_S = 90 * 86400.0
MIN_PASSWORD = 8
MAX_GROUPS = 128 * 1024  # bytes in grants, which devices take up to 256 KiB of
_CONDITION = r"(?:device|group|tool|model)=[^:\s=&]{1,128}"
_PERMISSION = re.compile(rf"(\*|[a-z-]+):(\*|[a-z-]+)(:([^:\s=&]{{1,128}}|{_CONDITION}(&{_CONDITION}){{0,3}}))?")
_EXAMPLES = "such as call:tool:set_* or call:tool:group=line-2&tool=set_*"
_hasher = PasswordHasher()
_DUMMY_HASH = _hasher.hash(secrets.token_hex(8))


class Backoff:
    """Failed logins per client and name: free tries, then a doubling pause; at most `MAX` remembered."""

    FREE, FIRST_S, LONGEST_S, MAX = 5, 1.0, 300.0, 4096

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_s(self, key: str) -> float:
        """Seconds until this key may try again."""
        count, since = self._failures.get(key, (0, 0.0))
        if count < self.FREE:
            return 0.0
        return max(0.0, since + min(self.LONGEST_S, self.FIRST_S * 2.0 ** min(count - self.FREE, 16)) - self._clock())

    def failed(self, key: str) -> bool:
        """Whether this was the last free try."""
        count, _ = self._failures.pop(key, (0, 0.0))
        self._failures[key] = (count + 1, self._clock())
        if len(self._failures) > self.MAX:
            self._failures.popitem(last=False)
        return count + 1 == self.FREE

    def succeeded(self, key: str) -> None:
        self._failures.pop(key, None)


class Lockout(Backoff):
    """The same per name alone, so that many clients are no help: ten tries, then a quarter of an hour."""

    FREE, FIRST_S, LONGEST_S = 10, 900.0, 900.0


class TokenKeys:
    """The keys that sign access tokens: the one in use, the next, and the last while its tokens live."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._now, self._next, self._last = (folder / f"{name}.key" for name in ("now", "next", "last"))
        if not self._now.exists() and self._next.exists():
            self._next.replace(self._now)  # a rotation was cut in the middle
        self.now, self.next = SigningKey.load_or_create(self._now), SigningKey.load_or_create(self._next)

    @property
    def jwks(self) -> list[dict[str, str]]:
        """Public keys, the one in use first."""
        last = [SigningKey.load(self._last)] if self._last.exists() else []
        return [public_jwk(key.public) for key in (self.now, self.next, *last)]

    @property
    def due(self) -> bool:
        return time.time() - self._now.stat().st_mtime > KEY_LIFETIME_S

    def rotate(self) -> None:
        """The next key, which everybody knows by now, comes into use."""
        self._now.replace(self._last)
        self._next.replace(self._now)
        self._now.touch()
        self.now, self.next = SigningKey.load(self._now), SigningKey.load_or_create(self._next)


class Auth:
    """Who somebody is and what they may do. `grants` is the current document, `grants_text` its signed form."""

    def __init__(self, db: Database, key: SigningKey, keys: TokenKeys) -> None:
        self._db = db
        self._key = key
        self.keys = keys
        self._backoff, self._lockout, self._told = Backoff(), Lockout(), audit.Limiter()
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
            custom = {row.name: row.permissions for row in connection.execute(sa.select(roles))}
            now = time.time()
            return Grants(
                epoch=epoch,
                issued_at=now,
                hard_expiry=now + GRANTS_LIFETIME_S,
                roles=custom | SHIPPED_ROLES,
                jwks=self.keys.jwks,
                revoked={row.name: row.revoked for row in revoked},
                groups=_groups(connection, groups_named(custom)) or msgspec.UNSET,
            )

        self.grants = await self._db.write(change)
        if len(msgspec.json.encode(self.grants.groups or {})) > MAX_GROUPS:
            log.error("groups are left out of the grants, as they are too large: name fewer of them in roles' scopes")
            self.grants = msgspec.structs.replace(self.grants, groups=msgspec.UNSET)
        self.grants_text = sign_grants(self._key, self.grants)

    async def regroup(self) -> bool:
        """After a device changed its groups: whether there are new grants, as some role's scope names a group."""
        if scoped := bool(groups_named(self.grants.roles)):
            await self.issue_grants()
        return scoped

    async def rotate_keys(self, by: str) -> None:
        """Sign with the next key from now on, and let everybody know the one after it."""
        await asyncio.to_thread(self.keys.rotate)
        await self._db.write(lambda c: audit.append(c, by, "rotate:key", {"kid": self.keys.now.public.key_id}))
        await self.issue_grants()

    async def set_role(self, name: str, permissions: list[str] | None, by: str) -> None:
        """Make, change or (None) remove a custom role. Raises Refused 404, 409, 422."""
        if name in SHIPPED_ROLES:
            raise Refused(409, f"{name} ships with Outrider", "make a role of another name")
        if wrong := [each for each in permissions or [] if not _PERMISSION.fullmatch(each)]:
            raise Refused(422, f"not permissions: {wrong}", f"verb:noun or verb:noun:scope, {_EXAMPLES}")
        _checked_name(name, "role")

        def change(connection: sa.Connection) -> None:
            gone = connection.execute(roles.delete().where(roles.c.name == name)).rowcount
            if permissions is not None:
                connection.execute(roles.insert().values(name=name, permissions=permissions))
            elif not gone:
                raise Refused(404, f"no role {name}", "see GET /v1/roles")
            audit.append(connection, by, "change:role", {"role": name, "permissions": permissions})

        await self._db.write(change)
        await self.issue_grants()

    async def add_user(self, name: str, roles: list[str], password: str, by: str) -> None:
        """Raises Refused for a bad name, role or password, and 409 when the name is taken."""
        _checked_name(name, "user")
        if unknown := sorted(set(roles) - set(self.grants.roles)):
            raise Refused(422, f"unknown roles {unknown}", f"roles are {', '.join(self.grants.roles)}")
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
            connection.execute(refresh_tokens.delete().where(refresh_tokens.c.user == name))
            audit.append(connection, by, "revoke:user", {"user": name})

        await self._db.write(change)
        await self.issue_grants()

    async def login(self, name: str, password: str, client: str) -> tuple[str, float]:
        """An access token and its lifetime in seconds. Raises Refused 401, or 429 after too many failures."""
        keys, name = (client, f"{client} {name[:64]}"), name[:64]
        query = sa.select(users).where(users.c.name == name, users.c.revoked.is_(None))
        row = await self._db.read(lambda c: c.execute(query).first())
        async with self._hashing:
            if wait := max(*(self._backoff.wait_s(key) for key in keys), self._lockout.wait_s(name)):
                seconds = int(wait) + 1
                raise Refused(429, "too many failed logins", f"try again in {seconds} s", retry_after_s=seconds)
            right = await asyncio.to_thread(_password_matches, row.password_hash if row else _DUMMY_HASH, password)
        if row is None or not right:
            for key in keys:
                self._backoff.failed(key)
            locked = self._lockout.failed(name)
            await self.tell_refused(name, "lock:user" if locked else "refuse:login", {"client": client})
            raise Refused(401, "wrong user or password", "the first admin's password was printed at the first start")
        for key in keys:
            self._backoff.succeeded(key)
        self._lockout.succeeded(name)
        now = await self._db.write(lambda c: _admit(c, name, "login:user", {"client": client}))
        return self._access(name, row.roles, now), TOKEN_LIFETIME_S

    def _access(
        self, name: str, roles: list[str], now: float, audience: str = tokens.AUDIENCE, until: float = 0.0
    ) -> str:
        lifetime_s = until - now if until else TOKEN_LIFETIME_S
        return tokens.issue_access_token(self.keys.now, name, roles, now=now, lifetime_s=lifetime_s, audience=audience)

    async def tell_refused(self, actor: str, action: str, detail: dict[str, Any]) -> None:
        """Audit what anybody can cause, at a bounded rate."""
        if count := self._told.count(actor, action, time.monotonic()):
            text = actor.replace("\0", "")[:63]
            await self._db.write(lambda c: audit.append(c, text, action, detail | {"count": count}))

    async def refresh_token(self, name: str) -> str:
        """The first refresh token after a login."""
        row = {"family": secrets.token_hex(16), "user": name, "expires": time.time() + REFRESH_LIFETIME_S}
        return await self._db.write(lambda c: _new_refresh(c, row))

    async def refresh(self, token: str) -> tuple[str, str, float]:
        """A new access token, the next refresh token, and the former's lifetime in seconds. Raises Refused 401."""
        table, again = refresh_tokens.c, "log in again: outrider hub login"

        def change(connection: sa.Connection) -> tuple[Any, str, float] | str:
            now = time.time()
            connection.execute(refresh_tokens.delete().where(table.expires < now))
            row = connection.execute(sa.select(refresh_tokens).where(table.token_hash == _digest(token))).first()
            if row is None:
                return "the refresh token is not known or has expired"
            if row.used is not None:
                connection.execute(refresh_tokens.delete().where(table.family == row.family))
                audit.append(connection, row.user, "reuse:refresh-token", {"family": row.family})
                return "the refresh token was used before: everybody of that login is out"
            user = connection.execute(sa.select(users).where(users.c.name == row.user)).first()
            if user is None or user.revoked is not None:
                return f"{row.user} may not log in"
            used = refresh_tokens.update().where(table.token_hash == row.token_hash, table.used.is_(None))
            if connection.execute(used.values(used=now)).rowcount == 0:
                return "the refresh token was used at the same time"
            new = _new_refresh(connection, {"family": row.family, "user": row.user, "expires": row.expires})
            return user, new, now

        done = await self._db.write(change)
        if isinstance(done, str):
            raise Refused(401, done, again)
        user, following, now = done
        return self._access(user.name, user.roles, now), following, TOKEN_LIFETIME_S

    async def offline_token(self, who: Subject, device: str, ttl_s: float) -> tuple[str, float]:
        """A token that one device takes, with no network, and when it ends: with the grants at the latest."""
        until = min(time.time() + max(60.0, ttl_s), self.grants.hard_expiry)
        detail = {"device": device, "expires": until}
        now = await self._db.write(lambda c: _admit(c, who.name, "create:offline-token", detail))
        return self._access(who.name, who.roles, now, f"{tokens.AUDIENCE}/{device}", until), until

    def subject(self, token: str) -> Subject:
        """Who shows the token. Raises Refused 401."""
        try:
            return tokens.verify_access_token(self.grants.jwks, token, now=time.time())
        except WireError as error:
            raise Refused(401, str(error), "log in again: outrider hub login") from None

    def may(self, subject: Subject, action: str, device: str = "") -> bool:
        return allowed(self.grants, subject, action, device, now=time.time(), device=device)

    def somewhere(self, subject: Subject, action: str) -> bool:
        """Whether there could be a device that the subject may do it to."""
        bare = {role: [":".join(each.split(":")[:2]) for each in given] for role, given in self.grants.roles.items()}
        return allowed(msgspec.structs.replace(self.grants, roles=bare), subject, action, now=time.time())

    def require(self, subject: Subject, action: str, device: str = "") -> None:
        """Raises Refused 403 when the subject may not."""
        if not self.may(subject, action, device):
            roles = ", ".join(subject.roles) or "no role"
            raise Refused(403, f"{subject.name} may not {action}", f"{subject.name} has {roles}; ask an admin")


def _admit(connection: sa.Connection, name: str, action: str, detail: dict[str, Any]) -> float:
    """When a token for somebody is issued: before any revocation that is still to come. Raises Refused 401."""
    known = sa.select(users.c.name).where(users.c.name == name, users.c.revoked.is_(None))
    if connection.execute(known).first() is None:
        raise Refused(401, f"{name} may not log in", "ask an admin")
    audit.append(connection, name, action, detail)
    return time.time()


def _groups(connection: sa.Connection, named: set[str]) -> dict[str, list[str]]:
    """The devices of those groups that are named, by group."""
    found: dict[str, list[str]] = {}
    rows = connection.execute(sa.select(devices.c.name, devices.c.labels).order_by(devices.c.name)) if named else ()
    for row in rows:
        for group in named & set(row.labels.get("groups", ())):
            found.setdefault(group, []).append(row.name)
    return found


def _new_refresh(connection: sa.Connection, row: dict[str, Any]) -> str:
    token = secrets.token_urlsafe(32)
    connection.execute(refresh_tokens.insert().values(token_hash=_digest(token), **row))
    return token


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


def _checked_name(name: str, what: str) -> None:
    try:
        check_name(name, what)
    except ValueError as error:
        raise Refused(422, str(error)) from None


def _password_matches(hashed: str, password: str) -> bool:
    try:
        return _hasher.verify(hashed, password[:1024])
    except (Argon2Error, InvalidHashError):
        return False
