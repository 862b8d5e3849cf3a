"""Readings of engines, one a flight: kept, put in order, and read back as windows.

The tail of a history is kept in mind by the engine's revision, which every writer raises: who finds another revision
in the locked row reads the database again, so that what is kept in mind proves itself fresh each time.
"""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, bindparam, insert, select, tuple_

from model.windows import Readings, pad_left
from service.errors import Conflict
from service.storage.book import Book, EngineRow, Joined, insert_missing, parts
from service.storage.tables import layouts, models, predictions, readings

MOST_HISTORIES = 20_000  # in mind; a hundred flights of each are 140 MB
Integers = npt.NDArray[np.int64]
Result = Literal["joined", "unchanged", "conflict"]

_FLIGHT = select(readings.c.cycle, readings.c.telemetry, readings.c.layout).where(readings.c.engine == bindparam("of"))
_BEFORE = _FLIGHT.where(readings.c.cycle < bindparam("at")).order_by(readings.c.cycle.desc()).limit(bindparam("most"))
_FROM = _FLIGHT.where(readings.c.cycle >= bindparam("at")).order_by(readings.c.cycle)


class Flight(NamedTuple):
    """One engine's readings (channels,) float32 of one cycle."""

    engine_id: str
    cycle: int
    telemetry: Readings


class Flights(NamedTuple):
    """Flights of one request, for a model with a window of so many cycles; told in seconds since 1970."""

    rows: Sequence[Flight]
    channels: tuple[str, ...]
    window: int
    digest: str
    temperature: float
    told: float


class Kept(NamedTuple):
    """A prediction that is remembered from before."""

    id: str
    logits: bytes
    rul: float | None


class Landed(NamedTuple):
    """What became of one flight."""

    result: Result
    window: Readings | None  # (window, channels); None for a conflict
    known: Readings | None  # the readings that stand, where these were refused
    kept: Kept | None  # for a flight told twice: what was answered


class _History(NamedTuple):
    """The newest flights of an engine, oldest first. `whole`: there are none before."""

    revision: int
    cycles: Integers
    telemetry: Readings  # (flights, channels)
    whole: bool


def store(book: Book, connection: Connection, items: Sequence[Flights]) -> list[tuple[list[Landed], list[Joined]]]:
    """Keep flights, each at its cycle; a window for each, of what is known up to that cycle."""
    by_name = book.engines(connection, (row.engine_id for item in items for row in item.rows))
    before = {engine.id: engine.newest_cycle for engine in by_name.values()}
    new: list[dict[str, object]] = []
    landed = [_place(book, connection, item, by_name, new) for item in items]
    if new:
        connection.execute(insert(readings), new)
    _recall(connection, items, landed, by_name)
    joined = book.survivors(connection, before, by_name.values(), max(item.told for item in items))
    book.keep(connection, by_name.values())
    return [(one, joined if k == 0 else []) for k, one in enumerate(landed)]


def _place(
    book: Book, connection: Connection, item: Flights, by_name: dict[str, EngineRow], new: list[dict[str, object]]
) -> list[Landed]:
    """Find the place of each flight of a request, and its window; what is to be stored is added to `new`."""
    layout = _layout(book, connection, item.channels)
    flights: dict[str, list[int]] = {}
    for i, row in enumerate(item.rows):
        flights.setdefault(row.engine_id, []).append(i)
    landed: dict[int, Landed] = {}
    for name, places in flights.items():
        engine, rows = by_name[name], [item.rows[i] for i in places]
        history = _history(book, connection, engine, min(row.cycle for row in rows), item.window, layout)
        merged, results = _merged(history, rows)
        for i, row, result in zip(places, rows, results, strict=True):
            at = int(np.searchsorted(merged.cycles, row.cycle))
            if result == "conflict":
                landed[i] = Landed(result, None, merged.telemetry[at], None)
                continue
            landed[i] = Landed(result, pad_left(merged.telemetry[: at + 1], item.window), None, None)
            if result == "joined":
                stored = {"layout": layout, "told": item.told, "telemetry": row.telemetry.tobytes()}
                new.append({"engine": engine.id, "cycle": row.cycle} | stored)
                engine.seen(row.cycle)
        engine.revision += "joined" in results
        _keep(book, engine, merged, item.window)
    return [landed[i] for i in range(len(item.rows))]


def _recall(
    connection: Connection, items: Sequence[Flights], landed: list[list[Landed]], by_name: dict[str, EngineRow]
) -> None:
    """Put beside flights that were told twice what was answered the first time, if it would be answered today."""
    again = [
        (k, i, by_name[item.rows[i].engine_id].id, item.rows[i].cycle)
        for k, item in enumerate(items)
        for i, one in enumerate(landed[k])
        if one.result == "unchanged"
    ]
    kept = _kept(connection, {(engine, cycle) for _, _, engine, cycle in again})
    for k, i, engine, cycle in again:
        found = kept.get((engine, cycle))
        if found and found[:2] == (items[k].digest, items[k].temperature):
            landed[k][i] = landed[k][i]._replace(kept=found[2])


def _layout(book: Book, connection: Connection, channels: tuple[str, ...]) -> int:
    if channels in book.layouts:
        return book.layouts[channels]
    names = json.dumps(channels)
    asked = select(layouts.c.id).where(layouts.c.channels == names)
    found = connection.execute(asked).scalar()
    if found is None:
        connection.execute(insert_missing(connection, layouts), {"channels": names})
        found = connection.execute(asked).scalar_one()
    book.layouts[channels] = int(found)
    return book.layouts[channels]


def _history(book: Book, connection: Connection, engine: EngineRow, lowest: int, window: int, layout: int) -> _History:
    """At least the window before the lowest of some cycles, and everything after."""
    kept: _History | None = book.histories.pop(engine.id, None)  # put back as the newest
    if kept is not None and kept.revision == engine.revision:
        older = int(np.searchsorted(kept.cycles, lowest))
        if kept.whole or older >= window - 1:
            return kept
    if engine.revision == 0:
        return _History(0, np.empty(0, dtype=np.int64), _NONE, True)
    where = {"of": engine.id, "at": lowest}
    found = list(connection.execute(_BEFORE, where | {"most": window}))[::-1]
    whole = len(found) < window
    found += connection.execute(_FROM, where).all()
    if any(row.layout != layout for row in found):
        raise Conflict(f"engine {engine.engine_id!r} has readings of other channels than this model's")
    cycles = np.array([row.cycle for row in found], dtype=np.int64)
    values = np.frombuffer(b"".join(row.telemetry for row in found), dtype=np.float32)
    return _History(engine.revision, cycles, values.reshape(len(found), -1) if len(found) else _NONE, whole)


_NONE = np.empty((0, 0), dtype=np.float32)


def _merged(history: _History, rows: Sequence[Flight]) -> tuple[_History, list[Result]]:
    """The history with some flights in their places, and what became of each."""
    at = np.searchsorted(history.cycles, [row.cycle for row in rows]).tolist()
    standing = {
        row.cycle: history.telemetry[k]
        for row, k in zip(rows, at, strict=True)
        if k < len(history.cycles) and history.cycles[k] == row.cycle
    }
    fresh: dict[int, Readings] = {}
    results: list[Result] = []
    for row in rows:
        known = standing.setdefault(row.cycle, row.telemetry)
        if known is row.telemetry:
            fresh[row.cycle] = row.telemetry
            results.append("joined")
        else:
            results.append("unchanged" if np.array_equal(known, row.telemetry) else "conflict")
    if not fresh:
        return history, results
    added = sorted(fresh)
    places = np.searchsorted(history.cycles, added)
    values = np.stack([fresh[cycle] for cycle in added])
    cycles = np.insert(history.cycles, places, added)
    telemetry = np.insert(history.telemetry.reshape(-1, values.shape[1]), places, values, axis=0)
    return history._replace(cycles=cycles, telemetry=telemetry), results


def _keep(book: Book, engine: EngineRow, history: _History, window: int) -> None:
    """Keep the newest flights in mind, twice a window at most, so that they are cut seldom."""
    if len(history.cycles) > 2 * window:
        cycles, telemetry = history.cycles[-window:], history.telemetry[-window:].copy()
        history = _History(engine.revision, cycles, telemetry, False)
    book.histories[engine.id] = history._replace(revision=engine.revision)
    if len(book.histories) > MOST_HISTORIES:
        del book.histories[next(iter(book.histories))]  # the one not asked for longest


def _kept(connection: Connection, keys: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[str, float, Kept]]:
    """The predictions that count of engines and cycles, with their model's digest and their temperature."""
    c, found = predictions.c, {}
    columns = (c.engine, c.cycle, c.id, c.logits, c.rul, c.temperature, models.c.digest)
    for part in parts(sorted(keys)):
        asked = select(*columns).join(models, models.c.id == c.model)
        for row in connection.execute(asked.where(tuple_(c.engine, c.cycle).in_(part), c.counts)):
            found[row.engine, row.cycle] = (row.digest, row.temperature, Kept(row.id, row.logits, row.rul))
    return found
