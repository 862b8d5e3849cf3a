"""The use cases of the store: predictions, flights, labels that arrive later, and temperatures.

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
from service.store.new_predictions import NamedRow, model_version, new_predictions
from service.store.records import (
    ActiveTemperature,
    CountedPredictions,
    EngineHistory,
    EnginePage,
    EngineQuery,
    LabelResultKind,
    LabelResults,
    LabelSubmission,
    OutcomeResult,
    StoredChange,
    StoredFit,
    TemperatureChange,
)
from service.store.sql import labels, predictions, queries, retention, temperatures
from service.store.sql.database import Database
from service.store.sql.labels import LabelWrite, OutcomeSubmission
from service.store.sql.locks import lock_all
from service.store.sql.predictions import NewPrediction, PredictionWrite
from service.store.sql.session import WriteSession

LabelResult = tuple[LabelResultKind, Floats | None]  # what became of a label, and the one that stands if it was refused
LabelResultColumn = list[LabelResult | None]  # None where no label was told


class RecordedPredictions(NamedTuple):
    """Ids of predictions, None for one that should have been kept and could not be, and what became of labels."""

    ids: list[str | None]
    results: LabelResultColumn


class Store:
    """The predictions, flights, labels and temperatures in one database, seen from one process."""

    def __init__(self, settings: Settings, metrics: Metrics, accounting: LabelAccounting) -> None:
        self._metrics, self._accounting = metrics, accounting
        session = WriteSession()
        self._database = Database(
            settings.database_url, session.clear, settings.max_queue_rows, settings.max_queue_seconds, lock_all
        )
        self._retention = settings.retention_days * 86400
        self._record_predictions = partial(predictions.record_predictions, session)
        self._record_labels, self._record_outcomes = (
            partial(labels.record_labels, session),
            partial(labels.record_outcomes, session),
        )
        self._flights = FlightRecorder(
            self._database,
            session,
            accounting,
            settings.max_queue_rows,
            settings.max_queue_seconds,
            settings.workers > 1,
        )
        self.record_flights = self._flights.record
        self._store_fits, self._change = (
            partial(temperatures.store_fits, session),
            partial(temperatures.change_temperatures, session),
        )

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
        found = await self._database.read(lambda connection: temperatures.active_temperature(connection, model.digest))
        return None if found is None else (found.temperature, found.source)

    async def engines(self, query: EngineQuery) -> EnginePage:
        """One page of engines with the latest prediction of each, worst first.

        Raises:
            StoreUnavailable: the database cannot be reached, as in every method that reads or writes.
        """
        return await self._database.read(lambda connection: queries.page(connection, query))

    async def history(self, engine_id: str, superseded: bool) -> EngineHistory | None:
        """Every stored prediction of an engine; None for an unknown engine."""
        return await self._database.read(lambda connection: queries.history(connection, engine_id, superseded))

    async def sensors(self, engine_id: str, channels: tuple[str, ...], most: int) -> tuple[list[int], Readings]:
        """The newest flights of an engine, at most `most`: rising cycles, and readings (N, channels)."""
        return await self._database.read(lambda connection: queries.flights(connection, engine_id, channels, most))

    async def temperature_changes(self, digest: str) -> list[StoredChange]:
        """Every change of a model's temperature, oldest first."""
        return await self._database.read(lambda connection: temperatures.changes(connection, digest))

    async def counted_predictions(self, digest: str, classes: int, since: float | None) -> CountedPredictions:
        """Every prediction of one model that counts, made since some time in seconds since 1970; None for all."""
        return await self._database.read(lambda connection: queries.counted(connection, digest, classes, since))

    async def save_fit(self, fit: StoredFit) -> None:
        """Store a fitted temperature; nothing is applied."""
        await self._database.write(self._store_fits, fit)

    async def change_temperature(self, change: TemperatureChange) -> ActiveTemperature:
        """Apply the temperature of a fit or a given one, or restore the one before.

        Raises:
            NotFound: no such fit.
            Conflict: a fit of another model, or nothing to restore.
        """
        return await self._database.write(self._change, change)

    async def prune(self) -> None:
        """Delete what is older than the retention of the settings, a limited number of rows in each transaction."""
        if not self._retention:
            return
        gone, before = 1, time.time() - self._retention
        while gone:
            old = await self._database.read(lambda connection: retention.find_expired(connection, before))
            gone = await self._database.write(retention.delete_expired, old) if old.engines else 0
            if gone:
                self._flights.clear_cache()

    async def record_predictions(
        self,
        predictor: Predictor,
        rows: Sequence[NamedRow],
        telemetry: Readings,
        found: PredictionResult,
        targets: Floats | None = None,
    ) -> RecordedPredictions:
        """Keep the predictions of engines, and the labels that came with them; counts all labels in the metrics.

        Without the database predictions are still returned, with None as their id. Of a prediction at a temperature of
        the request only the label is stored, which depends on no temperature.
        """
        now = time.time()
        ids = prediction_ids(len(rows), now)
        if targets is None and all(row.engine_id is None for row in rows):  # nothing to keep, and nothing to count
            return RecordedPredictions(list(ids), [None] * len(rows))
        own = found.temperature == predictor.temperature
        made = new_predictions(predictor, found, rows, telemetry, ids, targets)
        made = made if own else [row for row in made if row.label is not None and row.cycle is not None]
        said: dict[str, LabelResult] = {}
        lost: set[str] = set()
        if made:
            try:
                if not self._database.up:  # it is asked every second; no prediction waits for it meanwhile
                    raise StoreUnavailable("the database does not answer")
                said = await (
                    self._store_predictions(PredictionWrite(model_version(predictor), now, made))
                    if own
                    else self._store_labels(made)
                )
            except StoreUnavailable:
                self._metrics.predictions_not_stored.inc(len(made))
                lost = {row.id for row in made}
        if targets is not None:
            elsewhere = [name in said and (not own or said[name][0] == "conflict") for name in ids]
            self._accounting.count_submitted(found, targets, predictor.temperature, np.array(elsewhere))
        return RecordedPredictions([None if name in lost else name for name in ids], [said.get(name) for name in ids])

    async def record_labels(self, rows: Sequence[LabelSubmission]) -> LabelResults:
        """Keep labels, each with its own result."""
        write = LabelWrite(rows, time.time())
        return await self._database.write(
            self._record_labels, write, lambda answered: self._accounting.count_joined(answered.joined), len(rows)
        )

    async def record_outcome(self, engine_id: str, failed_at: int, revise: bool) -> OutcomeResult:
        """Keep an engine's end, which labels its history."""
        write = OutcomeSubmission(engine_id, failed_at, revise, time.time())
        return await self._database.write(
            self._record_outcomes, write, lambda ended: self._accounting.count_joined(ended.joined)
        )

    async def _store_predictions(self, batch: PredictionWrite) -> dict[str, LabelResult]:
        """Keep predictions; what became of the labels that came with them, by prediction id."""

        def committed(kept: predictions.PredictionWriteResult) -> None:
            self._accounting.count_joined(kept.joined)
            counted = sum(row.label is not None and kept.said[row.id][0] != "conflict" for row in batch.rows)
            self._accounting.count_stored(len(batch.rows) - counted)  # the others are with their labels

        said = (await self._database.write(self._record_predictions, batch, committed, len(batch.rows))).said
        return {row.id: said[row.id] for row in batch.rows if row.id in said} if said else {}

    async def _store_labels(self, made: Sequence[NewPrediction]) -> dict[str, LabelResult]:
        """Keep the labels of predictions that are not kept themselves; what became of each, by prediction id."""
        rows = [
            LabelSubmission(None, row.engine_id, row.cycle, row.label, False) for row in made if row.label is not None
        ]
        answered = await self.record_labels(rows)
        return {row.id: result for row, result in zip(made, answered.results, strict=True)}


def _nothing(_: Any, items: Sequence[None]) -> list[None]:
    return [None for _ in items]
