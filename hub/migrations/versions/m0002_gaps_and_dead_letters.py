"""What never came, and dead letters that can be verified and taken again."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "gaps",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("found", sa.Float, nullable=False),
        sa.Index("gaps_by_device", "device", "id"),
    )
    op.add_column("devices", sa.Column("missing", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("dead_letters", sa.Column("properties", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("dead_letters", sa.Column("replayed", sa.Float))
