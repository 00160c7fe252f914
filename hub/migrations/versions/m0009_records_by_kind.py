"""Records of a kind are found without reading all that came; plain telemetry, nearly all of it, costs no entry."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    which = sa.text("kind <> 'telemetry'")
    op.create_index("telemetry_by_kind", "telemetry", ["kind", "id"], sqlite_where=which, postgresql_where=which)
