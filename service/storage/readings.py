"""Readings of engines, one a flight: kept, put in order, and read back as windows.

The tail of a history is kept in mind by the engine's revision, which every writer raises: who finds another revision
in the locked row reads the database again, so that what is kept in mind proves itself fresh each time.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, select, tuple_

from model.windows import Readings
from service.errors import Conflict
from service.storage.book import Book, EngineRow, Joined, insert_missing, parts
from service.storage.history import History, Result
from service.storage.remember import Batch, By, Made, add
from service.storage.tables import layouts, models, predictions, readings

Place = tuple[int, int]  # a request of the transaction, and a row of it
_NONE = np.empty((0, 0), dtype=np.float32)

_ADD = insert(readings)
_FLIGHT = select(readings.c.cycle, readings.c.telemetry, readings.c.layout).where(readings.c.engine == bindparam("of"))
_BEFORE = _FLIGHT.where(readings.c.cycle < bindparam("at")).order_by(readings.c.cycle.desc()).limit(bindparam("most"))
_FROM = _FLIGHT.where(readings.c.cycle >= bindparam("at")).order_by(readings.c.cycle)


class Flight(NamedTuple):
    """One engine's readings (channels,) float32 of one cycle."""

    engine_id: str
    cycle: int
    telemetry: Readings


class Predicted(NamedTuple):
    """Predictions of some flights, and whatever the caller wants to have back once they are committed."""

    made: Sequence[Made]
    receipt: Any = None


Answer = Callable[[Sequence[Flight], Readings], Predicted]  # of flights and their windows (N, window, channels)


class Flights(NamedTuple):
    """Flights of one request; told in seconds since 1970.

    `answer` is asked for predictions within the transaction, so that flights and predictions are kept together or not
    at all; flights of all requests whose `by` is the same are answered together, by the first one's. A transaction
    may be done again: what was committed is in `Stored`.
    """

    rows: Sequence[Flight]
    by: By
    answer: Answer
    told: float


class Kept(NamedTuple):
    """A prediction that is remembered from before."""

    id: str
    logits: bytes
    rul: float | None


class Landed(NamedTuple):
    """What became of one flight."""

    result: Result
    known: Readings | None = None  # the readings that stand, where these were refused
    made: Made | None = None  # the prediction that was made now
    kept: Kept | None = None  # for a flight told twice: the prediction that was made then


class Stored(NamedTuple):
    """What became of a request's flights, whose truth was known before, and the receipt if its `answer` was asked."""

    landed: list[Landed]
    joined: list[Joined]
    receipt: Any = None


def store(book: Book, connection: Connection, items: Sequence[Flights]) -> list[Stored]:
    """Keep flights, each at its cycle, and a prediction for each, from what is known up to that cycle."""
    by_name = book.engines(connection, (row.engine_id for item in items for row in item.rows))
    before = {engine.id: engine.newest_cycle for engine in by_name.values()}
    new: list[dict[str, object]] = []
    windows: dict[Place, Readings] = {}
    landed = [_place(book, connection, k, item, by_name, new, windows) for k, item in enumerate(items)]
    if new:
        connection.execute(_ADD, new)
    again = _told_again(items, windows)
    for place in again:
        del windows[place]
    _recall(connection, items, landed, windows, by_name)
    receipts, joined = _answer(book, connection, items, landed, windows, by_name)
    for (k, i), (first, row) in again.items():
        landed[k][i] = landed[k][i]._replace(made=landed[first][row].made, kept=landed[first][row].kept)
    joined += book.survivors(connection, before, by_name.values(), max(item.told for item in items))
    book.keep(connection, by_name.values())
    return [Stored(one, joined if k == 0 else [], receipts.get(k)) for k, one in enumerate(landed)]


def _place(
    book: Book,
    connection: Connection,
    k: int,
    item: Flights,
    by_name: dict[str, EngineRow],
    new: list[dict[str, object]],
    windows: dict[Place, Readings],
) -> list[Landed]:
    """Find the place of each flight of request k; what is to be stored is added to `new`, each window to `windows`."""
    window, layout = item.by.manifest.window or 1, _layout(book, connection, item.by)
    flights: dict[str, list[int]] = {}
    for i, row in enumerate(item.rows):
        flights.setdefault(row.engine_id, []).append(i)
    landed: dict[int, Landed] = {}
    for name, places in flights.items():
        engine = by_name[name]
        places.sort(key=lambda i: item.rows[i].cycle)
        history = _history(book, connection, engine, item.rows[places[0]].cycle, window, layout)
        results = [history.add(item.rows[i].cycle, item.rows[i].telemetry) for i in places]
        for i, result in zip(places, results, strict=True):
            row = item.rows[i]
            if result == "conflict":
                landed[i] = Landed(result, known=history.row(row.cycle))
                continue
            landed[i] = Landed(result)
            windows[k, i] = history.window(row.cycle, window)
            if result == "joined":
                stored = {"layout": layout, "told": item.told, "telemetry": row.telemetry.tobytes()}
                new.append({"engine": engine.id, "cycle": row.cycle} | stored)
                engine.seen(row.cycle)
        engine.revision += "joined" in results
        history.revision = engine.revision
        book.remember(engine.id, history, window)
    return [landed[i] for i in range(len(item.rows))]


def _told_again(items: Sequence[Flights], windows: dict[Place, Readings]) -> dict[Place, Place]:
    """Flights that stand twice in one transaction, each with the place whose answer is theirs too."""
    first: dict[tuple[str, float, str, int], Place] = {}
    again = {}
    for k, item in enumerate(items):
        for i, row in enumerate(item.rows):
            if (k, i) in windows:
                at = first.setdefault((item.by.digest, item.by.temperature, row.engine_id, row.cycle), (k, i))
                if at != (k, i):
                    again[k, i] = at
    return again


def _answer(
    book: Book,
    connection: Connection,
    items: Sequence[Flights],
    landed: list[list[Landed]],
    windows: dict[Place, Readings],
    by_name: dict[str, EngineRow],
) -> tuple[dict[int, Any], list[Joined]]:
    """Predict what was not predicted before, all that one model answers together, and keep it; receipts by request."""
    groups: dict[tuple[str, float], list[Place]] = {}
    for k, i in windows:
        if landed[k][i].kept is None:
            groups.setdefault((items[k].by.digest, items[k].by.temperature), []).append((k, i))
    batches, receipts = [], {}
    for places in groups.values():
        first = items[places[0][0]]
        flights = [items[k].rows[i] for k, i in places]
        made, receipts[places[0][0]] = first.answer(flights, np.stack([windows[place] for place in places]))
        for (k, i), one in zip(places, made, strict=True):
            landed[k][i] = landed[k][i]._replace(made=one)
        batches.append(Batch(first.by, max(items[k].told for k, _ in places), made, flight=True))
    return receipts, add(book, connection, batches, by_name).joined if batches else []


def _recall(
    connection: Connection,
    items: Sequence[Flights],
    landed: list[list[Landed]],
    windows: dict[Place, Readings],
    by_name: dict[str, EngineRow],
) -> None:
    """Put beside flights that were told twice what was answered the first time, by this model at this temperature."""
    again = [
        (k, i, by_name[item.rows[i].engine_id].id, item.rows[i].cycle)
        for k, item in enumerate(items)
        for i, one in enumerate(landed[k])
        if one.result == "unchanged" and (k, i) in windows
    ]
    kept = _kept(connection, {(engine, cycle) for _, _, engine, cycle in again})
    for k, i, engine, cycle in again:
        by = items[k].by
        landed[k][i] = landed[k][i]._replace(kept=kept.get((engine, cycle, by.digest, by.temperature)))


def _layout(book: Book, connection: Connection, by: By) -> int:
    """The number of a model's channels, by their names and order."""
    if by.digest not in book.layouts:
        names = json.dumps(by.manifest.channel_names)
        connection.execute(insert_missing(connection, layouts), {"channels": names})
        found = connection.execute(select(layouts.c.id).where(layouts.c.channels == names)).scalar_one()
        book.layouts[by.digest] = int(found)
    return book.layouts[by.digest]


def _history(book: Book, connection: Connection, engine: EngineRow, lowest: int, window: int, layout: int) -> History:
    """At least the window before the lowest of some cycles, and everything after.

    Raises:
        Conflict: flights of other channels.
    """
    kept = book.histories.pop(engine.id, None)  # put back as the newest
    if kept is None or kept.revision != engine.revision or not kept.reaches(lowest, window):
        kept = _read(connection, engine, lowest, window, layout)
    if kept.layout != layout:
        raise Conflict(f"engine {engine.engine_id!r} has flights with other channels than this model's")
    return kept


def _read(connection: Connection, engine: EngineRow, lowest: int, window: int, layout: int) -> History:
    if engine.revision == 0:
        return History(0, layout, [], _NONE, True)
    where = {"of": engine.id, "at": lowest}
    found = list(connection.execute(_BEFORE, where | {"most": window}))[::-1]
    whole = len(found) < window
    found += connection.execute(_FROM, where).all()
    others = {row.layout for row in found} - {layout}
    if others or not found:
        return History(engine.revision, min(others, default=layout), [], _NONE, whole)
    values = np.frombuffer(b"".join(row.telemetry for row in found), dtype=np.float32).reshape(len(found), -1)
    return History(engine.revision, layout, [row.cycle for row in found], values, whole)


def _kept(connection: Connection, keys: set[tuple[int, int]]) -> dict[tuple[int, int, str, float], Kept]:
    """What flights were answered, by engine, cycle, the model's digest and the temperature.

    Of predictions that older code kept it is unknown whether they answered a flight: the one that counted is taken.
    """
    c, found = predictions.c, {}
    columns = (c.engine, c.cycle, models.c.digest, c.temperature, c.id, c.logits, c.rul)
    which = select(*columns).join(models, models.c.id == c.model).where(c.flight.is_distinct_from(False))
    best_last = (c.flight.is_(True), c.counts, c.id)
    for part in parts(sorted(keys)):
        asked = which.where(tuple_(c.engine, c.cycle).in_(part)).order_by(*best_last)
        for engine, cycle, digest, temperature, *kept in connection.execute(asked):
            found[engine, cycle, digest, temperature] = Kept(*kept)
    return found
