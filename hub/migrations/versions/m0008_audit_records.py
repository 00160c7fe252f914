"""What devices chained is found among all that they sent without reading the rest."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    which = sa.text("kind = 'audit'")
    op.create_index(
        "telemetry_audit", "telemetry", ["device", "epoch", "seq"], sqlite_where=which, postgresql_where=which
    )
