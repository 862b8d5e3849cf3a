"""Truths that arrive late: labels of single predictions, and ends of engines. Both idempotent, in any order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, or_, select, tuple_, update

from model.numerics import Floats
from service.store.records import JoinedLabel, LabelResultKind, LabelResults, LabelSubmission, OutcomeResult
from service.store.sql.session import EngineRow, Key, WriteSession, parts, stored_labels
from service.store.sql.tables import predictions, revisions, truths


class LabelWrite(NamedTuple):
    """Labels of one request, and when they were told, in seconds since 1970."""

    rows: Sequence[LabelSubmission]
    received_at: float


class OutcomeSubmission(NamedTuple):
    """An engine's last cycle."""

    engine_id: str
    failed_at: int
    revise: bool
    received_at: float


_REVISE = (
    update(truths)
    .where(truths.c.id == bindparam("key"))
    .values({"label": bindparam("label"), "received_at": bindparam("received_at")})
)


@dataclass
class _Known:
    """A truth as it stands within the transaction. `id` is None until it is stored."""

    engine: int
    label: Floats
    received_at: float
    id: int | None = None
    before: list[tuple[Floats, float]] = field(default_factory=list)  # what it said until now, and since when


def record_labels(session: WriteSession, connection: Connection, items: Sequence[LabelWrite]) -> list[LabelResults]:
    """Keep labels and give them to the predictions that they are of."""
    made = _predictions(connection, {row.prediction_id for item in items for row in item.rows if row.prediction_id})
    names = {row.engine_id for item in items for row in item.rows if row.engine_id and not row.prediction_id}
    by_name = session.engines(connection, names)
    others = {engine for engine, _ in made.values()} - {row.id for row in by_name.values()}
    rows = {row.id: row for row in [*by_name.values(), *session.engines_by_id(connection, others)]}
    keyed = [[(_key(row, made, by_name), row) for row in item.rows] for item in items]
    keys = {key for item in keyed for key, _ in item if key is not None}
    known = {
        row.prediction or (row.engine, row.cycle): _Known(row.engine, np.frombuffer(row.label), row.received_at, row.id)
        for row in stored_labels(connection, keys)
    }
    there = _there(connection, keys)
    answered = []
    for item, entries in zip(items, keyed, strict=True):
        results = [_say(known, there, key, row, item.received_at, made, rows) for key, row in entries]
        answered.append(LabelResults(results, []))
    _write(connection, known, max(item.received_at for item in items))
    changed = [key for key, one in known.items() if one.id is None or one.before]
    now = max(item.received_at for item in items)
    answered[0].joined.extend(_join(session, connection, changed, rows, now))
    session.update_engines(connection, rows.values())
    return answered


def record_outcomes(
    session: WriteSession, connection: Connection, items: Sequence[OutcomeSubmission]
) -> list[OutcomeResult]:
    """Keep the ends of engines, and label their whole histories."""
    by_name = session.engines(connection, (item.engine_id for item in items))
    answered = []
    for item in items:
        engine = by_name[item.engine_id]
        if engine.failed_at == item.failed_at:
            answered.append(OutcomeResult("unchanged", item.failed_at, 0, []))
            continue
        if engine.failed_at is not None and not item.revise:
            answered.append(OutcomeResult("conflict", engine.failed_at, 0, []))
            continue
        result: LabelResultKind = (
            "revised" if engine.failed_at is not None else "joined" if engine.latest else "pending"
        )
        if engine.failed_at is not None:
            old = {
                "engine": engine.id,
                "failed_at": engine.failed_at,
                "received_at": engine.failure_reported_at,
                "revised": item.received_at,
            }
            connection.execute(insert(revisions), old)
        engine.failed_at, engine.failure_reported_at = item.failed_at, item.received_at
        joined = session.join_labels(connection, predictions.c.engine == engine.id, [engine], item.received_at)
        answered.append(OutcomeResult(result, item.failed_at, len(joined), joined))
    session.update_engines(connection, by_name.values())
    return answered


def _predictions(connection: Connection, ids: set[str]) -> dict[str, tuple[int, int | None]]:
    """Engine and cycle of predictions that are remembered."""
    columns = (predictions.c.id, predictions.c.engine, predictions.c.cycle)
    found = {}
    for part in parts(sorted(ids)):
        for row in connection.execute(select(*columns).where(predictions.c.id.in_(part))):
            found[row.id] = (row.engine, row.cycle)
    return found


def _key(row: LabelSubmission, made: dict[str, tuple[int, int | None]], by_name: dict[str, EngineRow]) -> Key | None:
    """What a label is of: an engine and a cycle wherever there are any; None if it is of nothing that is known."""
    if row.prediction_id is None:
        assert row.engine_id is not None  # the caller gives one or the other
        assert row.cycle is not None
        return by_name[row.engine_id].id, row.cycle
    if row.prediction_id not in made:
        return None
    engine, cycle = made[row.prediction_id]
    return row.prediction_id if cycle is None else (engine, cycle)


def _there(connection: Connection, keys: set[Key]) -> set[Key]:
    """Those keys for which there is a prediction."""
    columns = (predictions.c.engine, predictions.c.cycle)
    found: set[Key] = {key for key in keys if isinstance(key, str)}
    for part in parts(sorted(key for key in keys if not isinstance(key, str))):
        found |= {
            (row.engine, row.cycle) for row in connection.execute(select(*columns).where(tuple_(*columns).in_(part)))
        }
    return found


def _say(
    known: dict[Key, _Known],
    there: set[Key],
    key: Key | None,
    row: LabelSubmission,
    received_at: float,
    made: dict[str, tuple[int, int | None]],
    rows: dict[int, EngineRow],
) -> tuple[LabelResultKind, Floats | None]:
    if key is None:
        return "unknown", None
    standing = known.get(key)
    if standing is None:
        engine = key[0] if isinstance(key, tuple) else made[key][0]
        known[key] = _Known(engine, row.label, received_at)
        rows[engine].truths += 1
        return "joined" if key in there else "pending", None
    if np.array_equal(standing.label, row.label):
        return "unchanged", None
    if not row.revise:
        return "conflict", standing.label
    standing.before.append((standing.label, standing.received_at))
    standing.label, standing.received_at = row.label, received_at
    return "revised", None


def _write(connection: Connection, known: dict[Key, _Known], now: float) -> None:
    new, changed, old = [], [], []
    for key, one in known.items():
        cycle, prediction = (None, key) if isinstance(key, str) else (key[1], None)
        place = {"engine": one.engine, "cycle": cycle, "prediction": prediction}
        if one.id is None:
            new.append(place | {"label": one.label.tobytes(), "received_at": one.received_at})
        elif one.before:
            changed.append({"key": one.id, "label": one.label.tobytes(), "received_at": one.received_at})
        old += [place | {"label": said.tobytes(), "received_at": told, "revised": now} for said, told in one.before]
    if new:
        connection.execute(insert(truths), new)
    if changed:
        connection.execute(_REVISE, changed)
    if old:
        connection.execute(insert(revisions), old)


def _join(
    session: WriteSession, connection: Connection, keys: Sequence[Key], rows: dict[int, EngineRow], now: float
) -> list[JoinedLabel]:
    """Give what was said to the predictions that it is of."""
    joined = []
    for part in parts(keys):
        pairs = [key for key in part if not isinstance(key, str)]
        of = tuple_(predictions.c.engine, predictions.c.cycle).in_(pairs)
        where = or_(of, predictions.c.id.in_([key for key in part if isinstance(key, str)]))
        joined += session.join_labels(connection, where, rows.values(), now)
    return joined
