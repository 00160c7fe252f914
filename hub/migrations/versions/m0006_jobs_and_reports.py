"""The version of a reported document; who cancelled a job, how far it is, and the fan-outs jobs belong to."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("devices", sa.Column("reported_version", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "fanouts",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("group", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("ttl_s", sa.Float, nullable=False),
        sa.Column("at_once", sa.Integer, nullable=False),
        sa.Column("idempotency_key", sa.String(128)),
        sa.UniqueConstraint("group", "idempotency_key", name="fanouts_once"),
    )
    op.add_column("jobs", sa.Column("cancelled_by", sa.String(63)))
    op.add_column("jobs", sa.Column("progress", sa.JSON))
    op.add_column("jobs", sa.Column("fanout", sa.String(32)))
    op.add_column("jobs", sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("jobs_by_fanout", "jobs", ["fanout", "state"])
