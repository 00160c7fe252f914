"""Up to where a device's entries were pruned is found among all that the audit log tells."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    which = sa.text("action = 'prune:device'")
    op.create_index("audit_pruned", "audit", ["actor", "id"], sqlite_where=which, postgresql_where=which)
