"""Queries: engines in order of risk, histories, and the predictions that statistics use. They change nothing."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, or_, select

from model.windows import Readings
from service.store.records import CountedPredictions, EngineHistory, EnginePage, EngineQuery, StoredModel
from service.store.sql.session import parts, read_stored_model
from service.store.sql.tables import engines, layouts, models, predictions, readings

PARTITION_ROWS = 4096  # predictions that exist as Python objects at the same time, where all are read
PROBE_BYTES = 16_384  # more than the free space in pages that are not full
_PREDICTION_COLUMNS = [
    predictions.c[name] for name in ("engine", "cycle", "created_at", "model", "temperature", "logits", "rul")
]


def page(connection: Connection, query: EngineQuery) -> EnginePage:
    """Return a page of engines with the latest prediction of each, in descending order of risk."""
    conditions: list[ColumnElement[bool]] = [engines.c.latest.is_not(None)]
    conditions += [engines.c.health == query.health] if query.health is not None else []
    conditions += [engines.c.failed_at.is_(None)] if query.running else []
    latest = select(engines.c.engine_id, engines.c.risk, engines.c.failed_at, *_PREDICTION_COLUMNS)
    latest = latest.join(predictions, predictions.c.id == engines.c.latest)
    counting = select(func.count()).select_from(engines)
    if query.since is not None:
        conditions.append(or_(predictions.c.created_at >= query.since, engines.c.failure_reported_at >= query.since))
        counting = counting.join(predictions, predictions.c.id == engines.c.latest)
    total = connection.execute(counting.where(*conditions)).scalar_one()
    if query.after is not None:
        risk, name = query.after
        conditions.append(or_(engines.c.risk < risk, and_(engines.c.risk == risk, engines.c.engine_id > name)))
    ordered = latest.where(*conditions).order_by(engines.c.risk.desc(), engines.c.engine_id).limit(query.limit + 1)
    rows = list(connection.execute(ordered))
    has_more, rows = len(rows) > query.limit, rows[: query.limit]
    trend = _read_trend(connection, [row.engine for row in rows], query.trend) if query.trend else None
    return EnginePage(rows, all_kinds(connection), total, has_more, trend)


def _read_trend(connection: Connection, ids: Sequence[int], cycles: int) -> list[Row[Any]]:
    rows: list[Row[Any]] = []
    c = predictions.c
    columns = select(c.engine, c.cycle, c.model, c.temperature, c.logits).join(engines, engines.c.id == c.engine)
    within = (c.cycle > engines.c.latest_cycle - cycles, c.cycle <= engines.c.latest_cycle, c.is_latest)
    for part in parts(ids):
        rows.extend(connection.execute(columns.where(c.engine.in_(part), *within).order_by(c.engine, c.cycle)))
    return rows


def history(connection: Connection, engine_id: str, superseded: bool) -> EngineHistory | None:
    """Return every prediction of an engine; None for an unknown engine."""
    c = engines.c
    engine = connection.execute(select(c.id, c.failed_at).where(c.engine_id == engine_id)).first()
    if engine is None:
        return None
    conditions = [predictions.c.engine == engine.id] + ([] if superseded else [predictions.c.is_latest])
    ordered = select(predictions).where(*conditions).order_by(predictions.c.cycle.nulls_last(), predictions.c.id)
    return EngineHistory(list(connection.execute(ordered)), all_kinds(connection), engine.failed_at)


def flights(
    connection: Connection, engine_id: str, channels: tuple[str, ...], limit: int
) -> tuple[list[int], Readings]:
    """Return the newest flights of an engine with these channels: ascending cycles, and readings (N, channels)."""
    c, names = readings.c, json.dumps(channels)
    statement = (
        select(c.cycle, c.telemetry).join(engines, engines.c.id == c.engine).join(layouts, layouts.c.id == c.layout)
    )
    statement = statement.where(engines.c.engine_id == engine_id, layouts.c.channels == names)
    rows = connection.execute(statement.order_by(c.cycle.desc()).limit(limit)).all()[::-1]
    values = np.frombuffer(b"".join(row.telemetry for row in rows), dtype=np.float32)
    return [row.cycle for row in rows], values.reshape(len(rows), len(channels))  # a foreign model may have no channels


def all_kinds(connection: Connection) -> dict[int, StoredModel]:
    """Return every stored model by id."""
    return {row.id: read_stored_model(row) for row in connection.execute(select(models))}


def counted(connection: Connection, digest: str, classes: int, since: float | None) -> CountedPredictions:
    """Return the predictions of one model that statistics use, since a time in seconds since 1970; None for all."""
    c = predictions.c
    columns = (c.logits, c.temperature, c.label, c.engine, c.created_at, c.labelled, c.source, c.feature_bins)
    conditions = [c.is_latest, models.c.digest == digest] + ([c.created_at >= since] if since is not None else [])
    statement = (
        select(*columns).join(models, models.c.id == c.model).join(engines, engines.c.id == c.engine).where(*conditions)
    )
    ordered = statement.order_by(engines.c.engine_id, c.cycle.nulls_last(), c.id).execution_options(
        yield_per=PARTITION_ROWS
    )
    partitions = connection.execute(ordered).partitions()
    converted = [_column_arrays(rows, classes) for rows in partitions] or [_column_arrays([], classes)]
    logits, temperature, label, engine, created_at, labelled, source, bins = zip(*converted, strict=True)
    engine_ids = np.concatenate(engine)
    return CountedPredictions(
        np.concatenate(logits),
        np.concatenate(temperature),
        np.concatenate(label),
        np.cumsum(np.diff(engine_ids, prepend=engine_ids[:1]) != 0),
        np.concatenate(created_at),
        np.concatenate(labelled),
        np.concatenate(source),
        b"".join(bins),
    )


def _column_arrays(rows: Sequence[Any], classes: int) -> tuple[Any, ...]:
    """Convert the columns of rows to arrays, in the order in which `counted` selects them."""
    columns: Sequence[Any] = list(zip(*rows, strict=True)) or [()] * 8
    logits, temperature, label, engine, created_at, labelled, source, bins = columns
    no_label, nan = np.full(classes, np.nan).tobytes(), float("nan")
    return (
        np.frombuffer(b"".join(logits), dtype=np.float32).reshape(-1, classes).astype(np.float64),
        np.array(temperature, dtype=np.float64),
        np.frombuffer(b"".join(no_label if values is None else values for values in label)).reshape(-1, classes),
        np.array(engine, dtype=np.int64),
        np.array(created_at, dtype=np.float64),
        np.array([nan if seconds is None else seconds for seconds in labelled], dtype=np.float64),
        np.array([-1 if index is None else index for index in source], dtype=np.int64),
        b"".join(indices for indices in bins if indices is not None),
    )


def prove(connection: Connection, items: Sequence[None]) -> list[None]:
    """Verify that rows can be written: insert and delete some. On a full disk, an empty commit would succeed."""
    digest = {"digest": os.urandom(32).hex()}
    connection.execute(insert(models), digest | {"manifest": os.urandom(PROBE_BYTES // 2).hex()})
    connection.execute(delete(models).where(models.c.digest == digest["digest"]))
    return [None for _ in items]
