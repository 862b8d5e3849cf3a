"""Join labels to stored predictions: labels of inspections, failures and continued operation.

`labelling.derive_label` decides which label a prediction has. The functions here find the predictions that a new report
may label, write their labels, and return those that had none before.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, Row, bindparam, or_, select, tuple_, update

from model.numerics import Floats
from service.store.labelling import derive_label
from service.store.records import JoinedLabel
from service.store.sql.session import EngineRow, WriteSession, parts
from service.store.sql.tables import predictions, truths

Key = tuple[int, int] | str  # engine and cycle, or the id of a prediction without a cycle
_LABEL = (
    update(predictions)
    .where(predictions.c.id == bindparam("key"))
    .values({name: bindparam(name) for name in ("label", "source", "labelled")})
)


def join_labels(
    session: WriteSession, connection: Connection, where: ColumnElement[bool], rows: Iterable[EngineRow], now: float
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
    labels = read_inspections(connection, [(p.engine, p.cycle, p.id) for p in latest if by_id[p.engine].truths])
    kinds = session.stored_models(connection, {p.model for p in latest})
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
    session: WriteSession, connection: Connection, before: dict[int, int | None], rows: Iterable[EngineRow], now: float
) -> list[JoinedLabel]:
    """Join labels from continued operation. `before` is the newest cycle of each engine before this transaction."""
    firsts = []
    for kind in (session.models_by_id or session.stored_models(connection, {0})).values():
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
        joined += join_labels(session, connection, or_(*spans[i : i + 50]), running, now)
    return joined


def read_inspections(connection: Connection, keys: Iterable[tuple[int, int | None, str]]) -> dict[Key, Floats]:
    """Return reported labels of predictions, given as engine, cycle and id.

    The keys are engine and cycle, or the prediction id for a prediction without a cycle.
    """
    labels: dict[Key, Floats] = {}
    wanted = {(engine, cycle) if cycle is not None else name for engine, cycle, name in keys}
    for row in read_labels(connection, wanted):
        labels[row.prediction or (row.engine, row.cycle)] = np.frombuffer(row.label)
    return labels


def read_labels(connection: Connection, keys: Iterable[Key]) -> Iterator[Row[Any]]:
    """Yield the stored labels of some keys."""
    pairs, names = sorted(k for k in keys if isinstance(k, tuple)), sorted(k for k in keys if isinstance(k, str))
    for pair in parts(pairs):
        yield from connection.execute(select(truths).where(tuple_(truths.c.engine, truths.c.cycle).in_(pair)))
    for name in parts(names):
        yield from connection.execute(select(truths).where(truths.c.prediction.in_(name)))
