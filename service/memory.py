"""What the service remembers, and what it makes of it: predictions, flights, truths that arrive late, calibration.

The use case above the database; knows the predictor, no HTTP and no SQL. Whatever is answered here is committed.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from model.numerics import Floats
from model.windows import Readings
from service.errors import Fault, InvalidInput, MemoryUnavailable
from service.ids import prediction_ids
from service.label_accounting import LabelAccounting
from service.metrics import Metrics
from service.predictions import Answers, Prediction, calibrated, joined, rows_of, whole
from service.predictor import Predictor
from service.runtime import Model
from service.settings import Settings
from service.storage import forget, labels, queries, readings, remember, tempering
from service.storage.book import Book
from service.storage.database import Database
from service.storage.labels import Answered, End, Ended, Labels, Result, Said
from service.storage.locks import lock_all
from service.storage.readings import Flight, Flights, Landed, Predicted, Stored
from service.storage.remember import Batch, By, Made


class Named(Protocol):
    """Which engine, at which cycle, a row is of."""

    @property
    def engine_id(self) -> str | None:
        """As its users call it."""

    @property
    def cycle(self) -> int | None:
        """Flights since it was new."""


Told = tuple[Result, Floats | None]  # what became of a label, and the one that stands if it was refused
Results = list[Told | None]  # None where no label was told


class Remembered(NamedTuple):
    """Ids of predictions, None for one that should have been kept and could not be, and what became of labels."""

    ids: list[str | None]
    results: Results


class Answer(NamedTuple):
    """What became of every flight, and the predictions of those that were not refused, in their order."""

    landed: list[Landed]
    prediction: Prediction | None
    ids: list[str]


class Memory:
    """One database's worth of memory, in one process."""

    def __init__(self, settings: Settings, metrics: Metrics, accounting: LabelAccounting) -> None:
        self._metrics, self._accounting = metrics, accounting
        book = Book()
        self._database = Database(
            settings.database_url, book.forget, settings.max_queue_rows, settings.max_queue_seconds, lock_all
        )
        self._retention = settings.retention_days * 86400
        self._remember = partial(remember.remember, book)
        self._label, self._end = partial(labels.label, book), partial(labels.end, book)
        self._store = partial(readings.store, book)
        self._keep_fits, self._change = partial(tempering.keep_fits, book), partial(tempering.change, book)

    async def open(self) -> None:
        """Make or migrate the database; one that failed last has to prove that it can be written to.

        Raises:
            SchemaRejected: newer code made it.
            MemoryUnavailable: it cannot be reached now.
        """
        await self._database.write(_nothing if self._database.up else queries.prove, None)

    async def close(self) -> None:
        """Commit what was accepted."""
        await self._database.close()

    async def temperature(self, model: Model) -> tuple[float, str] | None:
        """The temperature in force for a model and its source; None while it has its artefact's."""
        found = await self._database.read(lambda connection: tempering.in_force(connection, model.digest))
        return None if found is None else (found.temperature, found.source)

    async def engines(self, query: queries.Wanted) -> queries.Page:
        """One page of engines with the latest prediction of each, worst first.

        Raises:
            MemoryUnavailable: the database cannot be reached, as in every method that reads or writes.
        """
        return await self._database.read(lambda connection: queries.page(connection, query))

    async def history(self, engine_id: str, superseded: bool) -> queries.History | None:
        """Every stored prediction of an engine; None for an unknown engine."""
        return await self._database.read(lambda connection: queries.history(connection, engine_id, superseded))

    async def sensors(self, engine_id: str, channels: tuple[str, ...], most: int) -> tuple[list[int], Readings]:
        """The newest flights of an engine, at most `most`: rising cycles, and readings (N, channels)."""
        return await self._database.read(lambda connection: queries.flights(connection, engine_id, channels, most))

    async def temperature_changes(self, digest: str) -> list[tempering.StoredChange]:
        """Every change of a model's temperature, oldest first."""
        return await self._database.read(lambda connection: tempering.changes(connection, digest))

    async def counted(self, digest: str, classes: int, since: float | None) -> queries.Found:
        """Every prediction of one model that counts, made since some time in seconds since 1970; None for all."""
        return await self._database.read(lambda connection: queries.counted(connection, digest, classes, since))

    async def save_fit(self, fit: tempering.Fit) -> None:
        """Store a fitted temperature; nothing is applied."""
        await self._database.write(self._keep_fits, fit)

    async def change_temperature(self, change: tempering.Change) -> tempering.Tempered:
        """Apply the temperature of a fit or a given one, or restore the one before.

        Raises:
            Unknown: no such fit.
            Conflict: a fit of another model, or nothing to restore.
        """
        return await self._database.write(self._change, change)

    async def prune(self) -> None:
        """Forget what is older than the settings say, a little at a time."""
        if not self._retention:
            return
        gone, before = 1, time.time() - self._retention
        while gone:
            old = await self._database.read(lambda connection: forget.too_old(connection, before))
            gone = await self._database.write(forget.prune, old) if old.engines else 0

    async def remember(
        self,
        predictor: Predictor,
        rows: Sequence[Named],
        telemetry: Readings,
        found: Prediction,
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
        made = _made(rows, telemetry, found.answers, targets, ids)
        made = made if own else [row for row in made if row.label is not None and row.cycle is not None]
        said: dict[str, Told] = {}
        lost: set[str] = set()
        if made:
            try:
                if not self._database.up:  # it is asked every second; no prediction waits for it meanwhile
                    raise MemoryUnavailable("the database does not answer")
                said = await (self._keep(Batch(_by(predictor), now, made)) if own else self._say(made))
            except MemoryUnavailable:
                self._metrics.unremembered.inc(len(made))
                lost = {row.id for row in made}
        if targets is not None:
            elsewhere = [name in said and (not own or said[name][0] == "conflict") for name in ids]
            self._accounting.count_submitted(found, targets, predictor.temperature, np.array(elsewhere))
        return Remembered([None if name in lost else name for name in ids], [said.get(name) for name in ids])

    async def fly(self, predictor: Predictor, flights: Sequence[Flight]) -> Answer:
        """Keep flights, and predict each engine's health from what is known up to that cycle, both or neither.

        Raises:
            InvalidInput: the network has no finite answer for some readings.
            MemoryUnavailable: nothing was kept.
            Overloaded: nothing was kept.
        """

        def answer(rows: Sequence[Flight], windows: Readings) -> Predicted:
            started = time.perf_counter()
            try:
                found = predictor.answer(windows)
            except InvalidInput as error:
                raise _of_flight(error, rows, flights) from None
            made = _made(rows, windows, found, None, prediction_ids(len(rows), time.time()))
            return Predicted(made, (windows, found, time.perf_counter() - started))

        told = Flights(flights, _by(predictor), answer, time.time())

        def committed(stored: Stored) -> None:
            if stored.receipt is not None:  # one caller's answers every flight of a transaction
                predictor.count(*stored.receipt)
                self._accounting.count_stored(len(stored.receipt[0]))
            self._accounting.count_joined(stored.joined)

        landed = (await self._database.write(self._store, told, committed, len(flights))).landed
        return Answer(landed, *_together(predictor, landed))

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

        def committed(kept: remember.Remembered) -> None:
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


def _made(
    rows: Sequence[Named], telemetry: Readings, answers: Answers, targets: Floats | None, ids: Sequence[str]
) -> list[Made]:
    top, risk = answers.logits.argmax(axis=1).tolist(), answers.probabilities[:, -1].tolist()
    rul = None if answers.rul is None else answers.rul.tolist()
    labelled = np.zeros(len(rows), bool) if targets is None else ~np.isnan(targets[:, 0])
    return [
        Made(
            ids[i],
            row.engine_id,
            row.cycle,
            answers.logits[i].tobytes(),
            None if rul is None else rul[i],
            top[i],
            risk[i],
            targets[i] if targets is not None and labelled[i] else None,
            telemetry[i, -1] if telemetry.ndim > 2 else telemetry[i],
            (answers, i),
        )
        for i, row in enumerate(rows)
        if row.engine_id is not None
    ]


def _of_flight(error: InvalidInput, answered: Sequence[Flight], told: Sequence[Flight]) -> InvalidInput:
    """The same, by the place that the flight has in its own request; of another one's it is asked again, alone."""
    (fault,) = error.faults
    place = next((i for i, flight in enumerate(told) if flight is answered[int(fault.loc[1])]), None)
    if place is None:
        return error
    return InvalidInput(f"cycles[{place}].telemetry: {fault.msg}", (Fault(("cycles", place, "telemetry"), fault.msg),))


def _together(predictor: Predictor, landed: Sequence[Landed]) -> tuple[Prediction | None, list[str]]:
    """The answers of flights in their order, and their ids; those of flights told twice are what they were."""
    ids, parts = [], []
    for one in landed:
        if one.made is not None:
            ids.append(one.made.id)
            answers, k = one.made.answers
            parts.append(rows_of(answers, k, k + 1))
        elif one.kept is not None:
            ids.append(one.kept.id)
            rul = None if one.kept.rul is None else np.array([one.kept.rul], dtype=np.float32)
            logits, finite = np.frombuffer(one.kept.logits, np.float32)[None], np.ones(1, dtype=np.bool_)
            parts.append(calibrated(predictor.model, logits, rul, finite, predictor.temperature))
    if not parts:
        return None, []
    return Prediction(predictor.temperature, whole(joined(parts))), ids


def _by(predictor: Predictor) -> By:
    model, bins = predictor.model, predictor.drift_bins.bins if predictor.drift_bins.storable else None
    return By(model.digest, model.manifest, predictor.temperature, predictor.temperature_source, bins)


def _nothing(_: Any, items: Sequence[None]) -> list[None]:
    return [None for _ in items]
