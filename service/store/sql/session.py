"""Steps that writing transactions share: lock engines in one order, store models, join labels to predictions.

Used by the writing thread only. Its caches are cleared whenever a transaction fails.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import ColumnElement, Connection, Row, Select, Table, bindparam, or_, select, tuple_, update
from sqlalchemy.dialects import sqlite

from model.contract import Conformal, Manifest
from model.numerics import Floats
from service.store.labelling import derive_label
from service.store.records import JoinedLabel, StoredModel
from service.store.sql.tables import engines, models, predictions, truths

MOST_VALUES = 500  # of one statement; every supported database accepts this number
Part = TypeVar("Part")
Key = tuple[int, int] | str  # engine and cycle, or the id of a prediction without a cycle


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
_LABEL = (
    update(predictions)
    .where(predictions.c.id == bindparam("key"))
    .values({name: bindparam(name) for name in ("label", "source", "labelled")})
)


class WriteSession:
    """The caches of the writing thread, and the steps that several kinds of work share."""

    def __init__(self) -> None:
        self.generation = 0  # of the database; rows read in another generation are invalid
        self.layouts: dict[str, int] = {}  # by model
        self._models: dict[str, StoredModel] = {}
        self._by_id: dict[int, StoredModel] = {}

    def clear(self, replaced: bool = False) -> None:
        """Clear the caches after a failed transaction; `replaced` if the database may be another one from now on."""
        self.generation += replaced
        self.layouts.clear()
        self._models.clear()
        self._by_id.clear()

    def stored_model(self, connection: Connection, digest: str, manifest: Manifest) -> StoredModel:
        """Return the stored row of a model; add it if it is missing."""
        if digest not in self._models:
            stored_fields = {"name", "version", "classes", "rul_thresholds", "conformal", "temperature"}
            row = {"digest": digest, "manifest": manifest.model_dump_json(include=stored_fields)}
            connection.execute(insert_missing(connection, models), row)
            stored = connection.execute(select(models).where(models.c.digest == digest)).one()
            self._models[digest] = read_stored_model(stored)
            self._by_id.clear()  # it lacks this model: its predictions would get no labels from continued operation
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

    def join_labels(
        self, connection: Connection, where: ColumnElement[bool], rows: Iterable[EngineRow], now: float
    ) -> list[JoinedLabel]:
        """Derive the labels of predictions of some engines again, and return labels of predictions that had none."""
        by_id = {row.id: row for row in rows}
        columns = [
            predictions.c[n]
            for n in (
                "id",
                "engine",
                "cycle",
                "created_at",
                "model",
                "temperature",
                "logits",
                "label",
                "source",
                "labelled",
            )
        ]
        latest = connection.execute(select(*columns).where(where, predictions.c.is_latest)).all()
        labels = inspections(connection, [(p.engine, p.cycle, p.id) for p in latest if by_id[p.engine].truths])
        kinds = self.stored_models(connection, {p.model for p in latest})
        changed, joined = [], []
        for p in latest:
            engine, kind = by_id[p.engine], kinds[p.model]
            inspected = labels.get((p.engine, p.cycle) if p.cycle is not None else p.id)
            derived = derive_label(
                inspected, p.cycle, engine.failed_at, engine.newest_cycle, kind.thresholds, len(kind.classes)
            )
            label = None if derived is None else derived[0].tobytes()
            source = None if derived is None else int(derived[1])
            if (label, source) == (p.label, p.source):
                continue
            when = p.labelled if label == p.label else None if label is None else max(now, p.created_at)
            changed.append({"key": p.id, "label": label, "source": source, "labelled": when})
            if p.label is None and label is not None:
                joined.append(JoinedLabel(kind, p.logits, p.temperature, label, p.created_at, max(now, p.created_at)))
        if changed:
            connection.execute(_LABEL, changed)
        return joined

    def join_survivors(
        self, connection: Connection, before: dict[int, int | None], rows: Iterable[EngineRow], now: float
    ) -> list[JoinedLabel]:
        """Join labels from continued operation. `before` is the newest cycle of each engine before this transaction."""
        firsts = []
        for kind in (self._by_id or self.stored_models(connection, {0})).values():
            if kind.thresholds:
                firsts.append(kind.thresholds[0])  # noqa: PERF401  # a comprehension is a frame of every request
        if not firsts:
            return []
        running, spans, cycle = [], [], predictions.c.cycle
        for row in rows:
            newest, old = row.newest_cycle, before[row.id]
            if row.failed_at is None and newest is not None and newest != old and newest > min(firsts):
                survived = (cycle >= (old or 0) - max(firsts)) & (cycle < newest - min(firsts))
                spans.append((predictions.c.engine == row.id) & survived & predictions.c.label.is_(None))
                running.append(row)
        joined = list[JoinedLabel]()
        for i in range(0, len(spans), 50):
            joined += self.join_labels(connection, or_(*spans[i : i + 50]), running, now)
        return joined

    def stored_models(self, connection: Connection, ids: set[int]) -> dict[int, StoredModel]:
        """Return models by the id that predictions refer to."""
        if not ids <= set(self._by_id):
            self._by_id = {row.id: read_stored_model(row) for row in connection.execute(select(models))}
        return self._by_id


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


def parts(items: Sequence[Part], size: int = MOST_VALUES) -> Iterator[Sequence[Part]]:
    """Yield slices of at most `size` items, because the number of values of a statement is limited."""
    return (items[i : i + size] for i in range(0, len(items), size))


def inspections(connection: Connection, keys: Iterable[tuple[int, int | None, str]]) -> dict[Key, Floats]:
    """Return reported labels of predictions, given as engine, cycle and id.

    The keys are engine and cycle, or the prediction id for a prediction without a cycle.
    """
    labels: dict[Key, Floats] = {}
    wanted = {(engine, cycle) if cycle is not None else name for engine, cycle, name in keys}
    for row in stored_labels(connection, wanted):
        labels[row.prediction or (row.engine, row.cycle)] = np.frombuffer(row.label)
    return labels


def stored_labels(connection: Connection, keys: Iterable[Key]) -> Iterator[Row[Any]]:
    """Yield the stored labels of some keys."""
    pairs, names = sorted(k for k in keys if isinstance(k, tuple)), sorted(k for k in keys if isinstance(k, str))
    for pair in parts(pairs):
        yield from connection.execute(select(truths).where(tuple_(truths.c.engine, truths.c.cycle).in_(pair)))
    for name in parts(names):
        yield from connection.execute(select(truths).where(truths.c.prediction.in_(name)))


def insert_missing(connection: Connection, table: Table) -> Any:
    """Return an insert that ignores rows that exist already."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # the import takes 0.1 s, which SQLite does not need

        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def _engines(connection: Connection, statement: Select[Any], values: Sequence[Any]) -> list[EngineRow]:
    rows = []
    for i in range(0, len(values), MOST_VALUES):
        for row in connection.execute(statement, {"some": values[i : i + MOST_VALUES]}):
            rows.append(EngineRow(*row))  # noqa: PERF401  # a comprehension is a frame of every request
    return rows
