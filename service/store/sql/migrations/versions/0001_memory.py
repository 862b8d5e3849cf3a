"""First schema: predictions, readings, labels, fits."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    """Take the step."""
    op.create_table(
        "engines",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("engine_id", sa.String(length=200), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("newest_cycle", sa.BigInteger()),
        sa.Column("failed_at", sa.BigInteger()),
        sa.Column("failed_told", sa.Double()),
        sa.Column("truths", sa.Integer(), nullable=False),
        sa.Column("latest", sa.String(length=32)),
        sa.Column("latest_cycle", sa.BigInteger()),
        sa.Column("health", sa.Integer()),
        sa.Column("risk", sa.Double()),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("engine_id"),
    )
    op.create_index("engines_worst_first", "engines", [sa.literal_column("risk DESC"), "engine_id"])
    op.create_table(
        "fits",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("made", sa.Double(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "layouts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("channels", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("channels"),
    )
    op.create_table(
        "models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )
    op.create_table(
        "predictions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("engine", sa.Integer(), nullable=False),
        sa.Column("cycle", sa.BigInteger()),
        sa.Column("made", sa.Double(), nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("temperature_source", sa.String(length=10), nullable=False),
        sa.Column("logits", sa.LargeBinary(), nullable=False),
        sa.Column("rul", sa.Double()),
        sa.Column("inputs", sa.LargeBinary()),
        sa.Column("counts", sa.Boolean(), nullable=False),
        sa.Column("label", sa.LargeBinary()),
        sa.Column("source", sa.Integer()),
        sa.Column("labelled", sa.Double()),
        sa.PrimaryKeyConstraint("id"),
        sqlite_with_rowid=False,
    )
    op.create_index("predictions_engine_cycle", "predictions", ["engine", "cycle"])
    op.create_index("predictions_made", "predictions", ["made"])
    op.create_table(
        "readings",
        sa.Column("engine", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("cycle", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("layout", sa.Integer(), nullable=False),
        sa.Column("telemetry", sa.LargeBinary(), nullable=False),
        sa.Column("told", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("engine", "cycle"),
        sqlite_with_rowid=False,
    )
    op.create_index("readings_told", "readings", ["told"])
    op.create_table(
        "revisions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("engine", sa.Integer(), nullable=False),
        sa.Column("cycle", sa.BigInteger()),
        sa.Column("prediction", sa.String(length=32)),
        sa.Column("label", sa.LargeBinary()),
        sa.Column("failed_at", sa.BigInteger()),
        sa.Column("told", sa.Double(), nullable=False),
        sa.Column("revised", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "temperatures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.Integer(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("source", sa.String(length=10), nullable=False),
        sa.Column("fit", sa.String(length=32)),
        sa.Column("undoes", sa.Integer()),
        sa.Column("who", sa.String(length=80), nullable=False),
        sa.Column("changed", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("temperatures_model", "temperatures", ["model"])
    op.create_table(
        "truths",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("engine", sa.Integer(), nullable=False),
        sa.Column("cycle", sa.BigInteger()),
        sa.Column("prediction", sa.String(length=32)),
        sa.Column("label", sa.LargeBinary(), nullable=False),
        sa.Column("told", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("truths_engine_cycle", "truths", ["engine", "cycle"], unique=True)
    op.create_index("truths_prediction", "truths", ["prediction"], unique=True)
