"""Mark predictions of flights, so that a repeated flight returns its first prediction."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Take the step; of what is there already it is unknown."""
    op.add_column("predictions", sa.Column("flight", sa.Boolean()))
