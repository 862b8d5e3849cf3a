"""What the service remembers, and what it makes of it: predictions, flights, truths that arrive late, calibration.

The use case above the database; knows the predictor, no HTTP and no SQL. Whatever is answered here is committed.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from model.numerics import Floats
from model.windows import Readings
from service.errors import StoreUnavailable
from service.ids import prediction_ids
from service.inference.onnx_model import Model
from service.inference.predictions import PredictionResult
from service.inference.predictor import Predictor
from service.metrics import Metrics
from service.settings import Settings
from service.store.flight_recording import FlightRecorder
from service.store.label_accounting import LabelAccounting
from service.store.new_predictions import Named, model_version, new_predictions
from service.store.sql import labels, predictions, queries, retention, temperatures
from service.store.sql.database import Database
from service.store.sql.labels import Answered, End, Ended, Labels, Result, Said
from service.store.sql.locks import lock_all
from service.store.sql.predictions import Batch, Made
from service.store.sql.session import Book

Told = tuple[Result, Floats | None]  # what became of a label, and the one that stands if it was refused
Results = list[Told | None]  # None where no label was told


class Remembered(NamedTuple):
    """Ids of predictions, None for one that should have been kept and could not be, and what became of labels."""

    ids: list[str | None]
    results: Results


class Memory:
    """One database's worth of memory, in one process."""

    def __init__(self, settings: Settings, metrics: Metrics, accounting: LabelAccounting) -> None:
        self._metrics, self._accounting = metrics, accounting
        book = Book()
        self._database = Database(
            settings.database_url, book.forget, settings.max_queue_rows, settings.max_queue_seconds, lock_all
        )
        self._retention = settings.retention_days * 86400
        self._remember = partial(predictions.remember, book)
        self._label, self._end = partial(labels.label, book), partial(labels.end, book)
        self._flights = FlightRecorder(
            self._database, book, accounting, settings.max_queue_rows, settings.max_queue_seconds, settings.workers > 1
        )
        self.record_flights = self._flights.record
        self._keep_fits, self._change = partial(temperatures.keep_fits, book), partial(temperatures.change, book)

    async def open(self) -> None:
        """Make or migrate the database; one that failed last has to prove that it can be written to.

        Raises:
            SchemaRejected: newer code made it.
            StoreUnavailable: it cannot be reached now.
        """
        await self._database.write(_nothing if self._database.up else queries.prove, None)

    async def close(self) -> None:
        """Commit what was accepted."""
        await self._database.close()

    async def temperature(self, model: Model) -> tuple[float, str] | None:
        """The temperature in force for a model and its source; None while it has its artefact's."""
        found = await self._database.read(lambda connection: temperatures.in_force(connection, model.digest))
        return None if found is None else (found.temperature, found.source)

    async def engines(self, query: queries.Wanted) -> queries.Page:
        """One page of engines with the latest prediction of each, worst first.

        Raises:
            StoreUnavailable: the database cannot be reached, as in every method that reads or writes.
        """
        return await self._database.read(lambda connection: queries.page(connection, query))

    async def history(self, engine_id: str, superseded: bool) -> queries.History | None:
        """Every stored prediction of an engine; None for an unknown engine."""
        return await self._database.read(lambda connection: queries.history(connection, engine_id, superseded))

    async def sensors(self, engine_id: str, channels: tuple[str, ...], most: int) -> tuple[list[int], Readings]:
        """The newest flights of an engine, at most `most`: rising cycles, and readings (N, channels)."""
        return await self._database.read(lambda connection: queries.flights(connection, engine_id, channels, most))

    async def temperature_changes(self, digest: str) -> list[temperatures.StoredChange]:
        """Every change of a model's temperature, oldest first."""
        return await self._database.read(lambda connection: temperatures.changes(connection, digest))

    async def counted(self, digest: str, classes: int, since: float | None) -> queries.Found:
        """Every prediction of one model that counts, made since some time in seconds since 1970; None for all."""
        return await self._database.read(lambda connection: queries.counted(connection, digest, classes, since))

    async def save_fit(self, fit: temperatures.Fit) -> None:
        """Store a fitted temperature; nothing is applied."""
        await self._database.write(self._keep_fits, fit)

    async def change_temperature(self, change: temperatures.Change) -> temperatures.Tempered:
        """Apply the temperature of a fit or a given one, or restore the one before.

        Raises:
            NotFound: no such fit.
            Conflict: a fit of another model, or nothing to restore.
        """
        return await self._database.write(self._change, change)

    async def prune(self) -> None:
        """Forget what is older than the settings say, a little at a time."""
        if not self._retention:
            return
        gone, before = 1, time.time() - self._retention
        while gone:
            old = await self._database.read(lambda connection: retention.too_old(connection, before))
            gone = await self._database.write(retention.prune, old) if old.engines else 0
            if gone:
                self._flights.clear_cache()

    async def remember(
        self,
        predictor: Predictor,
        rows: Sequence[Named],
        telemetry: Readings,
        found: PredictionResult,
        targets: Floats | None = None,
    ) -> Remembered:
        """Keep the predictions of engines, and the labels that came with them; counts all labels in the metrics.

        A prediction is an answer before it is a memory: without the database it is still given, and says so. One at a
        temperature of the caller's own is what if: the service did not say it by itself, so nothing is kept of it but
        the truth, which depends on no temperature.
        """
        now = time.time()
        ids = prediction_ids(len(rows), now)
        if targets is None and all(row.engine_id is None for row in rows):  # nothing to keep, and nothing to count
            return Remembered(list(ids), [None] * len(rows))
        own = found.temperature == predictor.temperature
        made = new_predictions(predictor, found, rows, telemetry, ids, targets)
        made = made if own else [row for row in made if row.label is not None and row.cycle is not None]
        said: dict[str, Told] = {}
        lost: set[str] = set()
        if made:
            try:
                if not self._database.up:  # it is asked every second; no prediction waits for it meanwhile
                    raise StoreUnavailable("the database does not answer")
                said = await (self._keep(Batch(model_version(predictor), now, made)) if own else self._say(made))
            except StoreUnavailable:
                self._metrics.unremembered.inc(len(made))
                lost = {row.id for row in made}
        if targets is not None:
            elsewhere = [name in said and (not own or said[name][0] == "conflict") for name in ids]
            self._accounting.count_submitted(found, targets, predictor.temperature, np.array(elsewhere))
        return Remembered([None if name in lost else name for name in ids], [said.get(name) for name in ids])

    async def label(self, rows: Sequence[Said]) -> Answered:
        """Keep labels, each with its own result."""
        told = Labels(rows, time.time())
        return await self._database.write(
            self._label, told, lambda answered: self._accounting.count_joined(answered.joined), len(rows)
        )

    async def end(self, engine_id: str, failed_at: int, revise: bool) -> Ended:
        """Keep an engine's end, which labels its history."""
        told = End(engine_id, failed_at, revise, time.time())
        return await self._database.write(self._end, told, lambda ended: self._accounting.count_joined(ended.joined))

    async def _keep(self, batch: Batch) -> dict[str, Told]:
        """Keep predictions; what became of the labels that came with them, by prediction id."""

        def committed(kept: predictions.Remembered) -> None:
            self._accounting.count_joined(kept.joined)
            counted = sum(row.label is not None and kept.said[row.id][0] != "conflict" for row in batch.rows)
            self._accounting.count_stored(len(batch.rows) - counted)  # the others are with their labels

        said = (await self._database.write(self._remember, batch, committed, len(batch.rows))).said
        return {row.id: said[row.id] for row in batch.rows if row.id in said} if said else {}

    async def _say(self, made: Sequence[Made]) -> dict[str, Told]:
        """Keep the labels of predictions that are not kept themselves; what became of each, by prediction id."""
        rows = [Said(None, row.engine_id, row.cycle, row.label, False) for row in made if row.label is not None]
        answered = await self.label(rows)
        return {row.id: result for row, result in zip(made, answered.results, strict=True)}


def _nothing(_: Any, items: Sequence[None]) -> list[None]:
    return [None for _ in items]
