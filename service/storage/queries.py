"""What is looked up: engines worst first, histories, everything that calibration is measured on. Changes nothing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection, Row, and_, delete, exists, func, or_, select, tuple_, update

from model.numerics import Floats
from service.storage.book import Kind, parts, read_kind
from service.storage.tables import engines, models, predictions, readings, truths

PAGE = 100
PRUNE_ROWS = 1000  # of a table in one transaction, so that nobody waits for a large one
_OF_TRUTH = or_(
    exists().where(predictions.c.engine == truths.c.engine, predictions.c.cycle == truths.c.cycle),
    exists().where(predictions.c.id == truths.c.prediction),
)
_NO_LATEST = update(engines).values(latest=None, health=None, risk=None)  # its cycle stays: older ones may be there


class Page(NamedTuple):
    """Some engines, how many there are in all, and whether more follow."""

    rows: list[Row[Any]]
    kinds: dict[int, Kind]
    total: int
    more: bool


def page(connection: Connection, health: int | None, after: tuple[float, str] | None) -> Page:
    """The latest prediction of every engine, the worst first.

    Args:
        connection: to the database.
        health: only engines of this class.
        after: risk and engine_id of the last engine of the page before.
    """
    which = [engines.c.latest.is_not(None)] + ([engines.c.health == health] if health is not None else [])
    total = connection.execute(select(func.count()).select_from(engines).where(*which)).scalar_one()
    if after is not None:
        risk, name = after
        which.append(or_(engines.c.risk < risk, and_(engines.c.risk == risk, engines.c.engine_id > name)))
    asked = (
        select(engines.c.engine_id, engines.c.risk, *predictions.c)
        .join(predictions, predictions.c.id == engines.c.latest)
        .where(*which)
        .order_by(engines.c.risk.desc(), engines.c.engine_id)
        .limit(PAGE + 1)
    )
    rows = list(connection.execute(asked))
    return Page(rows[:PAGE], all_kinds(connection), total, len(rows) > PAGE)


def history(connection: Connection, engine_id: str, superseded: bool) -> tuple[list[Row[Any]], dict[int, Kind]] | None:
    """Every prediction of an engine, oldest cycle first; None for an engine that nothing is known of."""
    engine = connection.execute(select(engines.c.id).where(engines.c.engine_id == engine_id)).scalar()
    if engine is None:
        return None
    which = [predictions.c.engine == engine] + ([] if superseded else [predictions.c.counts])
    asked = select(predictions).where(*which).order_by(predictions.c.cycle.nulls_last(), predictions.c.id)
    return list(connection.execute(asked)), all_kinds(connection)


def all_kinds(connection: Connection) -> dict[int, Kind]:
    """Every model that ever predicted."""
    return {row.id: read_kind(row) for row in connection.execute(select(models))}


class Found(NamedTuple):
    """Predictions that count, by engine and cycle, so that the order of telling changes no bit of any figure.

    Labels (N, C), NaN where none is. Engines are numbered in the order of their names.
    """

    logits: Floats
    temperature: Floats
    label: Floats
    engine: Any
    made: Floats
    labelled: Floats
    source: Any
    inputs: list[bytes]  # the reference bins of each prediction that has them


def counted(connection: Connection, digest: str, classes: int, since: float | None) -> Found:
    """Every prediction of one model that counts, made since some time in seconds since 1970."""
    c = predictions.c
    columns = (c.logits, c.temperature, c.label, c.engine, c.made, c.labelled, c.source, c.inputs)
    which = [c.counts, models.c.digest == digest] + ([c.made >= since] if since is not None else [])
    asked = select(*columns).join(models, models.c.id == c.model).join(engines, engines.c.id == c.engine).where(*which)
    rows = connection.execute(asked.order_by(engines.c.engine_id, c.cycle.nulls_last(), c.id)).all()
    columns_ = list(zip(*rows, strict=True)) or [()] * len(columns)
    logits, temperature, label, engine, made, labelled, source, inputs = columns_
    unknown = np.full(classes, np.nan).tobytes()
    nan = float("nan")
    return Found(
        np.frombuffer(b"".join(logits), dtype=np.float32).reshape(-1, classes).astype(np.float64),
        np.array(temperature, dtype=np.float64),
        np.frombuffer(b"".join(unknown if one is None else one for one in label)).reshape(-1, classes),
        np.cumsum(np.diff(np.array(engine, dtype=np.int64), prepend=engine[:1]) != 0),
        np.array(made, dtype=np.float64),
        np.array([nan if one is None else one for one in labelled], dtype=np.float64),
        np.array([-1 if one is None else one for one in source], dtype=np.int64),
        [one for one in inputs if one is not None],
    )


def prune(connection: Connection, items: Sequence[float]) -> list[int]:
    """Forget predictions, flights and truths from before some time, a little of each; how much it was.

    A truth stays as long as a prediction that it is of. Who remembers flights reads them again.
    """
    before, gone = max(items), 0
    for table, old in (
        (predictions, predictions.c.made < before),
        (readings, readings.c.told < before),
        (truths, (truths.c.told < before) & ~_OF_TRUTH),
    ):
        keys = list(table.primary_key.columns)
        found = [tuple(row) for row in connection.execute(select(*keys).where(old).limit(PRUNE_ROWS))]
        for part in parts(found, 200):
            gone += connection.execute(delete(table).where(tuple_(*keys).in_(part))).rowcount
            if table is predictions:
                connection.execute(_NO_LATEST.where(engines.c.latest.in_([key for (key,) in part])))
            if table is readings:
                ids = sorted({engine for engine, _ in part})
                connection.execute(update(engines).where(engines.c.id.in_(ids)).values(revision=engines.c.revision + 1))
    return [gone for _ in items]
