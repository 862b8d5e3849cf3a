"""Store flights of engines together with their predictions, and read the tails that windows are built from.

Windows are built and predicted before the transaction. Every change of an engine's flights increases the revision of
the engine. So a window is current if the locked row still has the revision that the window was built from.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection, Row, bindparam, insert, select, tuple_

from model.windows import Readings
from service.store.records import JoinedLabel
from service.store.sql.flight_cache import EngineTail
from service.store.sql.label_joins import join_survivors
from service.store.sql.predictions import ModelVersion, NewPrediction, PredictionWrite, add_predictions
from service.store.sql.session import EngineRow, WriteSession, insert_missing, parts
from service.store.sql.tables import engines, layouts, models, predictions, readings

EngineCycle = tuple[str, int]
_NO_FLIGHTS = np.empty((0, 0), dtype=np.float32)

_ADD = insert(readings)
_FLIGHT = select(readings.c.cycle, readings.c.telemetry, readings.c.layout).where(readings.c.engine == bindparam("of"))
_BEFORE = _FLIGHT.where(readings.c.cycle < bindparam("at")).order_by(readings.c.cycle.desc()).limit(bindparam("most"))
_REVISIONS = select(engines.c.engine_id, engines.c.id, engines.c.revision).where(
    engines.c.engine_id.in_(bindparam("names", expanding=True))
)
_FROM = _FLIGHT.where(readings.c.cycle >= bindparam("at")).order_by(readings.c.cycle)


class TailRequest(NamedTuple):
    """A tail to be read: the window before a cycle, and every flight from that cycle on."""

    engine_id: str
    lowest_cycle: int
    window: int


CachedTail = tuple[TailRequest, EngineTail | None]  # a tail to be read, and the cached one if it may be current


class EngineFlights(NamedTuple):
    """New flights of one engine, as cycle and readings, and the tail that their windows were built from."""

    tail: TailRequest  # which covers them, to be read again if it is stale
    revision: int
    generation: int
    new: Sequence[tuple[int, Readings]]


class FlightWrite(NamedTuple):
    """The flights of one request and their predictions, which are stored together or not at all.

    `repeats` are flights that are stored already. They need a prediction in `predictions` only if none was stored for
    them by this model at this temperature. `received_at` is in seconds since 1970.
    """

    by: ModelVersion
    engines: Sequence[EngineFlights]
    predictions: Sequence[NewPrediction]
    repeats: Sequence[EngineCycle]
    received_at: float


class StoredPrediction(NamedTuple):
    """A prediction that was stored earlier."""

    id: str
    logits: bytes
    rul: float | None


class FlightWriteResult(NamedTuple):
    """Result of a write. Nothing of it is stored if there are `stale` tails or `unpredicted` repeats."""

    stale: dict[str, EngineTail]  # by engine: the stored tail, where windows were built from another one
    unpredicted: list[EngineCycle]  # repeats that lack a prediction
    earlier: dict[EngineCycle, StoredPrediction]  # of repeats
    stored: int  # predictions
    joined: list[JoinedLabel]  # predictions of the whole transaction whose label was known, in the first of its results


class _CheckedWrite(NamedTuple):
    """A write after comparison with the stored flights and predictions."""

    stale: list[TailRequest]
    unpredicted: list[EngineCycle]
    earlier: dict[EngineCycle, StoredPrediction]
    predictions: Sequence[NewPrediction]  # without those of repeats that have a prediction already


def record_flights(
    session: WriteSession, connection: Connection, items: Sequence[FlightWrite]
) -> list[FlightWriteResult]:
    """Store flights, each with its prediction, if their windows were built from what is stored."""
    names, before, repeated, now = list[str](), dict[int, int | None](), False, 0.0
    for item in items:
        now = max(now, item.received_at)
        repeated = repeated or bool(item.repeats)
        for flights in item.engines:
            names.append(flights.tail.engine_id)  # a comprehension is a frame of every request
    by_name = session.engines(connection, names)
    for engine in by_name.values():
        before[engine.id] = engine.newest_cycle
    earlier = _earlier_predictions(connection, items, by_name) if repeated else {}
    new: list[dict[str, object]] = []
    batches: list[PredictionWrite] = []
    checks = []
    for item in items:
        checked = _check_write(session, item, earlier, by_name)
        checks.append(checked)
        if not (checked.stale or checked.unpredicted):
            _append_flights(session, connection, item, by_name, new)
            batches += (
                [PredictionWrite(item.by, item.received_at, checked.predictions, from_flight=True)]
                if checked.predictions
                else []
            )
    if new:
        connection.execute(_ADD, new)
    joined = add_predictions(session, connection, batches, by_name).joined if batches else []
    if new or batches:
        joined += join_survivors(session, connection, before, by_name.values(), now)
        session.update_engines(connection, by_name.values())
    results = []
    for k, checked in enumerate(checks):
        stale = dict[str, EngineTail]()
        for tail in checked.stale:
            stale[tail.engine_id] = _read_tail(session.generation, connection, by_name[tail.engine_id], tail)
        stored = 0 if checked.stale or checked.unpredicted else len(checked.predictions)
        results.append(FlightWriteResult(stale, checked.unpredicted, checked.earlier, stored, joined if k == 0 else []))
    return results


def read_tails(connection: Connection, requests: Sequence[CachedTail], generation: int) -> dict[str, EngineTail]:
    """Return the tails of some engines, by engine; cached ones are returned as they are if they are current."""
    by_name: dict[str, Row[Any]] = {}
    for part in parts([request.engine_id for request, _ in requests]):
        rows = connection.execute(_REVISIONS, {"names": part})
        by_name |= {row.engine_id: row for row in rows}
    tails = {}
    for request, cached in requests:
        engine = by_name.get(request.engine_id)
        current = cached is not None and engine is not None and cached.revision == engine.revision
        tails[request.engine_id] = cached if cached and current else _read_tail(generation, connection, engine, request)
    return tails


def empty_tail(generation: int, window: int) -> EngineTail:
    """Return the tail of an engine that has never had a flight."""
    return EngineTail(0, generation, None, [], _NO_FLIGHTS, True, window - 1)


def any_flights(connection: Connection) -> bool:
    """Return whether any engine ever had a flight."""
    return connection.execute(select(engines.c.id).where(engines.c.revision > 0).limit(1)).first() is not None


def _check_write(
    session: WriteSession,
    item: FlightWrite,
    earlier: dict[tuple[int, int, str, float], StoredPrediction],
    by_name: dict[str, EngineRow],
) -> _CheckedWrite:
    stale = []
    for engine in item.engines:
        if engine.generation != session.generation or engine.revision != by_name[engine.tail.engine_id].revision:
            stale.append(engine.tail)  # noqa: PERF401  # a comprehension is a frame of every request
    if not item.repeats:
        return _CheckedWrite(stale, [], {}, item.predictions)
    predicted = {}
    for name, cycle in item.repeats:
        key = (by_name[name].id, cycle, item.by.digest, item.by.temperature)
        if key in earlier:
            predicted[name, cycle] = earlier[key]
    new = [row for row in item.predictions if (row.engine_id, row.cycle) not in predicted]
    new_keys = {(row.engine_id, row.cycle) for row in new}
    unpredicted = [key for key in item.repeats if key not in predicted and key not in new_keys]
    return _CheckedWrite(stale, unpredicted, predicted, new)


def _append_flights(
    session: WriteSession,
    connection: Connection,
    item: FlightWrite,
    by_name: dict[str, EngineRow],
    new: list[dict[str, object]],
) -> None:
    """Append the rows of a write to `new`, and count the revisions of its engines; predictions extend their lives."""
    layout = _layout_id(session, connection, item.by)
    for flights in item.engines:
        engine = by_name[flights.tail.engine_id]
        for cycle, values in flights.new:
            row = {"layout": layout, "received_at": item.received_at, "telemetry": values.tobytes()}
            new.append({"engine": engine.id, "cycle": cycle} | row)
        engine.revision += bool(flights.new)


def _layout_id(session: WriteSession, connection: Connection, by: ModelVersion) -> int:
    """Return the id of the channel names of a model; store them if they are new."""
    if by.digest not in session.layouts:
        names = json.dumps(by.manifest.channel_names)
        connection.execute(insert_missing(connection, layouts), {"channels": names})
        layout = connection.execute(select(layouts.c.id).where(layouts.c.channels == names)).scalar_one()
        session.layouts[by.digest] = int(layout)
    return session.layouts[by.digest]


def _read_tail(
    generation: int, connection: Connection, engine: EngineRow | Row[Any] | None, request: TailRequest
) -> EngineTail:
    """Read at least the window before a cycle, and every flight from that cycle on."""
    if engine is None or engine.revision == 0:
        return empty_tail(generation, request.window)
    bounds = {"of": engine.id, "at": request.lowest_cycle}
    rows = list(connection.execute(_BEFORE, bounds | {"most": request.window}))[::-1]
    complete = len(rows) < request.window
    rows += connection.execute(_FROM, bounds).all()
    layout_ids = {row.layout for row in rows}
    if len(layout_ids) != 1:
        return EngineTail(
            engine.revision, generation, () if layout_ids else None, [], _NO_FLIGHTS, complete, request.window - 1
        )
    names = connection.execute(select(layouts.c.channels).where(layouts.c.id.in_(layout_ids))).scalar_one()
    values = np.frombuffer(b"".join(row.telemetry for row in rows), dtype=np.float32).reshape(len(rows), -1)
    cycles = [row.cycle for row in rows]
    return EngineTail(
        engine.revision, generation, tuple(json.loads(names)), cycles, values, complete, request.window - 1
    )


def _earlier_predictions(
    connection: Connection, items: Sequence[FlightWrite], by_name: dict[str, EngineRow]
) -> dict[tuple[int, int, str, float], StoredPrediction]:
    """Return the predictions of repeated flights by engine, cycle, digest of the model and temperature.

    Predictions that older code stored have no `from_flight`. Of these, the latest one is returned.
    """
    keys = {(by_name[name].id, cycle) for item in items for name, cycle in item.repeats}
    c, earlier = predictions.c, {}
    columns = (c.engine, c.cycle, models.c.digest, c.temperature, c.id, c.logits, c.rul)
    statement = select(*columns).join(models, models.c.id == c.model).where(c.from_flight.is_distinct_from(False))
    best_last = (c.from_flight.is_(True), c.is_latest, c.id)
    for part in parts(sorted(keys)):
        rows = statement.where(tuple_(c.engine, c.cycle).in_(part)).order_by(*best_last)
        for engine, cycle, digest, temperature, *stored in connection.execute(rows):
            earlier[engine, cycle, digest, temperature] = StoredPrediction(*stored)
    return earlier
