"""Truths that arrive late: labels of single predictions, and ends of engines. Both idempotent, in any order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, or_, select, tuple_, update

from model.numerics import Floats
from service.store.sql.session import Book, EngineRow, Joined, Key, parts, said_of
from service.store.sql.tables import predictions, revisions, truths

Result = Literal["joined", "pending", "unchanged", "revised", "conflict", "unknown"]


class Said(NamedTuple):
    """One label, of a prediction by its id, or of an engine and a cycle."""

    prediction_id: str | None
    engine_id: str | None
    cycle: int | None
    label: Floats
    revise: bool


class Labels(NamedTuple):
    """Labels of one request, and when they were told, in seconds since 1970."""

    rows: Sequence[Said]
    told: float


class Answered(NamedTuple):
    """What became of each label of a request, with the label that stands where it was not applied."""

    results: list[tuple[Result, Floats | None]]
    joined: list[Joined]


class End(NamedTuple):
    """An engine's last cycle."""

    engine_id: str
    failed_at: int
    revise: bool
    told: float


class Ended(NamedTuple):
    """What became of an end; `known` is the one that stands."""

    result: Result
    known: int
    labelled: int
    joined: list[Joined]


_REVISE = (
    update(truths)
    .where(truths.c.id == bindparam("key"))
    .values({"label": bindparam("label"), "told": bindparam("told")})
)


@dataclass
class _Known:
    """A truth as it stands within the transaction. `id` is None until it is stored."""

    engine: int
    label: Floats
    told: float
    id: int | None = None
    before: list[tuple[Floats, float]] = field(default_factory=list)  # what it said until now, and since when


def label(book: Book, connection: Connection, items: Sequence[Labels]) -> list[Answered]:
    """Keep labels and give them to the predictions that they are of."""
    made = _predictions(connection, {row.prediction_id for item in items for row in item.rows if row.prediction_id})
    names = {row.engine_id for item in items for row in item.rows if row.engine_id and not row.prediction_id}
    by_name = book.engines(connection, names)
    others = {engine for engine, _ in made.values()} - {row.id for row in by_name.values()}
    rows = {row.id: row for row in [*by_name.values(), *book.engines_by_id(connection, others)]}
    keyed = [[(_key(row, made, by_name), row) for row in item.rows] for item in items]
    keys = {key for item in keyed for key, _ in item if key is not None}
    known = {
        row.prediction or (row.engine, row.cycle): _Known(row.engine, np.frombuffer(row.label), row.told, row.id)
        for row in said_of(connection, keys)
    }
    there = _there(connection, keys)
    answered = []
    for item, entries in zip(items, keyed, strict=True):
        results = [_say(known, there, key, row, item.told, made, rows) for key, row in entries]
        answered.append(Answered(results, []))
    _write(connection, known, max(item.told for item in items))
    changed = [key for key, one in known.items() if one.id is None or one.before]
    now = max(item.told for item in items)
    answered[0].joined.extend(_join(book, connection, changed, rows, now))
    book.keep(connection, rows.values())
    return answered


def end(book: Book, connection: Connection, items: Sequence[End]) -> list[Ended]:
    """Keep the ends of engines, and label their whole histories."""
    by_name = book.engines(connection, (item.engine_id for item in items))
    answered = []
    for item in items:
        engine = by_name[item.engine_id]
        if engine.failed_at == item.failed_at:
            answered.append(Ended("unchanged", item.failed_at, 0, []))
            continue
        if engine.failed_at is not None and not item.revise:
            answered.append(Ended("conflict", engine.failed_at, 0, []))
            continue
        result: Result = "revised" if engine.failed_at is not None else "joined" if engine.latest else "pending"
        if engine.failed_at is not None:
            old = {"engine": engine.id, "failed_at": engine.failed_at, "told": engine.failed_told, "revised": item.told}
            connection.execute(insert(revisions), old)
        engine.failed_at, engine.failed_told = item.failed_at, item.told
        joined = book.join(connection, predictions.c.engine == engine.id, [engine], item.told)
        answered.append(Ended(result, item.failed_at, len(joined), joined))
    book.keep(connection, by_name.values())
    return answered


def _predictions(connection: Connection, ids: set[str]) -> dict[str, tuple[int, int | None]]:
    """Engine and cycle of predictions that are remembered."""
    columns = (predictions.c.id, predictions.c.engine, predictions.c.cycle)
    found = {}
    for part in parts(sorted(ids)):
        for row in connection.execute(select(*columns).where(predictions.c.id.in_(part))):
            found[row.id] = (row.engine, row.cycle)
    return found


def _key(row: Said, made: dict[str, tuple[int, int | None]], by_name: dict[str, EngineRow]) -> Key | None:
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
    row: Said,
    told: float,
    made: dict[str, tuple[int, int | None]],
    rows: dict[int, EngineRow],
) -> tuple[Result, Floats | None]:
    if key is None:
        return "unknown", None
    standing = known.get(key)
    if standing is None:
        engine = key[0] if isinstance(key, tuple) else made[key][0]
        known[key] = _Known(engine, row.label, told)
        rows[engine].truths += 1
        return "joined" if key in there else "pending", None
    if np.array_equal(standing.label, row.label):
        return "unchanged", None
    if not row.revise:
        return "conflict", standing.label
    standing.before.append((standing.label, standing.told))
    standing.label, standing.told = row.label, told
    return "revised", None


def _write(connection: Connection, known: dict[Key, _Known], now: float) -> None:
    new, changed, old = [], [], []
    for key, one in known.items():
        cycle, prediction = (None, key) if isinstance(key, str) else (key[1], None)
        place = {"engine": one.engine, "cycle": cycle, "prediction": prediction}
        if one.id is None:
            new.append(place | {"label": one.label.tobytes(), "told": one.told})
        elif one.before:
            changed.append({"key": one.id, "label": one.label.tobytes(), "told": one.told})
        old += [place | {"label": said.tobytes(), "told": told, "revised": now} for said, told in one.before]
    if new:
        connection.execute(insert(truths), new)
    if changed:
        connection.execute(_REVISE, changed)
    if old:
        connection.execute(insert(revisions), old)


def _join(
    book: Book, connection: Connection, keys: Sequence[Key], rows: dict[int, EngineRow], now: float
) -> list[Joined]:
    """Give what was said to the predictions that it is of."""
    joined = []
    for part in parts(keys):
        pairs = [key for key in part if not isinstance(key, str)]
        of = tuple_(predictions.c.engine, predictions.c.cycle).in_(pairs)
        where = or_(of, predictions.c.id.in_([key for key in part if isinstance(key, str)]))
        joined += book.join(connection, where, rows.values(), now)
    return joined
