"""Lock all engines of one PostgreSQL transaction together and in one order.

Each kind of work locks its own engines in order. Two kinds in one transaction would take e2 and then e1, while another
process takes e1 and then e2. PostgreSQL needs 1 s to detect that.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, Connection, Integer, String, any_, bindparam, or_, select

from service.store.sql.flights import FlightWrite
from service.store.sql.labels import LabelWrite, OutcomeSubmission
from service.store.sql.predictions import PredictionWrite
from service.store.sql.retention import ExpiredRows
from service.store.sql.session import MAX_STATEMENT_VALUES
from service.store.sql.tables import engines, predictions

_NAMES, _IDS = (bindparam("names", type_=ARRAY(String)), bindparam("ids", type_=ARRAY(Integer)))
_OWNERS = select(predictions.c.engine).where(predictions.c.id == any_(bindparam("prediction_ids", type_=ARRAY(String))))
_LOCK = (  # any number of engines: with several statements the order would not be one order
    select(engines.c.id)
    .where(or_(engines.c.engine_id == any_(_NAMES), engines.c.id == any_(_IDS)))
    .order_by(engines.c.engine_id)
    .with_for_update()
)


def lock_all(connection: Connection, items_by_kind: Sequence[Sequence[Any]]) -> None:
    """Lock the engines of items, given by kind of work, if their work would need several statements for that.

    The work itself creates missing engines. Two processes that create the same ones concurrently may still wait for
    each other, and one of them is repeated.
    """
    names, prediction_ids, ids, statements = set[str](), set[str](), set[int](), 0
    for items in items_by_kind:
        before = len(names)
        for item in items:
            _add_keys(item, names, prediction_ids, ids)
        statements += -(-(len(names) - before) // MAX_STATEMENT_VALUES)  # without engines that an earlier kind locks
    if ids or statements + len(prediction_ids) > 1:
        if prediction_ids:
            ids |= set(connection.execute(_OWNERS, {"prediction_ids": sorted(prediction_ids)}).scalars())
        connection.execute(_LOCK, {"names": sorted(names), "ids": sorted(ids)})


def _add_keys(item: Any, names: set[str], prediction_ids: set[str], ids: set[int]) -> None:
    """Add what identifies the engines of an item: names, prediction ids, or numbers in the table of engines."""
    if isinstance(item, OutcomeSubmission):
        names.add(item.engine_id)
    elif isinstance(item, PredictionWrite):
        names.update(row.engine_id for row in item.rows)
    elif isinstance(item, FlightWrite):
        names.update(engine.tail.engine_id for engine in item.engines)
    elif isinstance(item, ExpiredRows):
        ids.update(item.engines)
    elif isinstance(item, LabelWrite):
        prediction_ids.update(row.prediction_id for row in item.rows if row.prediction_id)
        names.update(row.engine_id for row in item.rows if row.engine_id and not row.prediction_id)
