"""Rollouts, the devices in them, and what a device is called by: groups, tags, the time zone of its site."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("bundle", sa.String(63), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("live", sa.Boolean, nullable=False),
        sa.Column("run", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(63), nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
    )
    op.create_table(
        "rollout_devices",
        sa.Column("rollout", sa.String(32), sa.ForeignKey("rollouts.id"), primary_key=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), primary_key=True),
        sa.Column("wave", sa.Integer, nullable=False),
        sa.Column("step", sa.String(16), nullable=False),
        sa.Column("place", sa.JSON, nullable=False),
    )
    op.create_index("rollout_devices_by_step", "rollout_devices", ["rollout", "wave", "step"])
    op.add_column("devices", sa.Column("labels", sa.JSON, nullable=False, server_default="{}"))
