"""Bundles are TUF targets, cut into chunks; one from before is to be published again, which sends no file."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("bundles") as table:
        table.drop_column("signature")
        table.drop_column("key_id")
        table.add_column(sa.Column("index_sha256", sa.String(64), nullable=False, server_default=""))
        table.add_column(sa.Column("role", sa.String(63), nullable=False, server_default=""))
