"""Steps that writing transactions share: lock engines in one order, write them back, and store models.

Used by the writing thread only. Its caches are cleared whenever a transaction fails.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Select, Table, bindparam, select, update
from sqlalchemy.dialects import sqlite

from model.contract import Conformal, Manifest
from service.store.records import StoredModel
from service.store.sql.tables import engines, models

MAX_STATEMENT_VALUES = 500  # of one statement; every supported database accepts this number
Part = TypeVar("Part")


@dataclass
class EngineRow:
    """An engine, locked until the transaction ends; written back by `update_engines`."""

    id: int
    engine_id: str
    revision: int
    newest_cycle: int | None
    failed_at: int | None
    failure_reported_at: float | None
    truths: int
    latest: str | None
    latest_cycle: int | None
    health: int | None
    risk: float | None


_FIELDS = tuple(EngineRow.__dataclass_fields__)
_LOCKED = select(*(engines.c[name] for name in _FIELDS)).order_by(engines.c.engine_id).with_for_update()
_BY_NAME = _LOCKED.where(
    engines.c.engine_id.in_(bindparam("some", expanding=True))
)  # constructed once: construction costs more than execution
_BY_ID = _LOCKED.where(engines.c.id.in_(bindparam("some", expanding=True)))
_UPDATE = update(engines).where(engines.c.id == bindparam("key")).values({n: bindparam(n) for n in _FIELDS[2:]})


class WriteSession:
    """The caches of the writing thread, and the steps that several kinds of work share."""

    def __init__(self) -> None:
        self.generation = 0  # of the database; rows read in another generation are invalid
        self.layouts: dict[str, int] = {}  # by model
        self._models: dict[str, StoredModel] = {}
        self.models_by_id: dict[int, StoredModel] = {}

    def clear(self, replaced: bool = False) -> None:
        """Clear the caches after a failed transaction; `replaced` if the database may be another one from now on."""
        self.generation += replaced
        self.layouts.clear()
        self._models.clear()
        self.models_by_id.clear()

    def stored_model(self, connection: Connection, digest: str, manifest: Manifest) -> StoredModel:
        """Return the stored row of a model; add it if it is missing."""
        if digest not in self._models:
            stored_fields = {"name", "version", "classes", "rul_thresholds", "conformal", "temperature"}
            row = {"digest": digest, "manifest": manifest.model_dump_json(include=stored_fields)}
            connection.execute(insert_missing(connection, models), row)
            stored = connection.execute(select(models).where(models.c.digest == digest)).one()
            self._models[digest] = read_stored_model(stored)
            self.models_by_id.clear()  # without this model, its predictions would get no labels
        return self._models[digest]

    def engines(self, connection: Connection, names: Iterable[str]) -> dict[str, EngineRow]:
        """Return engines by name, locked; add missing ones."""
        wanted = sorted(set(names))
        by_name = dict[str, EngineRow]()
        for engine in _engines(connection, _BY_NAME, wanted):
            by_name[engine.engine_id] = engine
        if len(by_name) < len(wanted):
            missing = [name for name in wanted if name not in by_name]
            rows = [{"engine_id": name, "revision": 0, "truths": 0} for name in missing]
            connection.execute(insert_missing(connection, engines), rows)
            by_name |= {row.engine_id: row for row in _engines(connection, _BY_NAME, missing)}
        return by_name

    def engines_by_id(self, connection: Connection, ids: Iterable[int]) -> list[EngineRow]:
        """Return existing engines, locked."""
        return _engines(connection, _BY_ID, sorted(set(ids)))

    def update_engines(self, connection: Connection, rows: Iterable[EngineRow]) -> None:
        """Write engines back."""
        changed = []
        for row in rows:
            values = {"key": row.id}
            for name in _FIELDS[2:]:
                values[name] = getattr(row, name)
            changed.append(values)
        if changed:
            connection.execute(_UPDATE, changed)

    def stored_models(self, connection: Connection, ids: set[int]) -> dict[int, StoredModel]:
        """Return models by the id that predictions refer to."""
        if not ids <= set(self.models_by_id):
            self.models_by_id = {row.id: read_stored_model(row) for row in connection.execute(select(models))}
        return self.models_by_id


def read_stored_model(row: Row[Any]) -> StoredModel:
    """Return the model of a stored row."""
    manifest = json.loads(row.manifest)
    rule, thresholds = manifest["conformal"], manifest["rul_thresholds"]
    return StoredModel(
        row.id,
        row.digest,
        tuple(manifest["classes"]),
        tuple(thresholds) if thresholds else None,
        Conformal.model_validate(rule) if rule else None,
        manifest["temperature"],
    )


def parts(items: Sequence[Part], size: int = MAX_STATEMENT_VALUES) -> Iterator[Sequence[Part]]:
    """Yield slices of at most `size` items, because the number of values of a statement is limited."""
    return (items[i : i + size] for i in range(0, len(items), size))


def insert_missing(connection: Connection, table: Table) -> Any:
    """Return an insert that ignores rows that exist already."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # the import takes 0.1 s, which SQLite does not need

        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def _engines(connection: Connection, statement: Select[Any], values: Sequence[Any]) -> list[EngineRow]:
    rows = []
    for i in range(0, len(values), MAX_STATEMENT_VALUES):
        for row in connection.execute(statement, {"some": values[i : i + MAX_STATEMENT_VALUES]}):
            rows.append(EngineRow(*row))  # noqa: PERF401  # a comprehension is a frame of every request
    return rows
