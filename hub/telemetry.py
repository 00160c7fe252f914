"""Reading what devices sent, a bounded page at a time.

Invariant: within one device, the order of `id` is the order of (epoch, seq), because the ingest commits in order.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from hub.db import Database, devices, telemetry

MAX_PAGE = 1000


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
    ) -> list[dict[str, Any]]:
        """At most MAX_PAGE records, oldest first unless told.

        Of one device: by (epoch, seq), those of `epoch` (else of its newest) above `after_seq`, or all when neither is
        given. Of all devices: by id, those above `after`.
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
        if kind is not None:
            query = query.where(telemetry.c.kind == kind)
        query = query.order_by(*(column.desc() if newest_first else column for column in order))
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
        return [dict(row) | {"body": msgspec.json.decode(row["body"])} for row in rows]

    async def count_after(self, id: int) -> tuple[int, int]:
        """How many records have an id above this one, and the highest id of all (at least `id`)."""
        found = sa.select(sa.func.count(), sa.func.max(telemetry.c.id)).where(telemetry.c.id > id)
        row = await self._db.read(lambda c: c.execute(found).one())
        return row[0], row[1] or id
