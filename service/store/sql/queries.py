"""What is looked up: engines worst first, histories, everything that calibration is measured on. Changes nothing."""

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

AT_ONCE = 4096  # predictions that are objects at one time, where all are counted
PROOF_BYTES = 16_384  # more than there is room for in pages that are not full
_ANSWER = [predictions.c[name] for name in ("engine", "cycle", "created_at", "model", "temperature", "logits", "rul")]


def page(connection: Connection, asked: EngineQuery) -> EnginePage:
    """The latest prediction of every engine, the worst first."""
    which: list[ColumnElement[bool]] = [engines.c.latest.is_not(None)]
    which += [engines.c.health == asked.health] if asked.health is not None else []
    which += [engines.c.failed_at.is_(None)] if asked.running else []
    latest = select(engines.c.engine_id, engines.c.risk, engines.c.failed_at, *_ANSWER)
    latest = latest.join(predictions, predictions.c.id == engines.c.latest)
    counting = select(func.count()).select_from(engines)
    if asked.since is not None:
        which.append(or_(predictions.c.created_at >= asked.since, engines.c.failure_reported_at >= asked.since))
        counting = counting.join(predictions, predictions.c.id == engines.c.latest)
    total = connection.execute(counting.where(*which)).scalar_one()
    if asked.after is not None:
        risk, name = asked.after
        which.append(or_(engines.c.risk < risk, and_(engines.c.risk == risk, engines.c.engine_id > name)))
    ordered = latest.where(*which).order_by(engines.c.risk.desc(), engines.c.engine_id).limit(asked.limit + 1)
    rows = list(connection.execute(ordered))
    more, rows = len(rows) > asked.limit, rows[: asked.limit]
    trend = _trend(connection, [row.engine for row in rows], asked.trend) if asked.trend else None
    return EnginePage(rows, all_kinds(connection), total, more, trend)


def _trend(connection: Connection, ids: Sequence[int], cycles: int) -> list[Row[Any]]:
    found: list[Row[Any]] = []
    c = predictions.c
    columns = select(c.engine, c.cycle, c.model, c.temperature, c.logits).join(engines, engines.c.id == c.engine)
    within = (c.cycle > engines.c.latest_cycle - cycles, c.cycle <= engines.c.latest_cycle, c.is_latest)
    for part in parts(ids):
        found.extend(connection.execute(columns.where(c.engine.in_(part), *within).order_by(c.engine, c.cycle)))
    return found


def history(connection: Connection, engine_id: str, superseded: bool) -> EngineHistory | None:
    """Every prediction of an engine; None for an engine that nothing is known of."""
    c = engines.c
    engine = connection.execute(select(c.id, c.failed_at).where(c.engine_id == engine_id)).first()
    if engine is None:
        return None
    which = [predictions.c.engine == engine.id] + ([] if superseded else [predictions.c.is_latest])
    asked = select(predictions).where(*which).order_by(predictions.c.cycle.nulls_last(), predictions.c.id)
    return EngineHistory(list(connection.execute(asked)), all_kinds(connection), engine.failed_at)


def flights(connection: Connection, engine_id: str, channels: tuple[str, ...], most: int) -> tuple[list[int], Readings]:
    """The newest flights of an engine that have these channels: their cycles, rising, and readings (N, channels)."""
    c, names = readings.c, json.dumps(channels)
    asked = select(c.cycle, c.telemetry).join(engines, engines.c.id == c.engine).join(layouts, layouts.c.id == c.layout)
    asked = asked.where(engines.c.engine_id == engine_id, layouts.c.channels == names)
    rows = connection.execute(asked.order_by(c.cycle.desc()).limit(most)).all()[::-1]
    values = np.frombuffer(b"".join(row.telemetry for row in rows), dtype=np.float32)
    return [row.cycle for row in rows], values.reshape(len(rows), len(channels))  # a foreign model may name none


def all_kinds(connection: Connection) -> dict[int, StoredModel]:
    """Every model that ever predicted."""
    return {row.id: read_stored_model(row) for row in connection.execute(select(models))}


def counted(connection: Connection, digest: str, classes: int, since: float | None) -> CountedPredictions:
    """Every prediction of one model that counts, made since some time in seconds since 1970."""
    c = predictions.c
    columns = (c.logits, c.temperature, c.label, c.engine, c.created_at, c.labelled, c.source, c.feature_bins)
    which = [c.is_latest, models.c.digest == digest] + ([c.created_at >= since] if since is not None else [])
    asked = select(*columns).join(models, models.c.id == c.model).join(engines, engines.c.id == c.engine).where(*which)
    ordered = asked.order_by(engines.c.engine_id, c.cycle.nulls_last(), c.id).execution_options(yield_per=AT_ONCE)
    found = [_columns(rows, classes) for rows in connection.execute(ordered).partitions()] or [_columns([], classes)]
    logits, temperature, label, engine, made, labelled, source, inputs = zip(*found, strict=True)
    numbers = np.concatenate(engine)
    return CountedPredictions(
        np.concatenate(logits),
        np.concatenate(temperature),
        np.concatenate(label),
        np.cumsum(np.diff(numbers, prepend=numbers[:1]) != 0),
        np.concatenate(made),
        np.concatenate(labelled),
        np.concatenate(source),
        b"".join(inputs),
    )


def _columns(rows: Sequence[Any], classes: int) -> tuple[Any, ...]:
    """Columns of some rows, in the order in which they are asked for."""
    columns: Sequence[Any] = list(zip(*rows, strict=True)) or [()] * 8
    logits, temperature, label, engine, made, labelled, source, inputs = columns
    unknown, nan = np.full(classes, np.nan).tobytes(), float("nan")
    return (
        np.frombuffer(b"".join(logits), dtype=np.float32).reshape(-1, classes).astype(np.float64),
        np.array(temperature, dtype=np.float64),
        np.frombuffer(b"".join(unknown if one is None else one for one in label)).reshape(-1, classes),
        np.array(engine, dtype=np.int64),
        np.array(made, dtype=np.float64),
        np.array([nan if one is None else one for one in labelled], dtype=np.float64),
        np.array([-1 if one is None else one for one in source], dtype=np.int64),
        b"".join(one for one in inputs if one is not None),
    )


def prove(connection: Connection, items: Sequence[None]) -> list[None]:
    """Write something and take it back: where the disk is full, committing nothing would prove nothing."""
    digest = {"digest": os.urandom(32).hex()}
    connection.execute(insert(models), digest | {"manifest": os.urandom(PROOF_BYTES // 2).hex()})
    connection.execute(delete(models).where(models.c.digest == digest["digest"]))
    return [None for _ in items]
