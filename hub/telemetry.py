"""Reading what devices sent, a bounded page at a time.

Invariant: within one device, the order of `id` is the order of (epoch, seq), because the ingest commits in order; only
what was a dead letter and is replayed comes later.
"""

from collections.abc import Collection
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire.batch import unpack
from edge_agent.wire.errors import WireError
from edge_agent.wire.signing import to_text
from hub import audit
from hub.committer import replay
from hub.db import SPECIAL, Database, among, dead_letters, devices, gaps, row_dict, telemetry
from hub.errors import Refused

MAX_PAGE = 1000
PREVIEW = 16 * 1024  # bytes of a dead letter's text


class Telemetry:
    """Queries over committed records."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def query(
        self,
        device: str | None = None,
        kind: str | None = None,
        *,
        after: int = 0,
        after_seq: int = 0,
        epoch: int | None = None,
        newest_first: bool = False,
        limit: int = 100,
        only: Collection[str] | None = None,
    ) -> list[dict[str, Any]]:
        """At most MAX_PAGE records, oldest first unless told.

        Of one device: by (epoch, seq), those of `epoch` (else of its newest) above `after_seq`, or all when neither is
        given. Of all devices: by id, those above `after`. `only` of these devices, if they are given.
        """
        query = sa.select(telemetry).limit(min(limit, MAX_PAGE))
        order: list[sa.ColumnElement[Any]] = [telemetry.c.id]
        if device is not None:
            query, order = query.where(telemetry.c.device == device), [telemetry.c.epoch, telemetry.c.seq]
            if after_seq or epoch is not None:
                newest = sa.select(devices.c.epoch).where(devices.c.name == device).scalar_subquery()
                query = query.where(telemetry.c.epoch == (newest if epoch is None else epoch))
                query = query.where(telemetry.c.seq > after_seq)
        else:
            query = query.where(telemetry.c.id > after)
        if only is not None:
            query = query.where(among(telemetry.c.device, only))
        if kind is not None:
            query = query.where(telemetry.c.kind == kind)
            query = query.where(SPECIAL) if device is None and kind != "telemetry" else query  # or no index is used
        query = query.order_by(*(column.desc() if newest_first else column for column in order))
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
        return [dict(row) | {"body": msgspec.json.decode(row["body"])} for row in rows]

    async def count_after(self, id: int) -> tuple[int, int]:
        """How many records have an id above this one, and the highest id of all (at least `id`)."""
        found = sa.select(sa.func.count(), sa.func.max(telemetry.c.id)).where(telemetry.c.id > id)
        row = await self._db.read(lambda c: c.execute(found).one())
        return row[0], row[1] or id

    async def gaps(self, device: str) -> list[dict[str, Any]]:
        """From which seq to which some never came, newest first. Told of as lost or not: see the device."""
        query = sa.select(gaps).where(gaps.c.device == device).order_by(gaps.c.id.desc())
        return [dict(row) for row in await self._db.read(lambda c: c.execute(query).mappings().all())]

    async def dead(
        self, device: str | None = None, limit: int = 100, only: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """Dead letters without their payload, newest first."""
        size = sa.func.length(dead_letters.c.payload).label("size")
        wanted = [column for column in dead_letters.c if column.name not in ("payload", "properties")]
        query = sa.select(*wanted, size).order_by(dead_letters.c.id.desc()).limit(min(limit, MAX_PAGE))
        if only is not None:
            query = query.where(among(dead_letters.c.device, only))
        if device is not None:
            query = query.where(dead_letters.c.device == device)
        return [dict(row) for row in await self._db.read(lambda c: c.execute(query).mappings().all())]

    async def dead_letter(self, id: int) -> dict[str, Any]:
        """One, with its payload as base64url and the beginning of its text if it unpacks. Raises Refused 404."""
        query = sa.select(dead_letters).where(dead_letters.c.id == id)
        row = await self._db.read(lambda c: c.execute(query).first())
        if row is None:
            raise _no_letter(id)
        try:
            text = unpack(row.payload)[:PREVIEW].decode(errors="replace")
        except WireError:
            text = None
        return row_dict(row) | {"payload": to_text(row.payload), "text": text}

    async def replay(self, id: int, by: str) -> int:
        """Take what it holds and is not here yet: how many records. Raises Refused 404, 422 when it still is dead."""

        def change(connection: sa.Connection) -> int:
            records = replay(connection, id)
            if records is None:
                raise _no_letter(id)
            audit.append(connection, by, "replay:deadletter", {"id": id, "records": records})
            return records

        try:
            return await self._db.write(change)
        except (WireError, sa.exc.DataError, sa.exc.IntegrityError, OverflowError, ValueError) as error:
            hint = "it stays for a look; a hub of a newer version may read it"
            raise Refused(422, f"dead letter {id} cannot be taken: {error}", hint) from None


def _no_letter(id: int) -> Refused:
    return Refused(404, f"no dead letter {id}", "see GET /v1/deadletters; only the newest are kept")
