"""The use cases of the store: predictions, flights, labels that arrive later, and temperatures.

Uses the predictor and the database. Independent of HTTP and SQL. Every result is returned after its commit.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

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

LabelResult = tuple[LabelResultKind, Floats | None]  # result of a label, and the stored label after a conflict
LabelResultColumn = list[LabelResult | None]  # None for a row without a label


class RecordedPredictions(NamedTuple):
    """Ids of predictions, None for one that could not be stored, and the results of labels."""

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
        """Create or migrate the database. If its last transaction failed, verify that it can be written to.

        Raises:
            SchemaRejected: newer code has migrated it.
            StoreUnavailable: it cannot be reached now.
        """
        if self._database.up:
            await self._database.connect()
        else:
            await self._database.write(queries.prove, None)

    async def close(self) -> None:
        """Commit all accepted writes, and stop."""
        await self._database.close()

    async def temperature(self, model: Model) -> tuple[float, str] | None:
        """Return the active temperature of a model and its source; None for the temperature of its artefact."""
        active = await self._database.read(lambda connection: temperatures.active_temperature(connection, model.digest))
        return None if active is None else (active.temperature, active.source)

    async def engines(self, query: EngineQuery) -> EnginePage:
        """Return one page of engines with the latest prediction of each, in descending order of risk.

        Raises:
            StoreUnavailable: the database cannot be reached, as in every method that reads or writes.
        """
        return await self._database.read(lambda connection: queries.page(connection, query))

    async def history(self, engine_id: str, superseded: bool) -> EngineHistory | None:
        """Return every stored prediction of an engine; None for an unknown engine."""
        return await self._database.read(lambda connection: queries.history(connection, engine_id, superseded))

    async def sensors(self, engine_id: str, channels: tuple[str, ...], limit: int) -> tuple[list[int], Readings]:
        """Return the newest `limit` flights of an engine: ascending cycles, and readings (N, channels)."""
        return await self._database.read(lambda connection: queries.flights(connection, engine_id, channels, limit))

    async def temperature_changes(self, digest: str) -> list[StoredChange]:
        """Return every temperature change of a model, oldest first."""
        return await self._database.read(lambda connection: temperatures.changes(connection, digest))

    async def counted_predictions(self, digest: str, classes: int, since: float | None) -> CountedPredictions:
        """Return the predictions of one model that statistics use, since a time in seconds since 1970; None for all."""
        return await self._database.read(lambda connection: queries.counted(connection, digest, classes, since))

    async def save_fit(self, fit: StoredFit) -> None:
        """Store a fitted temperature; nothing is applied."""
        await self._database.write(self._store_fits, fit)

    async def change_temperature(self, change: TemperatureChange) -> ActiveTemperature:
        """Apply the temperature of a fit or a given temperature, or restore the previous one.

        Raises:
            NotFound: no such fit.
            Conflict: a fit of another model, or nothing to restore.
        """
        return await self._database.write(self._change, change)

    async def prune(self) -> None:
        """Delete rows older than the retention of the settings, a limited number in each transaction."""
        if not self._retention:
            return
        deleted, before = 1, time.time() - self._retention
        while deleted:
            expired = await self._database.read(lambda connection: retention.find_expired(connection, before))
            deleted = await self._database.write(retention.delete_expired, expired) if expired.engines else 0
            if deleted:
                self._flights.clear_cache()

    async def record_predictions(
        self,
        predictor: Predictor,
        rows: Sequence[NamedRow],
        telemetry: Readings,
        prediction: PredictionResult,
        targets: Floats | None = None,
    ) -> RecordedPredictions:
        """Store the predictions of engines and the labels that arrived with them; count all labels in the metrics.

        If the database is unavailable, predictions have None as their id. A prediction at a temperature of the request
        is not stored. Its label is, because labels do not depend on the temperature.
        """
        now = time.time()
        ids = prediction_ids(len(rows), now)
        at_active = prediction.temperature == predictor.temperature
        new = new_predictions(predictor, prediction, rows, telemetry, ids, targets)
        new = new if at_active else [row for row in new if row.label is not None and row.cycle is not None]
        results: dict[str, LabelResult] = {}
        not_stored: set[str] = set()
        if new:
            try:
                if not self._database.up:  # it is tried every second; predictions do not wait for that
                    raise StoreUnavailable("the database does not respond")
                results = await (
                    self._store_predictions(PredictionWrite(model_version(predictor), now, new))
                    if at_active
                    else self._store_labels(new)
                )
            except StoreUnavailable:
                self._metrics.predictions_not_stored.inc(len(new))
                not_stored = {row.id for row in new}
        if targets is not None:
            excluded = [name in results and (not at_active or results[name][0] == "conflict") for name in ids]
            self._accounting.count_submitted(prediction, targets, predictor.temperature, np.array(excluded))
        return RecordedPredictions(
            [None if name in not_stored else name for name in ids], [results.get(name) for name in ids]
        )

    async def record_labels(self, rows: Sequence[LabelSubmission]) -> LabelResults:
        """Store labels, and return the result of each."""
        write = LabelWrite(rows, time.time())
        return await self._database.write(
            self._record_labels, write, lambda result: self._accounting.count_joined(result.joined), len(rows)
        )

    async def record_outcome(self, engine_id: str, failed_at: int, revise: bool) -> OutcomeResult:
        """Store the failure of an engine, which labels its history."""
        write = OutcomeSubmission(engine_id, failed_at, revise, time.time())
        return await self._database.write(
            self._record_outcomes, write, lambda result: self._accounting.count_joined(result.joined)
        )

    async def _store_predictions(self, batch: PredictionWrite) -> dict[str, LabelResult]:
        """Store predictions, and return the results of their labels by prediction id."""

        def committed(written: predictions.PredictionWriteResult) -> None:
            results, submitted = written.label_results, 0
            if results:
                submitted = sum(row.label is not None and results[row.id][0] != "conflict" for row in batch.rows)
            self._accounting.count_stored(len(batch.rows) - submitted)  # `count_submitted` counts those
            if written.joined:
                self._accounting.count_joined(written.joined)

        written = await self._database.write(self._record_predictions, batch, committed, len(batch.rows))
        results = written.label_results
        return {row.id: results[row.id] for row in batch.rows if row.id in results} if results else {}

    async def _store_labels(self, unstored: Sequence[NewPrediction]) -> dict[str, LabelResult]:
        """Store the labels of predictions that are not stored, and return the result of each by prediction id."""
        rows = [
            LabelSubmission(None, row.engine_id, row.cycle, row.label, False)
            for row in unstored
            if row.label is not None
        ]
        submitted = await self.record_labels(rows)
        return {row.id: result for row, result in zip(unstored, submitted.results, strict=True)}
