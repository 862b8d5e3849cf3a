"""The engines of everything that one transaction does, locked at once and in one order.

Each kind of work locks its own, in order; two kinds in a transaction would take e2 and then e1 while another process
takes e1 and then e2, and PostgreSQL needs a second to see that. SQLite has one writer and needs no locks.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, Connection, Integer, String, any_, bindparam, or_, select

from service.store.sql.flights import FlightWrite
from service.store.sql.labels import LabelWrite, OutcomeSubmission
from service.store.sql.predictions import PredictionWrite
from service.store.sql.retention import ExpiredRows
from service.store.sql.session import MOST_VALUES
from service.store.sql.tables import engines, predictions

_NAMES, _IDS = (bindparam("names", type_=ARRAY(String)), bindparam("ids", type_=ARRAY(Integer)))
_OWNERS = select(predictions.c.engine).where(predictions.c.id == any_(bindparam("made", type_=ARRAY(String))))
_LOCK = (  # of any number of engines: a statement for each part would have an order of its own
    select(engines.c.id)
    .where(or_(engines.c.engine_id == any_(_NAMES), engines.c.id == any_(_IDS)))
    .order_by(engines.c.engine_id)
    .with_for_update()
)


def lock_all(connection: Connection, together: Sequence[Sequence[Any]]) -> None:
    """Lock the engines of some items, which come by kind of work, where their work would take several statements.

    Engines that are not there yet are made by the work itself: two processes that make the same ones at once may
    still wait for each other, and one of them does it again.
    """
    if connection.dialect.name != "postgresql":
        return
    names, made, ids, statements = set[str](), set[str](), set[int](), 0
    for items in together:
        before = len(names)
        for item in items:
            _add(item, names, made, ids)
        statements += -(-(len(names) - before) // MOST_VALUES)  # what an earlier kind names is locked by then
    if ids or statements + len(made) > 1:
        ids |= set(connection.execute(_OWNERS, {"made": sorted(made)}).scalars()) if made else set()
        connection.execute(_LOCK, {"names": sorted(names), "ids": sorted(ids)})


def _add(item: Any, names: set[str], made: set[str], ids: set[int]) -> None:
    """What an item says of whose engine it is: a name, the id of a prediction, or the engine's number."""
    if isinstance(item, OutcomeSubmission):
        names.add(item.engine_id)
    elif isinstance(item, PredictionWrite):
        names.update(row.engine_id for row in item.rows)
    elif isinstance(item, FlightWrite):
        names.update(engine.tail.engine_id for engine in item.engines)
    elif isinstance(item, ExpiredRows):
        ids.update(item.engines)
    elif isinstance(item, LabelWrite):
        made.update(row.prediction_id for row in item.rows if row.prediction_id)
        names.update(row.engine_id for row in item.rows if row.engine_id and not row.prediction_id)
