"""Store labels that arrive after their predictions: of single cycles, and failures of engines. Both are idempotent."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, or_, select, tuple_, update

from model.numerics import Floats
from service.store.records import JoinedLabel, LabelResultKind, LabelResults, LabelSubmission, OutcomeResult
from service.store.sql.label_joins import Key, join_labels, read_labels
from service.store.sql.session import EngineRow, WriteSession, parts
from service.store.sql.tables import predictions, revisions, truths


class LabelWrite(NamedTuple):
    """Labels of one request, and the time when it arrived, in seconds since 1970."""

    rows: Sequence[LabelSubmission]
    received_at: float


class OutcomeSubmission(NamedTuple):
    """The last cycle of an engine that failed."""

    engine_id: str
    failed_at: int
    revise: bool
    received_at: float


_REVISE = (
    update(truths)
    .where(truths.c.id == bindparam("key"))
    .values({"label": bindparam("label"), "received_at": bindparam("received_at")})
)


@dataclass
class _Label:
    """A label in its current state within the transaction. `id` is None until it is stored."""

    engine: int
    values: Floats
    received_at: float
    id: int | None = None
    before: list[tuple[Floats, float]] = field(default_factory=list)  # replaced labels, and when each arrived


def record_labels(session: WriteSession, connection: Connection, items: Sequence[LabelWrite]) -> list[LabelResults]:
    """Store labels, and join them to their predictions."""
    cycles_by_id = _cycles_by_id(
        connection, {row.prediction_id for item in items for row in item.rows if row.prediction_id}
    )
    names = {row.engine_id for item in items for row in item.rows if row.engine_id and not row.prediction_id}
    by_name = session.engines(connection, names)
    others = {engine for engine, _ in cycles_by_id.values()} - {row.id for row in by_name.values()}
    rows = {row.id: row for row in [*by_name.values(), *session.engines_by_id(connection, others)]}
    keyed = [[(_label_key(row, cycles_by_id, by_name), row) for row in item.rows] for item in items]
    keys = {key for item in keyed for key, _ in item if key is not None}
    labels = {
        row.prediction or (row.engine, row.cycle): _Label(row.engine, np.frombuffer(row.label), row.received_at, row.id)
        for row in read_labels(connection, keys)
    }
    predicted = _keys_with_predictions(connection, keys)
    results = []
    for item, entries in zip(items, keyed, strict=True):
        of_request = [
            _apply_label(labels, predicted, key, row, item.received_at, cycles_by_id, rows) for key, row in entries
        ]
        results.append(LabelResults(of_request, []))
    now = max(item.received_at for item in items)
    _write_labels(connection, labels, now)
    changed = [key for key, label in labels.items() if label.id is None or label.before]
    results[0].joined.extend(_join_labels(session, connection, changed, rows, now))
    session.update_engines(connection, rows.values())
    return results


def record_outcomes(
    session: WriteSession, connection: Connection, items: Sequence[OutcomeSubmission]
) -> list[OutcomeResult]:
    """Store failures of engines, and label their histories."""
    by_name = session.engines(connection, (item.engine_id for item in items))
    results = []
    for item in items:
        engine = by_name[item.engine_id]
        if engine.failed_at == item.failed_at:
            results.append(OutcomeResult("unchanged", item.failed_at, 0, []))
            continue
        if engine.failed_at is not None and not item.revise:
            results.append(OutcomeResult("conflict", engine.failed_at, 0, []))
            continue
        result: LabelResultKind = (
            "revised" if engine.failed_at is not None else "joined" if engine.latest else "pending"
        )
        if engine.failed_at is not None:
            old = {
                "engine": engine.id,
                "failed_at": engine.failed_at,
                "received_at": engine.failure_reported_at,
                "revised": item.received_at,
            }
            connection.execute(insert(revisions), old)
        engine.failed_at, engine.failure_reported_at = item.failed_at, item.received_at
        joined = join_labels(session, connection, predictions.c.engine == engine.id, [engine], item.received_at)
        results.append(OutcomeResult(result, item.failed_at, len(joined), joined))
    session.update_engines(connection, by_name.values())
    return results


def _cycles_by_id(connection: Connection, ids: set[str]) -> dict[str, tuple[int, int | None]]:
    """Return engine and cycle of stored predictions by id."""
    columns = (predictions.c.id, predictions.c.engine, predictions.c.cycle)
    cycles_by_id = {}
    for part in parts(sorted(ids)):
        for row in connection.execute(select(*columns).where(predictions.c.id.in_(part))):
            cycles_by_id[row.id] = (row.engine, row.cycle)
    return cycles_by_id


def _label_key(
    row: LabelSubmission, cycles_by_id: dict[str, tuple[int, int | None]], by_name: dict[str, EngineRow]
) -> Key | None:
    """Return the key of a label: engine and cycle, or the id of a prediction without a cycle; None if it is unknown."""
    if row.prediction_id is None:
        assert row.engine_id is not None  # the caller gives one or the other
        assert row.cycle is not None
        return by_name[row.engine_id].id, row.cycle
    if row.prediction_id not in cycles_by_id:
        return None
    engine, cycle = cycles_by_id[row.prediction_id]
    return row.prediction_id if cycle is None else (engine, cycle)


def _keys_with_predictions(connection: Connection, keys: set[Key]) -> set[Key]:
    """Return the keys that have a prediction."""
    columns = (predictions.c.engine, predictions.c.cycle)
    predicted: set[Key] = {key for key in keys if isinstance(key, str)}
    for part in parts(sorted(key for key in keys if not isinstance(key, str))):
        predicted |= {
            (row.engine, row.cycle) for row in connection.execute(select(*columns).where(tuple_(*columns).in_(part)))
        }
    return predicted


def _apply_label(
    labels: dict[Key, _Label],
    predicted: set[Key],
    key: Key | None,
    row: LabelSubmission,
    received_at: float,
    cycles_by_id: dict[str, tuple[int, int | None]],
    rows: dict[int, EngineRow],
) -> tuple[LabelResultKind, Floats | None]:
    if key is None:
        return "unknown", None
    standing = labels.get(key)
    if standing is None:
        engine = key[0] if isinstance(key, tuple) else cycles_by_id[key][0]
        labels[key] = _Label(engine, row.label, received_at)
        rows[engine].truths += 1
        return "joined" if key in predicted else "pending", None
    if np.array_equal(standing.values, row.label):
        return "unchanged", None
    if not row.revise:
        return "conflict", standing.values
    standing.before.append((standing.values, standing.received_at))
    standing.values, standing.received_at = row.label, received_at
    return "revised", None


def _write_labels(connection: Connection, labels: dict[Key, _Label], now: float) -> None:
    new, changed, old = [], [], []
    for key, label in labels.items():
        cycle, prediction = (None, key) if isinstance(key, str) else (key[1], None)
        key_columns = {"engine": label.engine, "cycle": cycle, "prediction": prediction}
        if label.id is None:
            new.append(key_columns | {"label": label.values.tobytes(), "received_at": label.received_at})
        elif label.before:
            changed.append({"key": label.id, "label": label.values.tobytes(), "received_at": label.received_at})
        for values, received_at in label.before:
            old.append(key_columns | {"label": values.tobytes(), "received_at": received_at, "revised": now})
    if new:
        connection.execute(insert(truths), new)
    if changed:
        connection.execute(_REVISE, changed)
    if old:
        connection.execute(insert(revisions), old)


def _join_labels(
    session: WriteSession, connection: Connection, keys: Sequence[Key], rows: dict[int, EngineRow], now: float
) -> list[JoinedLabel]:
    """Join labels to their predictions."""
    joined = []
    for part in parts(keys):
        pairs = [key for key in part if not isinstance(key, str)]
        of_pairs = tuple_(predictions.c.engine, predictions.c.cycle).in_(pairs)
        where = or_(of_pairs, predictions.c.id.in_([key for key in part if isinstance(key, str)]))
        joined += join_labels(session, connection, where, rows.values(), now)
    return joined
