"""Migrate the schema of the database to the version of this code; reject a newer one. Import Alembic only if needed."""

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from service.errors import SchemaRejected

STEPS = Path(__file__).parent / "migrations"
LOCK = 7_226_601  # advisory lock of PostgreSQL: replicas that start at the same time migrate in turn


def migrate(engine: Engine) -> None:
    """Apply the missing revisions in one transaction. Processes that start at the same time wait for each other.

    Raises:
        SchemaRejected: newer code has migrated the database.
    """
    revisions = sorted(path.stem.partition("_")[0] for path in (STEPS / "versions").glob("[0-9]*.py"))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        stored = _version(connection)
        if stored == revisions[-1]:
            return
        if stored is not None and stored not in revisions:
            raise SchemaRejected(
                f"the database has the newer schema {stored}, this version supports {revisions[-1]}: "
                "update the service, or restore a backup"
            )
        _upgrade(connection)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if version is None else str(version)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(STEPS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
