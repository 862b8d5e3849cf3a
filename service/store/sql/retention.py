"""What is too old is forgotten: predictions, flights and truths, a little of each at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, Connection, Table, bindparam, delete, exists, func, or_, select, tuple_, update

from model.numerics import log_softmax
from service.store.sql.session import MOST_VALUES, parts
from service.store.sql.tables import engines, predictions, readings, truths

PRUNE_ROWS = 1000  # of a table in one transaction, so that nobody waits for a large one
_OF_TRUTH = or_(
    exists().where(predictions.c.engine == truths.c.engine, predictions.c.cycle == truths.c.cycle),
    exists().where(predictions.c.id == truths.c.prediction),
)
_LATEST = ("latest", "latest_cycle", "health", "risk")
_LEAD = update(engines).where(engines.c.id == bindparam("key")).values({name: bindparam(name) for name in _LATEST})


class ExpiredRows(NamedTuple):
    """What is to be forgotten: what is from before some time, of these engines."""

    before: float
    engines: list[int]


def _too_old(before: float) -> dict[Table, ColumnElement[bool]]:
    """Which rows of which table; a truth stays as long as a prediction that it is of."""
    return {
        predictions: predictions.c.created_at < before,
        readings: readings.c.received_at < before,
        truths: (truths.c.received_at < before) & ~_OF_TRUTH,
    }


def find_expired(connection: Connection, before: float) -> ExpiredRows:
    """Some of the engines of which something is to be forgotten, so that they can be locked before it is."""
    found: set[int] = set()
    for table, old in _too_old(before).items():
        found |= set(connection.execute(select(table.c.engine).where(old).limit(PRUNE_ROWS)).scalars())
    return ExpiredRows(before, sorted(found)[:MOST_VALUES])


def delete_expired(connection: Connection, items: Sequence[ExpiredRows]) -> list[int]:
    """Forget predictions, flights and truths, a little of each; how much it was.

    Who remembers flights reads them again.
    """
    return [_pruned(connection, item) for item in items]


def _pruned(connection: Connection, item: ExpiredRows) -> int:
    gone = 0
    for table, old in _too_old(item.before).items():
        keys = list(table.primary_key.columns)
        asked = select(*keys).where(table.c.engine.in_(item.engines), old).limit(PRUNE_ROWS)
        found = [tuple(row) for row in connection.execute(asked)]
        for part in parts(found, 200):
            gone += connection.execute(delete(table).where(tuple_(*keys).in_(part))).rowcount
            if table is predictions:
                _lead(connection, [key for (key,) in part])
            if table is readings:
                ids = sorted({engine for engine, _ in part})
                connection.execute(update(engines).where(engines.c.id.in_(ids)).values(revision=engines.c.revision + 1))
    return gone


def _lead(connection: Connection, gone: Sequence[str]) -> None:
    """Of engines whose latest prediction is gone, let the newest that is left be the latest."""
    which = list(connection.execute(select(engines.c.id).where(engines.c.latest.in_(gone))).scalars())
    if not which:
        return
    c = predictions.c
    order = (c.cycle.desc().nulls_last(), c.id.desc())
    rank = func.row_number().over(partition_by=c.engine, order_by=order).label("rank")
    left = (
        select(c.engine, c.id, c.cycle, c.temperature, c.logits, rank)
        .where(c.engine.in_(which), c.is_latest)
        .subquery()
    )
    none = dict.fromkeys(_LATEST)
    found = {engine: {"key": engine} | none for engine in which}
    for row in connection.execute(select(left).where(left.c.rank == 1)):
        logits = np.frombuffer(row.logits, dtype=np.float32)
        risk = float(np.exp(log_softmax(logits, row.temperature))[-1])
        found[row.engine] = dict(
            zip(("key", *_LATEST), (row.engine, row.id, row.cycle, int(logits.argmax()), risk), strict=True)
        )
    connection.execute(_LEAD, list(found.values()))
