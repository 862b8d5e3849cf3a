"""URLs of databases: check them, and add options of SQLite and PostgreSQL. Opens no connection."""

import urllib.parse

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError

from service.errors import SettingsRejected

SLOW_SECONDS = 10  # maximum time in which PostgreSQL connects, or executes one statement


def parse_url(text: str) -> URL:
    """Parse the URL of a database.

    Raises:
        SettingsRejected: it is not the URL of a database that this service supports.
    """
    try:
        url = make_url(text)
        kind = url.get_backend_name()
    except (ArgumentError, ValueError):
        raise SettingsRejected("ENGINE_HEALTH_DATABASE_URL: expected a URL like sqlite:///engine-health.db") from None
    if kind == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise SettingsRejected(
            f"ENGINE_HEALTH_DATABASE_URL: {kind[:40]} is not supported, expected sqlite or postgresql"
        )
    if url.database in (None, "", ":memory:"):
        raise SettingsRejected(
            "ENGINE_HEALTH_DATABASE_URL: expected the path of a file; an empty value disables the store"
        )
    return url.set(drivername="sqlite")


def existing_only(url: URL) -> URL:
    """Return the URL with an option of SQLite: reading a missing file does not create it."""
    if url.get_backend_name() != "sqlite":
        return url
    query = {**url.query, "mode": "rw", "uri": "true"}
    return url.set(database=f"file:{urllib.parse.quote(str(url.database))}", query=query)


def with_timeouts(url: URL) -> URL:
    """Return the URL with timeouts of PostgreSQL; options in the URL take precedence.

    A vanished host acknowledges nothing. With these options the kernel closes its connections, instead of after hours.
    """
    options = f"-c statement_timeout={SLOW_SECONDS}s {url.query.get('options', '')}".strip()
    slow = {"connect_timeout": str(SLOW_SECONDS), "tcp_user_timeout": str(SLOW_SECONDS * 1000)}  # milliseconds
    alive = {"keepalives_idle": "5", "keepalives_interval": "1", "keepalives_count": "5"}  # seconds
    return url.set(query={**slow, **alive, **url.query, "options": options})
