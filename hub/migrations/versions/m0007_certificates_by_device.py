"""When a device's certificate runs out is looked up with the device."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_index("certificates_by_device", "certificates", ["device"])
