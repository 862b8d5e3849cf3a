"""The database's schema, brought to what this code knows; a newer one is refused. Alembic loads only when needed."""

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from service.errors import SchemaRejected

STEPS = Path(__file__).parent / "migrations"
LOCK = 7_226_601  # PostgreSQL's advisory lock of this service: replicas that start together migrate in turn


def migrate(engine: Engine) -> None:
    """Take the steps that are missing, in one transaction; processes that start together wait for each other.

    Raises:
        SchemaRejected: the database was made by newer code.
    """
    known = sorted(path.stem.partition("_")[0] for path in (STEPS / "versions").glob("[0-9]*.py"))
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        found = _version(connection)
        if found == known[-1]:
            return
        if found is not None and found not in known:
            raise SchemaRejected(
                f"the database has schema {found}, this code knows {known[-1]}: it was made by newer code"
            )
        _upgrade(connection)


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(STEPS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
