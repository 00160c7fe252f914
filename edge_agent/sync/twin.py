"""Documents shared with the hub: `desired` (the hub wins), `reported` (the device wins), and the fleet's grants.

Invariants: each is on disk before anyone sees it; `desired` and the grants' epoch never go back; a change of `reported`
and the record that tells of it are one transaction.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from edge_agent.errors import Refused
from edge_agent.store import Connection, Store
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.errors import Undecodable
from edge_agent.wire.grants import Grants, verify_grants
from edge_agent.wire.messages import TWIN_LIMIT, Desired, merge_patch
from edge_agent.wire.signing import VerifyKey

REPORTED_PRIORITY = 2


class Twin:
    """Made by `await Twin.open(store, outbox)`."""

    def __init__(self, store: Store, outbox: Outbox, desired: Desired, version: int, reported: dict[str, Any]) -> None:
        self._store, self._outbox = store, outbox
        self.desired, self.reported_version, self.reported = desired, version, reported
        self._news = asyncio.Event()
        self._accepting, self._reporting = asyncio.Lock(), asyncio.Lock()

    @classmethod
    async def open(cls, store: Store, outbox: Outbox) -> Twin:
        """What was known when the last process ended; version 0 is nothing yet."""
        _, desired = await store.read(lambda db: _load(db, "desired"))
        version, reported = await store.read(lambda db: _load(db, "reported"))
        known = msgspec.json.decode(desired, type=Desired) if desired else Desired(0, 0.0, {})
        return cls(store, outbox, known, version, msgspec.json.decode(reported) if reported else {})

    async def accept(self, desired: Desired) -> bool:
        """True when it is newer than the known one and now on disk. Raises Undecodable past 32 KiB."""
        async with self._accepting:
            if desired.version <= self.desired.version:
                return False
            body = msgspec.json.encode(desired)
            if len(body) > TWIN_LIMIT + 1024:
                raise Undecodable(f"a desired document of {len(body)} bytes; at most {TWIN_LIMIT}")
            await self._store.write(lambda db: _save(db, "desired", desired.version, body))
            self.desired = desired
            self._news.set()
            return True

    async def newer_than(self, version: int) -> Desired:
        """Waits until a desired document is newer than the version that the caller has dealt with."""
        while self.desired.version <= version:
            self._news.clear()
            await self._news.wait()
        return self.desired

    async def report(self, patch: dict[str, Any]) -> int | None:
        """Merge (RFC 7396) into `reported`: its new version, None when nothing changed. Raises Refused past 32 KiB."""
        async with self._reporting:
            changed, version = merge_patch(self.reported, patch), self.reported_version + 1
            if changed == self.reported:
                return None
            body = msgspec.json.encode(changed)
            if len(body) > TWIN_LIMIT:
                raise Refused(f"a reported document of {len(body)} bytes", f"at most {TWIN_LIMIT}: report less")

            def save(db: Connection) -> None:
                _save(db, "reported", version, body)
                self._outbox.put(db, "reported", {"version": version, "doc": changed}, REPORTED_PRIORITY)

            await self._store.write(save)
            self.reported, self.reported_version = changed, version
            return version


class GrantsCache:
    """The newest grants the hub signed. Made by `await GrantsCache.open(store, hub_key)`."""

    def __init__(self, store: Store, key: VerifyKey, grants: Grants | None) -> None:
        self._store, self._key, self.grants = store, key, grants
        self._accepting = asyncio.Lock()

    @classmethod
    async def open(cls, store: Store, key: VerifyKey) -> GrantsCache:
        """The cached ones, verified again. Raises BadSignature when the pinned key is another now."""
        _, text = await store.read(lambda db: _load(db, "grants"))
        return cls(store, key, verify_grants(key, text.decode()) if text else None)

    async def accept(self, text: str) -> Grants:
        """Verify and keep. Raises BadSignature, VersionRefused, or Undecodable for an epoch below the known one."""
        async with self._accepting:
            known = self.grants.epoch if self.grants else 0
            grants = verify_grants(self._key, text, known)
            if grants != self.grants:
                await self._store.write(lambda db: _save(db, "grants", grants.epoch, text.encode()))
                self.grants = grants
            return grants


def _load(db: Connection, name: str) -> tuple[int, bytes]:
    row = db.execute("SELECT version, body FROM documents WHERE name = ?", [name]).fetchone()
    return row or (0, b"")


def _save(db: Connection, name: str, version: int, body: bytes) -> None:
    db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", [name, version, body])
