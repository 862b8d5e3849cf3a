"""Predictions that are kept, and what is already known of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection, bindparam, insert, update

from model.contract import Manifest
from model.numerics import Floats
from service.store.labelling import Source, truth
from service.store.sql.labels import Result
from service.store.sql.session import Book, EngineRow, Joined, Key, Kind, inspections
from service.store.sql.tables import predictions, truths


class Made(NamedTuple):
    """One prediction of an engine. `label` is what came with the request."""

    id: str
    engine_id: str
    cycle: int | None
    logits: bytes
    rul: float | None
    health: int
    risk: float
    label: Floats | None
    inputs: bytes | None = None  # the reference bin of each channel's newest reading, one byte each


class Remembered(NamedTuple):
    """Whose truth was known before, and what became of the labels that came with predictions, by prediction id.

    A label that contradicts one that was given before is a conflict; the one that stands is told.
    """

    joined: list[Joined]
    said: dict[str, tuple[Result, Floats | None]]


class By(NamedTuple):
    """Who answered: a model, at a temperature that came from somewhere."""

    digest: str
    manifest: Manifest
    temperature: float
    source: str


class Batch(NamedTuple):
    """Predictions of one request. `made` is in seconds since 1970; `flight` says that they answer flights."""

    by: By
    made: float
    rows: Sequence[Made]
    flight: bool = False


_ADD = insert(predictions)
_SUPERSEDE = (
    update(predictions)
    .where(
        predictions.c.engine == bindparam("of"), predictions.c.cycle == bindparam("at"), predictions.c.counts.is_(True)
    )
    .values(counts=False)
)


def remember(book: Book, connection: Connection, items: Sequence[Batch]) -> list[Remembered]:
    """Keep predictions; of each engine and cycle the latest counts."""
    by_name = book.engines(connection, (row.engine_id for item in items for row in item.rows))
    before = {engine.id: engine.newest_cycle for engine in by_name.values()}
    joined, said = add(book, connection, items, by_name)
    joined += book.survivors(connection, before, by_name.values(), max(item.made for item in items))
    book.keep(connection, by_name.values())
    return [Remembered(joined if k == 0 else [], said) for k in range(len(items))]


def add(book: Book, connection: Connection, items: Sequence[Batch], by_name: dict[str, EngineRow]) -> Remembered:
    """As `remember`, of engines that are locked already and are kept by the caller."""
    every = [
        (item, book.kind(connection, item.by.digest, item.by.manifest), row) for item in items for row in item.rows
    ]
    last = {(row.engine_id, row.cycle): row.id for _, _, row in every}  # the latest of those that come together
    again = _met_before(every, by_name)
    if again:
        connection.execute(_SUPERSEDE, again)
    for _, _, row in every:
        if row.cycle is not None:
            by_name[row.engine_id].seen(row.cycle)
    said = _keep_labels(connection, every, by_name)
    asked = [(engine.id, row.cycle, row.id) for _, _, row in every if (engine := by_name[row.engine_id]).truths]
    known_of = inspections(connection, asked) if asked else {}
    rows, joined = [], []
    for item, kind, row in every:
        engine = by_name[row.engine_id]
        inspected = known_of.get((engine.id, row.cycle) if row.cycle is not None else row.id) if known_of else None
        known = truth(inspected, row.cycle, engine.failed_at, engine.newest_cycle, kind.thresholds, len(kind.classes))
        counts = row.cycle is None or last[row.engine_id, row.cycle] == row.id
        rows.append(_stored(item, kind, row, engine.id, counts, known))
        if known is not None and (row.label is None or said[row.id][0] == "conflict"):
            joined.append(Joined(kind, row.logits, item.by.temperature, known[0].tobytes(), item.made, item.made))
        if row.cycle is None or engine.latest_cycle is None or row.cycle >= engine.latest_cycle:
            engine.latest, engine.health, engine.risk = row.id, row.health, row.risk
            engine.latest_cycle = engine.latest_cycle if row.cycle is None else row.cycle
    connection.execute(_ADD, rows)
    return Remembered(joined, said)


def _met_before(every: Sequence[tuple[Batch, Kind, Made]], by_name: dict[str, EngineRow]) -> list[dict[str, int]]:
    """Engines and cycles that may have been predicted before: only those not newer than the engine's latest."""
    found = set()
    for _, _, row in every:
        latest = by_name[row.engine_id].latest_cycle
        if row.cycle is not None and latest is not None and row.cycle <= latest:
            found.add((by_name[row.engine_id].id, row.cycle))
    return [{"of": engine, "at": cycle} for engine, cycle in sorted(found)]


def _keep_labels(
    connection: Connection, every: Sequence[tuple[Batch, Kind, Made]], by_name: dict[str, EngineRow]
) -> dict[str, tuple[Result, Floats | None]]:
    """Labels that came with predictions are truths like any other; what was said before stands, and is told."""
    given = [(item, row, row.label, by_name[row.engine_id]) for item, _, row in every if row.label is not None]
    known = inspections(connection, [(engine.id, row.cycle, row.id) for _, row, _, engine in given if engine.truths])
    new: list[dict[str, object]] = []
    said: dict[str, tuple[Result, Floats | None]] = {}
    for item, row, label, engine in given:
        key: Key = (engine.id, row.cycle) if row.cycle is not None else row.id
        standing = known.setdefault(key, label)
        if standing is label:
            said[row.id] = ("joined", None)
            engine.truths += 1
            name = row.id if row.cycle is None else None
            told = {"label": label.tobytes(), "told": item.made}
            new.append({"engine": engine.id, "cycle": row.cycle, "prediction": name} | told)
        else:
            said[row.id] = ("unchanged", None) if np.array_equal(standing, label) else ("conflict", standing)
    if new:
        connection.execute(insert(truths), new)
    return said


def _stored(
    item: Batch,
    kind: Kind,
    row: Made,
    engine: int,
    counts: bool,
    known: tuple[Floats, Source] | None,
) -> dict[str, object]:
    return {
        "id": row.id,
        "engine": engine,
        "cycle": row.cycle,
        "made": item.made,
        "model": kind.id,
        "temperature": item.by.temperature,
        "temperature_source": item.by.source,
        "logits": row.logits,
        "rul": row.rul,
        "inputs": row.inputs,
        "counts": counts,
        "label": None if known is None else np.asarray(known[0]).tobytes(),
        "source": None if known is None else int(known[1]),
        "labelled": None if known is None else item.made,
        "flight": item.flight,
    }
