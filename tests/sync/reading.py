"""What waits in an outbox."""

import msgspec

from edge_agent.sync.outbox import Outbox
from edge_agent.wire.batch import MAX_BATCH
from edge_agent.wire.messages import Record


async def everything(outbox: Outbox) -> list[Record]:
    """All that waits, read as the session reads it."""
    records: list[Record] = []
    after = outbox.acked
    while part := await outbox.batch(after):
        assert part.first == after + 1
        assert sum(len(line) + 1 for line in part.lines) <= MAX_BATCH
        records += [msgspec.json.decode(line, type=Record) for line in part.lines]
        after = part.last
    return records
