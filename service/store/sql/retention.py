"""Delete expired predictions, flights and labels, a limited number in each transaction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, Connection, Table, bindparam, delete, exists, func, or_, select, tuple_, update

from model.numerics import log_softmax
from service.store.sql.session import MAX_STATEMENT_VALUES, parts
from service.store.sql.tables import engines, predictions, readings, truths

PRUNE_ROWS = 1000  # of a table in one transaction, so that no other transaction waits for a large one
_HAS_PREDICTION = or_(
    exists().where(predictions.c.engine == truths.c.engine, predictions.c.cycle == truths.c.cycle),
    exists().where(predictions.c.id == truths.c.prediction),
)
_LATEST = ("latest", "latest_cycle", "health", "risk")
_UPDATE_LATEST = (
    update(engines).where(engines.c.id == bindparam("key")).values({name: bindparam(name) for name in _LATEST})
)


class ExpiredRows(NamedTuple):
    """The rows to delete: those from before a time, of these engines."""

    before: float
    engines: list[int]


def _expired(before: float) -> dict[Table, ColumnElement[bool]]:
    """Return the condition of expired rows by table. A label does not expire while a prediction of it is stored."""
    return {
        predictions: predictions.c.created_at < before,
        readings: readings.c.received_at < before,
        truths: (truths.c.received_at < before) & ~_HAS_PREDICTION,
    }


def find_expired(connection: Connection, before: float) -> ExpiredRows:
    """Find at most `MAX_STATEMENT_VALUES` engines with expired rows, to lock them before the deletion."""
    ids: set[int] = set()
    for table, expired in _expired(before).items():
        ids |= set(connection.execute(select(table.c.engine).where(expired).limit(PRUNE_ROWS)).scalars())
    return ExpiredRows(before, sorted(ids)[:MAX_STATEMENT_VALUES])


def delete_expired(connection: Connection, items: Sequence[ExpiredRows]) -> list[int]:
    """Delete expired rows, a limited number of each table, and return the number of deleted rows.

    The revision of an engine increases with its deleted flights, so cached tails of it become stale.
    """
    return [_delete_rows(connection, item) for item in items]


def _delete_rows(connection: Connection, item: ExpiredRows) -> int:
    deleted = 0
    for table, expired in _expired(item.before).items():
        keys = list(table.primary_key.columns)
        statement = select(*keys).where(table.c.engine.in_(item.engines), expired).limit(PRUNE_ROWS)
        rows = [tuple(row) for row in connection.execute(statement)]
        for part in parts(rows, 200):
            deleted += connection.execute(delete(table).where(tuple_(*keys).in_(part))).rowcount
            if table is predictions:
                _update_latest(connection, [key for (key,) in part])
            if table is readings:
                ids = sorted({engine for engine, _ in part})
                connection.execute(update(engines).where(engines.c.id.in_(ids)).values(revision=engines.c.revision + 1))
    return deleted


def _update_latest(connection: Connection, deleted: Sequence[str]) -> None:
    """Set the latest prediction of engines whose latest one was deleted to the newest remaining one."""
    ids = list(connection.execute(select(engines.c.id).where(engines.c.latest.in_(deleted))).scalars())
    if not ids:
        return
    c = predictions.c
    order = (c.cycle.desc().nulls_last(), c.id.desc())
    rank = func.row_number().over(partition_by=c.engine, order_by=order).label("rank")
    ranked = (
        select(c.engine, c.id, c.cycle, c.temperature, c.logits, rank).where(c.engine.in_(ids), c.is_latest).subquery()
    )
    empty = dict.fromkeys(_LATEST)
    latest = {engine: {"key": engine} | empty for engine in ids}
    for row in connection.execute(select(ranked).where(ranked.c.rank == 1)):
        logits = np.frombuffer(row.logits, dtype=np.float32)
        risk = float(np.exp(log_softmax(logits, row.temperature))[-1])
        latest[row.engine] = dict(
            zip(("key", *_LATEST), (row.engine, row.id, row.cycle, int(logits.argmax()), risk), strict=True)
        )
    connection.execute(_UPDATE_LATEST, list(latest.values()))
