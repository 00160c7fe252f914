"""Blobs by SHA-256 on disk, and the bundles made of them.

Invariants: a blob appears under its name only whole, with the right hash and fsynced; one that was damaged since is
as good as missing: it is not handed out, and the next upload replaces it. A bundle is published only when every file
it names is here, read anew, with that size and hash; what is published is signed by the hub and never changes.
"""

import asyncio
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire import durable
from edge_agent.wire.bundle import Manifest, SignedManifest, content_digest, sign_manifest
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import check_depth, decode
from edge_agent.wire.signing import SigningKey
from hub import audit
from hub.db import Database, bundles
from hub.errors import Refused

MAX_BLOB = 64 << 30
_PIECE = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Registry:
    """What devices may install."""

    def __init__(self, db: Database, data_dir: Path, key: SigningKey) -> None:
        self._db = db
        self._key = key
        self._blobs = data_dir / "blobs"
        self._partial = self._blobs / ".partial"
        self._intact: dict[str, tuple[int, int, int]] = {}  # the file (inode, size, mtime) that had the right hash
        self._hashing = asyncio.Lock()
        self._partial.mkdir(parents=True, exist_ok=True)
        for left_over in self._partial.iterdir():
            left_over.unlink()

    async def blob(self, sha256: str) -> Path:
        """Where a blob lies. Raises Refused 422 for a malformed name, 404 when it is not here or damaged."""
        path = self._blob_path(sha256)
        if not path.exists():
            raise Refused(404, f"no blob {sha256}", "upload it: PUT /v1/blobs/{sha256}")
        if not await self._is_intact(path):
            hint = "publish its files again; for a device that quarantined the version, under a new version"
            raise Refused(404, f"blob {sha256} is damaged on the hub's disk", hint)
        return path

    async def _is_intact(self, path: Path, anew: bool = False) -> bool:
        """Whether a blob has its hash: read once, then remembered for as long as the file is not touched."""
        if not anew and self._intact.get(path.name) == _identity(path):
            return True
        async with self._hashing:  # one at a time, so that a hundred devices asking cost one read
            if not anew and self._intact.get(path.name) == _identity(path):
                return True
            identity, digest = await asyncio.to_thread(_read, path)
            if digest != path.name:
                self._intact.pop(path.name, None)
                return False
            self._intact[path.name] = identity
            return True

    def _blob_path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise Refused(422, f"{sha256[:80]!r} is not a SHA-256", "64 hexadecimal digits, lower case")
        return self._blobs / sha256[:2] / sha256

    async def put_blob(self, sha256: str, pieces: AsyncIterator[bytes]) -> int:
        """Store a blob as it streams in; its size in bytes.

        Raises:
            Refused: 422 when the content has another hash, 413 past MAX_BLOB, 507 when the disk is full.
        """
        path = self._blob_path(sha256)
        if path.exists() and await self._is_intact(path):
            async for _ in pieces:
                pass
            return path.stat().st_size
        partial = self._partial / secrets.token_hex(8)
        try:
            size, digest = await self._receive(partial, pieces)
            if digest != sha256:
                raise Refused(422, f"the content has SHA-256 {digest}, not {sha256}", "upload it again")
            await asyncio.to_thread(_move_durably, partial, path)
            return size
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Refused(507, "the hub's disk is full", "free space or move --data, then upload again") from error
            raise
        finally:
            partial.unlink(missing_ok=True)

    async def _receive(self, partial: Path, pieces: AsyncIterator[bytes]) -> tuple[int, str]:
        hasher, size = hashlib.sha256(), 0
        waiting: list[bytes] = []

        def flush() -> None:
            for piece in waiting:
                hasher.update(piece)
                file.write(piece)
            waiting.clear()

        with await asyncio.to_thread(partial.open, "wb") as file:
            async for piece in pieces:
                waiting.append(piece)
                size += len(piece)
                if size > MAX_BLOB:
                    raise Refused(413, "the blob is too big", f"at most {MAX_BLOB} bytes")
                if sum(map(len, waiting)) >= _PIECE:
                    await asyncio.to_thread(flush)
            await asyncio.to_thread(flush)
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
        return size, hasher.hexdigest()

    async def publish(self, manifest: bytes, by: str) -> SignedManifest:
        """Check, sign and keep a manifest; the same one again changes nothing.

        Raises:
            Refused: 422 when it is no manifest, 409 when files are missing here or the version exists and differs.
        """
        try:
            check_depth(msgspec.json.decode(manifest))
            signed = sign_manifest(self._key, manifest)
            parsed = decode(Manifest, manifest)
        except (WireError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise Refused(
                422, f"the manifest is refused: {error}", "see Manifest in edge_agent/wire/bundle.py"
            ) from None
        await self._check_files(parsed)

        def change(connection: sa.Connection) -> SignedManifest:
            known = _select(connection, parsed.name, parsed.version)
            if known is not None:
                if known.manifest != signed.manifest:
                    hint = "a published version never changes: publish under a new version"
                    raise Refused(409, f"bundle {parsed.name} {parsed.version} exists and differs", hint)
                return SignedManifest(known.manifest, known.signature, known.key_id)
            row = {
                "name": parsed.name,
                "version": parsed.version,
                "kind": parsed.kind.value,
                "manifest": signed.manifest,
                "manifest_sha256": signed.sha256,
                "signature": signed.signature,
                "key_id": signed.key_id,
                "size": parsed.size,
                "content_digest": content_digest(parsed.files),
                "published": time.time(),
                "published_by": by,
            }
            connection.execute(bundles.insert().values(**row))
            detail = {"bundle": parsed.name, "version": parsed.version, "manifest_sha256": signed.sha256}
            audit.append(connection, by, "publish:bundle", detail)
            return signed

        return await self._db.write(change)

    async def _check_files(self, manifest: Manifest) -> None:
        missing = []
        for entry in manifest.files:
            path = self._blob_path(entry.sha256)
            if not path.exists():
                missing.append(entry.path)
            elif path.stat().st_size != entry.size:
                raise Refused(
                    409, f"{entry.path} has {path.stat().st_size} bytes here, not {entry.size}", "scan it again"
                )
            elif not await self._is_intact(path, anew=True):
                missing.append(f"{entry.path} (damaged: {entry.sha256})")
        if missing:
            names = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
            raise Refused(
                409, f"{len(missing)} files are not here: {names}", "upload them (again): PUT /v1/blobs/{sha256}"
            )

    async def list(self) -> list[dict[str, Any]]:
        """Name, version, kind, size, digests, when and by whom; oldest first."""
        shown = [c for c in bundles.c if c.name not in ("manifest", "signature")]
        query = sa.select(*shown).order_by(bundles.c.published)
        return [dict(row) for row in await self._db.read(lambda c: c.execute(query).mappings().all())]

    async def get(self, name: str, version: str) -> SignedManifest:
        """Raises Refused 404."""
        row = await self._db.read(lambda c: _select(c, name, version))
        if row is None:
            raise Refused(404, f"no bundle {name} {version}", "see GET /v1/bundles")
        return SignedManifest(row.manifest, row.signature, row.key_id)


def _select(connection: sa.Connection, name: str, version: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(bundles).where(bundles.c.name == name, bundles.c.version == version)).first()


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> tuple[tuple[int, int, int], str]:
    identity = _identity(path)
    with path.open("rb") as file:
        return identity, hashlib.file_digest(file, "sha256").hexdigest()


def _move_durably(partial: Path, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    partial.replace(path)
    for folder in (path.parent, path.parent.parent):
        durable.sync(folder)
