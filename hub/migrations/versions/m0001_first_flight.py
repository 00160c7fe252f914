"""The tables of the first flight."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "settings",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("password_hash", sa.String(255), nullable=False),
        sa.Column("roles", sa.JSON, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    )
    op.create_table(
        "enrolments",
        sa.Column("token_hash", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(63)),
        sa.Column("created_by", sa.String(63), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("used", sa.Float),
        sa.Column("used_by", sa.String(63)),
    )
    op.create_table(
        "devices",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("public_key", sa.String(64), nullable=False),
        sa.Column("enrolled", sa.Float, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("watermark", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lost", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("last_seen", sa.Float),
        sa.Column("clock_offset_s", sa.Float),
        sa.Column("agent", sa.String(64), nullable=False, server_default=""),
        sa.Column("desired_version", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("desired", sa.JSON, nullable=False),
        sa.Column("reported", sa.JSON, nullable=False),
    )
    op.create_table(
        "telemetry",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("ts", sa.Float, nullable=False),
        sa.Column("received", sa.Float, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.UniqueConstraint("device", "epoch", "seq", name="telemetry_once"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body", sa.JSON, nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("roles", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.Column("idempotency_key", sa.String(128)),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("error", sa.Text, nullable=False, server_default=""),
        sa.UniqueConstraint("device", "idempotency_key", name="jobs_once"),
    )
    op.create_index("jobs_by_state", "jobs", ["state", "device"])
    op.create_index("jobs_by_created", "jobs", ["created"])
    op.create_table(
        "dead_letters",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("received", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "bundles",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("signature", sa.String(128), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("content_digest", sa.String(64), nullable=False),
        sa.Column("published", sa.Float, nullable=False),
        sa.Column("published_by", sa.String(63), nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("ts", sa.Float, nullable=False),
        sa.Column("actor", sa.String(63), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("prev", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
