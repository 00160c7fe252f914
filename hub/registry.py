"""Blobs by SHA-256 (where they live is hub/objects.py), and the bundles made of them.

Invariants: a blob appears under its name only whole, with the right hash and fsynced; one that was damaged since is
as good as missing: it is not handed out, and the next upload replaces it. A bundle is published only when every file
it names is here, read anew, with that size and hash; what is published never changes. Its manifest, its chunk index
and the pack of its new chunks are blobs too, there before the TUF repository names them.
"""

import asyncio
import errno
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

from edge_agent.wire import durable
from edge_agent.wire.bundle import SHA256, Manifest, Target, content_digest, decode_manifest, sha256, target_paths
from edge_agent.wire.chunks import Chunk, Index, decode_index
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import check_depth
from hub import audit, packs
from hub.db import Database, bundles
from hub.errors import Refused
from hub.objects import Folder, Objects
from hub.repository import Repository

T = TypeVar("T")
MAX_BLOB = 64 << 30
_PIECE = 1 << 20


class Registry:
    """What devices may install."""

    def __init__(self, db: Database, data_dir: Path, repository: Repository, objects: Objects | None = None) -> None:
        self._db = db
        self._repository = repository
        self._publishing = asyncio.Lock()
        self._blobs = data_dir / "blobs"
        self._objects = objects or Folder(self._blobs)
        self._partial = self._blobs / ".partial"
        self._intact: dict[str, tuple[int, int, int]] = {}  # the file (inode, size, mtime) that had the right hash
        self._hashing = asyncio.Lock()
        self._partial.mkdir(parents=True, exist_ok=True)
        for left_over in self._partial.iterdir():
            left_over.unlink()

    async def blob(self, sha256: str) -> Path:
        """Where a blob lies. Raises Refused 422 for a malformed name, 404 when it is not here or damaged."""
        if (path := await self._local(sha256)) is None:
            raise Refused(404, f"no blob {sha256}", "upload it: PUT /v1/blobs/{sha256}")
        if not await self._is_intact(path):
            hint = "publish its files again; for a device that quarantined the version, under a new version"
            raise Refused(404, f"blob {sha256} is damaged on the hub's disk", hint)
        return path

    async def _local(self, sha256: str) -> Path | None:
        """A blob's file here; one that is damaged is asked for anew, if it lives elsewhere. Raises Refused 422, 503."""
        if not SHA256.fullmatch(sha256):
            raise Refused(422, f"{sha256[:80]!r} is not a SHA-256", "64 hexadecimal digits, lower case")
        path = await self._objects.local(sha256)
        if path is not None and not await self._is_intact(path):
            path = await self._objects.local(sha256, anew=True)
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

    async def put_blob(self, sha256: str, pieces: AsyncIterator[bytes]) -> int:
        """Store a blob as it streams in; its size in bytes.

        Raises:
            Refused: 422 when the content has another hash, 413 past MAX_BLOB, 507 when the disk is full.
        """
        path = await self._local(sha256)
        if path is not None and await self._is_intact(path):
            async for _ in pieces:
                pass
            return path.stat().st_size
        partial = self._partial / secrets.token_hex(8)
        try:
            size, digest = await self._receive(partial, pieces)
            if digest != sha256:
                raise Refused(422, f"the content has SHA-256 {digest}, not {sha256}", "upload it again")
            await self._objects.put(sha256, partial)
            return size
        except OSError as error:
            raise _disk_full(error) from error
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

    async def trusted(self, ask: Callable[[Repository], T]) -> T:
        """Ask the TUF repository something."""
        return await asyncio.to_thread(ask, self._repository)

    async def publish(self, manifest: bytes, by: str) -> Target:
        """Check, cut, sign and keep a manifest; the same one again changes nothing.

        Raises:
            Refused: 422 when it is no manifest, 409 when files are missing here or the version exists and differs, 507.
        """
        try:
            check_depth(msgspec.json.decode(manifest))
            parsed, target = decode_manifest(manifest), sha256(manifest)
        except (WireError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise Refused(
                422, f"the manifest is refused: {error}", "see Manifest in edge_agent/wire/bundle.py"
            ) from None
        await self._check_files(parsed)
        async with self._publishing:
            row = await self._db.read(lambda c: _select(c, parsed.name, parsed.version))
            if row is None or (row.manifest_sha256 == target and not row.index_sha256):
                index, role = await self._sign(parsed, manifest)
                await self._db.write(lambda c: _keep(c, parsed, manifest, index, role, by))
            elif row.manifest_sha256 != target:
                hint = "a published version never changes: publish under a new version"
                raise Refused(409, f"bundle {parsed.name} {parsed.version} exists and differs", hint)
        return Target(parsed.version, target)

    async def _sign(self, manifest: Manifest, raw: bytes) -> tuple[str, str]:
        """Cut a bundle and make it a target: the SHA-256 of its index, the role that signed."""
        known = await self._known(manifest.name)
        found = [(entry, await self._local(entry.sha256)) for entry in manifest.files]
        files = [(entry, path) for entry, path in found if path is not None]  # none is missing: they were checked
        partial = self._partial / secrets.token_hex(8)
        try:
            index, pack = await asyncio.to_thread(packs.build, files, known, partial)
            if pack:
                await self._objects.put(pack, partial)
            signed = {}
            for path, data in zip(target_paths(manifest.name, manifest.version), (raw, index), strict=True):
                await asyncio.to_thread(durable.write, partial, data)
                await self._objects.put(sha256(data), partial)
                signed[path] = len(data), sha256(data)
            return sha256(index), await asyncio.to_thread(self._repository.publish, signed)
        except OSError as error:
            raise _disk_full(error) from error
        finally:
            partial.unlink(missing_ok=True)

    async def _known(self, name: str) -> dict[bytes, Chunk]:
        """Chunks of earlier versions that lie in whole packs."""
        cut = sa.and_(bundles.c.name == name, bundles.c.index_sha256 != "")
        query = sa.select(bundles.c.manifest, bundles.c.index_sha256).where(cut)
        known: dict[bytes, Chunk] = {}
        for row in await self._db.read(lambda c: c.execute(query).all()):
            path = await self._local(row.index_sha256)
            if path is None or not await self._is_intact(path):
                continue
            index = await asyncio.to_thread(_read_index, path, row.manifest)
            paths = {pack: await self._local(pack) for pack in index.packs}
            whole = {pack for pack, path in paths.items() if path is not None and await self._is_intact(path)}
            known |= {chunk.hash: chunk for chunk in index.chunks() if chunk.pack in whole}
        return known

    async def _check_files(self, manifest: Manifest) -> None:
        missing = []
        for entry in manifest.files:
            path = await self._local(entry.sha256)
            if path is None:
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
        shown = [c for c in bundles.c if c.name != "manifest"]
        query = sa.select(*shown).order_by(bundles.c.published)
        return [dict(row) for row in await self._db.read(lambda c: c.execute(query).mappings().all())]

    async def get(self, name: str, version: str) -> tuple[Manifest, Target]:
        """Raises Refused 404."""
        row = await self._db.read(lambda c: _select(c, name, version))
        if row is None:
            raise Refused(404, f"no bundle {name} {version}", "see GET /v1/bundles")
        return decode_manifest(row.manifest.encode()), Target(row.version, row.manifest_sha256)


def _keep(connection: sa.Connection, manifest: Manifest, raw: bytes, index: str, role: str, by: str) -> None:
    row = {
        "name": manifest.name,
        "version": manifest.version,
        "kind": manifest.kind.value,
        "manifest": raw.decode(),
        "manifest_sha256": sha256(raw),
        "index_sha256": index,
        "role": role,
        "size": manifest.size,
        "content_digest": content_digest(manifest.files),
        "published": time.time(),
        "published_by": by,
    }
    same = sa.and_(bundles.c.name == manifest.name, bundles.c.version == manifest.version)
    connection.execute(bundles.delete().where(same))  # one that was published before bundles were cut
    connection.execute(bundles.insert().values(**row))
    detail = {"bundle": manifest.name, "version": manifest.version, "manifest_sha256": row["manifest_sha256"]}
    audit.append(connection, by, "publish:bundle", detail)


def _read_index(path: Path, manifest: str) -> Index:
    return decode_index(path.read_bytes(), decode_manifest(manifest.encode()).files)


def _disk_full(error: OSError) -> OSError | Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused(507, "the hub's disk is full", "free space or move --data, then upload again")
    return error


def _select(connection: sa.Connection, name: str, version: str) -> sa.Row[Any] | None:
    return connection.execute(sa.select(bundles).where(bundles.c.name == name, bundles.c.version == version)).first()


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> tuple[tuple[int, int, int], str]:
    identity = _identity(path)
    with path.open("rb") as file:
        return identity, hashlib.file_digest(file, "sha256").hexdigest()
