"""Readings of engines, one a flight: kept, put in order, and read back as windows.

The tail of a history is kept in mind by the engine's revision, which every writer raises: who finds another revision
in the locked row reads the database again, so that what is kept in mind proves itself fresh each time.
"""

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, and_, insert, or_, select

from model.windows import Readings, pad_left
from service.errors import Conflict
from service.storage.book import Book, EngineRow, Joined, insert_missing, parts
from service.storage.tables import layouts, models, predictions, readings

MOST_HISTORIES = 20_000  # in mind; a hundred flights of each are 140 MB
Integers = npt.NDArray[np.int64]


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

    result: Literal["joined", "unchanged", "conflict"]
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
    answered = [_store(book, connection, item, by_name) for item in items]
    now = max(item.told for item in items)
    joined = book.survivors(connection, before, by_name.values(), now)
    book.keep(connection, by_name.values())
    return [(landed, joined if k == 0 else []) for k, landed in enumerate(answered)]


def _store(book: Book, connection: Connection, item: Flights, by_name: dict[str, EngineRow]) -> list[Landed]:
    layout = _layout(connection, item.channels)
    flights: dict[str, list[int]] = {}
    for i, row in enumerate(item.rows):
        flights.setdefault(row.engine_id, []).append(i)
    landed: dict[int, Landed] = {}
    new: list[dict[str, object]] = []
    for name, places in flights.items():
        engine = by_name[name]
        history = _history(book, connection, engine, min(item.rows[i].cycle for i in places), item.window, layout)
        merged, results = _merged(history, [item.rows[i] for i in places])
        for i, result in zip(places, results, strict=True):
            row = item.rows[i]
            if result == "joined":
                told = {"layout": layout, "told": item.told, "telemetry": row.telemetry.tobytes()}
                new.append({"engine": engine.id, "cycle": row.cycle} | told)
                engine.seen(row.cycle)
            at = int(np.searchsorted(merged.cycles, row.cycle))
            if result == "conflict":
                landed[i] = Landed(result, None, merged.telemetry[at], None)
            else:
                landed[i] = Landed(result, pad_left(merged.telemetry[: at + 1], item.window), None, None)
        if "joined" in results:
            engine.revision += 1
        _keep(book, engine, merged, item.window)
    if new:
        connection.execute(insert(readings), new)
    again = [i for i, one in landed.items() if one.result == "unchanged"]
    kept = _kept(connection, item, [(by_name[item.rows[i].engine_id].id, item.rows[i].cycle) for i in again])
    for i in again:
        found = kept.get((by_name[item.rows[i].engine_id].id, item.rows[i].cycle))
        landed[i] = landed[i]._replace(kept=found)
    return [landed[i] for i in range(len(item.rows))]


def _layout(connection: Connection, channels: tuple[str, ...]) -> int:
    names = json.dumps(channels)
    asked = select(layouts.c.id).where(layouts.c.channels == names)
    found = connection.execute(asked).scalar()
    if found is None:
        connection.execute(insert_missing(connection, layouts), {"channels": names})
        found = connection.execute(asked).scalar_one()
    return int(found)


def _history(book: Book, connection: Connection, engine: EngineRow, lowest: int, window: int, layout: int) -> _History:
    """At least the window before the lowest of some cycles, and everything after."""
    kept: _History | None = book.histories.pop(engine.id, None)  # put back as the newest
    if kept is not None and kept.revision == engine.revision:
        older = int(np.searchsorted(kept.cycles, lowest))
        if kept.whole or older >= window - 1:
            return kept
    of = readings.c.engine == engine.id
    asked = select(readings.c.cycle, readings.c.telemetry, readings.c.layout).where(of)
    found = list(
        connection.execute(asked.where(readings.c.cycle < lowest).order_by(readings.c.cycle.desc()).limit(window))
    )[::-1]
    whole = len(found) < window
    found += connection.execute(asked.where(readings.c.cycle >= lowest).order_by(readings.c.cycle)).all()
    if any(row.layout != layout for row in found):
        raise Conflict(f"engine {engine.engine_id!r} has readings of other channels than this model's")
    cycles = np.array([row.cycle for row in found], dtype=np.int64)
    values = np.frombuffer(b"".join(row.telemetry for row in found), dtype=np.float32)
    return _History(engine.revision, cycles, values.reshape(len(found), -1) if len(found) else _NONE, whole)


_NONE = np.empty((0, 0), dtype=np.float32)


def _merged(
    history: _History, rows: Sequence[Flight]
) -> tuple[_History, list[Literal["joined", "unchanged", "conflict"]]]:
    """The history with some flights in their places, and what became of each."""
    known = (
        {int(cycle): history.telemetry[k] for k, cycle in enumerate(history.cycles)}
        if len(rows) > 1 or not _after(history, rows[0])
        else {}
    )
    fresh: dict[int, Readings] = {}
    results: list[Literal["joined", "unchanged", "conflict"]] = []
    for row in rows:
        standing = known.get(row.cycle, fresh.get(row.cycle))
        if standing is None:
            fresh[row.cycle] = row.telemetry
            results.append("joined")
        else:
            results.append("unchanged" if np.array_equal(standing, row.telemetry) else "conflict")
    if not fresh:
        return history, results
    added = np.array(sorted(fresh), dtype=np.int64)
    cycles = np.concatenate([history.cycles, added])
    parts_ = [fresh[int(cycle)] for cycle in added]
    telemetry = np.concatenate([history.telemetry.reshape(-1, len(parts_[0])), parts_])
    order = np.argsort(cycles, kind="stable")
    if (order[1:] > order[:-1]).all():
        return history._replace(cycles=cycles, telemetry=telemetry), results
    return history._replace(cycles=cycles[order], telemetry=telemetry[order]), results


def _after(history: _History, row: Flight) -> bool:
    return len(history.cycles) == 0 or row.cycle > history.cycles[-1]


def _keep(book: Book, engine: EngineRow, history: _History, window: int) -> None:
    """Keep the newest flights in mind, twice a window at most, so that they are cut seldom."""
    if len(history.cycles) > 2 * window:
        cycles, telemetry = history.cycles[-window:], history.telemetry[-window:].copy()
        history = _History(engine.revision, cycles, telemetry, False)
    book.histories[engine.id] = history._replace(revision=engine.revision)
    if len(book.histories) > MOST_HISTORIES:
        del book.histories[next(iter(book.histories))]  # the one not asked for longest


def _kept(connection: Connection, item: Flights, keys: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Kept]:
    """What this model answered before, at this temperature, for engines and cycles."""
    c, found = predictions.c, {}
    columns = (c.engine, c.cycle, c.id, c.logits, c.rul)
    same = and_(models.c.digest == item.digest, c.temperature == item.temperature, c.counts)
    for part in parts(keys, 100):
        of = or_(*(and_(c.engine == engine, c.cycle == cycle) for engine, cycle in part))
        asked = select(*columns).join(models, models.c.id == c.model).where(of, same)
        for row in connection.execute(asked):
            found[row.engine, row.cycle] = Kept(row.id, row.logits, row.rul)
    return found
