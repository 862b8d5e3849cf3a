"""Store predictions, and join them with labels that are stored already."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, update

from model.contract import Manifest
from model.numerics import Floats
from service.store.labelling import LabelSource, derive_label
from service.store.records import JoinedLabel, LabelResultKind, StoredModel
from service.store.sql.label_joins import Key, join_survivors, read_inspections
from service.store.sql.session import EngineRow, WriteSession
from service.store.sql.tables import predictions, truths


class NewPrediction(NamedTuple):
    """One prediction of an engine. `label` arrived in the same request."""

    id: str
    engine_id: str
    cycle: int | None
    logits: bytes
    rul: float | None
    health: int
    risk: float
    label: Floats | None
    feature_bins: bytes | None = None  # the reference bin of each channel's newest reading, one byte each


class PredictionWriteResult(NamedTuple):
    """Labels that were stored before, and the results of labels that arrived with predictions, by prediction id.

    A label that contradicts an earlier one is a conflict. Its result has the earlier label.
    """

    joined: list[JoinedLabel]
    label_results: dict[str, tuple[LabelResultKind, Floats | None]]


class ModelVersion(NamedTuple):
    """The model of a prediction, its temperature, and the source of that temperature."""

    digest: str
    manifest: Manifest
    temperature: float
    source: str


class PredictionWrite(NamedTuple):
    """Predictions of one request. `created_at` is in seconds since 1970; `from_flight`: they belong to flights."""

    by: ModelVersion
    created_at: float
    rows: Sequence[NewPrediction]
    from_flight: bool = False


_ADD = insert(predictions)
_SUPERSEDE = (
    update(predictions)
    .where(
        predictions.c.engine == bindparam("engine_key"),
        predictions.c.cycle == bindparam("at_cycle"),
        predictions.c.is_latest.is_(True),
    )
    .values(is_latest=False)
)


def record_predictions(
    session: WriteSession, connection: Connection, items: Sequence[PredictionWrite]
) -> list[PredictionWriteResult]:
    """Store predictions. The latest one of each engine and cycle replaces earlier ones."""
    names, before = list[str](), dict[int, int | None]()
    for item in items:
        for row in item.rows:
            names.append(row.engine_id)  # a comprehension is a frame of every request
    by_name = session.engines(connection, names)
    for engine in by_name.values():
        before[engine.id] = engine.newest_cycle
    joined, label_results = add_predictions(session, connection, items, by_name)
    advanced = []
    for engine in by_name.values():
        if engine.newest_cycle != before[engine.id]:
            advanced.append(engine)  # noqa: PERF401  # as above
    if advanced:
        joined += join_survivors(session, connection, before, advanced, max([item.created_at for item in items]))
    session.update_engines(connection, by_name.values())
    return [PredictionWriteResult(joined if k == 0 else [], label_results) for k in range(len(items))]


def add_predictions(
    session: WriteSession, connection: Connection, items: Sequence[PredictionWrite], by_name: dict[str, EngineRow]
) -> PredictionWriteResult:
    """Store predictions of engines that are locked already. The caller updates the engines."""
    every = list[tuple[PredictionWrite, StoredModel, NewPrediction]]()
    last, labelled = dict[tuple[str, int | None], str](), False  # the last prediction of each engine and cycle
    for item in items:
        kind = session.stored_model(connection, item.by.digest, item.by.manifest)
        for row in item.rows:
            every.append((item, kind, row))
            last[row.engine_id, row.cycle] = row.id
            labelled = labelled or row.label is not None
    repeated = _repeated_cycles(every, by_name)
    if repeated:
        connection.execute(_SUPERSEDE, repeated)
    for _, _, row in every:
        engine = by_name[row.engine_id]
        if row.cycle is not None and (engine.newest_cycle is None or row.cycle > engine.newest_cycle):
            engine.newest_cycle = row.cycle
    label_results = _store_labels(connection, every, by_name) if labelled else {}
    inspection_keys = []
    for _, _, row in every:
        engine = by_name[row.engine_id]
        if engine.truths:
            inspection_keys.append((engine.id, row.cycle, row.id))
    labels = read_inspections(connection, inspection_keys) if inspection_keys else {}
    rows, joined = [], []
    for item, kind, row in every:
        engine = by_name[row.engine_id]
        inspected = labels.get((engine.id, row.cycle) if row.cycle is not None else row.id) if labels else None
        derived = derive_label(
            inspected, row.cycle, engine.failed_at, engine.newest_cycle, kind.thresholds, len(kind.classes)
        )
        is_latest = row.cycle is None or last[row.engine_id, row.cycle] == row.id
        rows.append(_stored(item, kind, row, engine.id, is_latest, derived))
        if derived is not None and (row.label is None or label_results[row.id][0] == "conflict"):
            joined.append(
                JoinedLabel(
                    kind, row.logits, item.by.temperature, derived[0].tobytes(), item.created_at, item.created_at
                )
            )
        if row.cycle is None or engine.latest_cycle is None or row.cycle >= engine.latest_cycle:
            engine.latest, engine.health, engine.risk = row.id, row.health, row.risk
            engine.latest_cycle = engine.latest_cycle if row.cycle is None else row.cycle
    connection.execute(_ADD, rows)
    return PredictionWriteResult(joined, label_results)


def _repeated_cycles(
    every: Sequence[tuple[PredictionWrite, StoredModel, NewPrediction]], by_name: dict[str, EngineRow]
) -> list[dict[str, int]]:
    """Return engines and cycles that may have an earlier prediction: those not newer than the engine's latest."""
    pairs = set()
    for _, _, row in every:
        latest = by_name[row.engine_id].latest_cycle
        if row.cycle is not None and latest is not None and row.cycle <= latest:
            pairs.add((by_name[row.engine_id].id, row.cycle))
    return [{"engine_key": engine, "at_cycle": cycle} for engine, cycle in sorted(pairs)] if pairs else []


def _store_labels(
    connection: Connection,
    every: Sequence[tuple[PredictionWrite, StoredModel, NewPrediction]],
    by_name: dict[str, EngineRow],
) -> dict[str, tuple[LabelResultKind, Floats | None]]:
    """Store the labels that arrived with predictions, and return their results. Earlier labels take precedence."""
    labelled = [(item, row, row.label, by_name[row.engine_id]) for item, _, row in every if row.label is not None]
    keys = [(engine.id, row.cycle, row.id) for _, row, _, engine in labelled if engine.truths]
    labels = read_inspections(connection, keys)
    new: list[dict[str, object]] = []
    results: dict[str, tuple[LabelResultKind, Floats | None]] = {}
    for item, row, label, engine in labelled:
        key: Key = (engine.id, row.cycle) if row.cycle is not None else row.id
        standing = labels.setdefault(key, label)
        if standing is label:
            results[row.id] = ("joined", None)
            engine.truths += 1
            name = row.id if row.cycle is None else None
            key_columns = {"engine": engine.id, "cycle": row.cycle, "prediction": name}
            new.append(key_columns | {"label": label.tobytes(), "received_at": item.created_at})
        else:
            results[row.id] = ("unchanged", None) if np.array_equal(standing, label) else ("conflict", standing)
    if new:
        connection.execute(insert(truths), new)
    return results


def _stored(
    item: PredictionWrite,
    kind: StoredModel,
    row: NewPrediction,
    engine: int,
    is_latest: bool,
    label: tuple[Floats, LabelSource] | None,
) -> dict[str, object]:
    return {
        "id": row.id,
        "engine": engine,
        "cycle": row.cycle,
        "created_at": item.created_at,
        "model": kind.id,
        "temperature": item.by.temperature,
        "temperature_source": item.by.source,
        "logits": row.logits,
        "rul": row.rul,
        "feature_bins": row.feature_bins,
        "is_latest": is_latest,
        "label": None if label is None else np.asarray(label[0]).tobytes(),
        "source": None if label is None else int(label[1]),
        "labelled": None if label is None else item.created_at,
        "from_flight": item.from_flight,
    }
