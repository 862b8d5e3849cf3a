"""Flights of one or several requests that are stored in one write.

A round adds the flights of its requests to copies of cached engine tails, in order of arrival, and predicts their
windows in one call. Each request has the outcomes that it would have if the requests were stored one after the other.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from model.windows import Readings
from service.errors import Conflict, Fault, InvalidInput, ServiceError
from service.ids import prediction_ids
from service.inference.batcher import BatchSlice
from service.inference.predictions import BatchPredictions, PredictionResult, calibrate
from service.inference.predictor import Predictor
from service.store.new_predictions import model_version, new_predictions
from service.store.sql.flight_cache import EngineTail, FlightResult
from service.store.sql.flights import (
    EngineCycle,
    EngineFlights,
    FlightWrite,
    FlightWriteResult,
    StoredPrediction,
    TailRequest,
)
from service.store.sql.predictions import NewPrediction


class NewFlight(NamedTuple):
    """One engine's readings (channels,) float32 of one cycle."""

    engine_id: str
    cycle: int
    telemetry: Readings


class FlightOutcome(NamedTuple):
    """The result of one flight."""

    result: FlightResult
    stored: Readings | None = None  # the stored readings if the flight was rejected


class RecordedFlights(NamedTuple):
    """The outcome of every flight, and the predictions and ids of those that were not rejected, in their order."""

    outcomes: list[FlightOutcome]
    prediction: PredictionResult | None
    ids: list[str]


class FlightRequest:
    """The flights of one caller. `engines` has the lowest cycle of each engine."""

    __slots__ = ("engines", "flights", "outcomes", "predictor")

    def __init__(self, predictor: Predictor, flights: Sequence[NewFlight]) -> None:
        self.predictor, self.flights = predictor, flights
        self.engines: dict[str, int] = {}
        for name, cycle, _ in flights:
            lowest = self.engines.get(name)
            if lowest is None or cycle < lowest:
                self.engines[name] = cycle
        self.outcomes: list[FlightOutcome | None] = [None] * len(flights)


class _Window(NamedTuple):
    """A flight, its place in its request, and the window that ends with it."""

    place: int
    flight: NewFlight
    values: Readings


class FlightRound:
    """Requests of one predictor on their way into the store.

    `tails` has the tails of all engines as they are stored, and `updated` as they are once the round is stored.
    `failures` has the error of each request that nothing is stored of.
    """

    def __init__(self, requests: Sequence[FlightRequest]) -> None:
        self.requests, self.predictor = requests, requests[0].predictor
        self.window, self._channels = self.predictor.model.manifest.window or 1, self.predictor.model.channels
        self.engines: dict[str, TailRequest] = {}
        self.flights = 0
        for request in requests:
            self.flights += len(request.flights)
            for name, cycle in request.engines.items():
                wider = self.engines.get(name)
                if wider is None or cycle < wider.lowest_cycle:
                    self.engines[name] = TailRequest(name, cycle, self.window)
        self.failures: dict[FlightRequest, ServiceError] = {}
        self.updated: dict[str, EngineTail] = {}
        self._tails: dict[str, EngineTail] = {}
        self._new: dict[str, list[tuple[int, Readings]]] = {}  # flights by engine
        self._windows: dict[EngineCycle, _Window] = {}  # of every flight that needs a prediction
        self._repeats: dict[EngineCycle, _Window] = {}  # of flights that are stored already
        self._predicted: dict[EngineCycle, tuple[NewPrediction, BatchSlice[BatchPredictions]]] = {}

    def build(self, tails: Mapping[str, EngineTail]) -> None:
        """Add all flights to copies of tails. Predictions of engines whose tail is not given again stay valid."""
        if self._predicted:
            for key in [key for key in self._predicted if key[0] in tails]:
                del self._predicted[key]
        self._tails |= tails
        self.updated, self._new, self._windows, self._repeats = {}, {}, {}, {}
        for request in self.requests:
            if request not in self.failures and self._check_channels(request):
                self._add(request)

    def require(self, repeats: Sequence[EngineCycle]) -> None:
        """Predict some flights that are stored without a prediction by this model at this temperature."""
        for key in repeats:
            if key in self._repeats:  # not if its request has failed since
                self._windows[key] = self._repeats[key]

    async def predict(self) -> None:
        """Predict every window that is not predicted yet.

        Raises:
            InvalidInput: the output of the network is not finite for a window, named by its place in its request.
        """
        windows = self._windows
        if self._predicted:
            windows = {key: window for key, window in windows.items() if key not in self._predicted}
        if not windows:
            return
        chosen = list(windows.values())
        if len(chosen) == 1:
            values, flights = chosen[0].values[None], [chosen[0].flight]
        else:
            values, flights = np.stack([window.values for window in chosen]), [window.flight for window in chosen]
        try:
            prediction = await self.predictor.predict(values, counted=False)
        except InvalidInput as error:
            raise _name_flight(error, chosen) from None
        ids = prediction_ids(len(chosen), time.time())
        rows = new_predictions(self.predictor, prediction, flights, values, ids)
        k = 0
        for output, begin, end in prediction.pieces:
            for i in range(begin, end):
                row = rows[k]
                self._predicted[row.engine_id, flights[k].cycle] = row, BatchSlice(output, i, i + 1)
                k += 1

    def write(self) -> FlightWrite:
        """Return what is to be stored."""
        engines = []
        for name, new in self._new.items():
            tail = self._tails[name]
            engines.append(EngineFlights(self.engines[name], tail.revision, tail.generation, new))
        rows = []
        for key in self._windows:
            rows.append(self._predicted[key][0])  # noqa: PERF401  # a comprehension is a frame of every request
        return FlightWrite(model_version(self.predictor), engines, rows, list(self._repeats), time.time())

    def results(self, written: FlightWriteResult) -> list[RecordedFlights | Exception]:
        """Return the result of each request once all is stored; repeated flights have their earlier predictions."""
        predicted = self._predicted | self._earlier(written.earlier) if written.earlier else self._predicted
        return [self.failures.get(request) or _recorded(request, predicted) for request in self.requests]

    def stored_predictions(self, written: FlightWriteResult) -> tuple[Readings, list[BatchSlice[BatchPredictions]]]:
        """Return the newest readings (N, channels) of the predictions that were stored, and slices of these."""
        newest, slices = [], list[BatchSlice[BatchPredictions]]()
        for key, window in self._windows.items():
            if key not in written.earlier:
                newest.append(window.flight.telemetry)
                _append_slice(slices, self._predicted[key][1])
        return np.array(newest), slices

    def _check_channels(self, request: FlightRequest) -> bool:
        for name in request.engines:
            channels = self._tails[name].channels
            if channels is not None and channels != self._channels:
                detail = f"engine {name!r} has flights with other channels than this model's"
                self.failures[request] = Conflict(detail)
                self._predicted.clear()  # windows of other requests may have included flights of this one
                return False
        return True

    def _add(self, request: FlightRequest) -> None:
        """Add the flights of one request in order of cycle."""
        flights = request.flights
        places: Sequence[int] = range(len(flights))
        if len(flights) > 1:
            places = sorted(places, key=[flight.cycle for flight in flights].__getitem__)
        for i in places:
            name, cycle, values = flight = flights[i]
            tail = self.updated.get(name)
            if tail is None:
                self.updated[name] = tail = self._tails[name].copy()
                tail.channels, self._new[name] = self._channels, []
            key, result = (name, cycle), tail.add(cycle, values)
            if result == "conflict":
                request.outcomes[i] = FlightOutcome(result, tail.row(cycle))
                continue
            request.outcomes[i] = FlightOutcome(result)
            if result == "joined":
                tail.revision = self._tails[name].revision + 1
                self._new[name].append((cycle, values))
                self._windows[key] = _Window(i, flight, tail.window(cycle, self.window))
            elif key not in self._windows and key not in self._repeats:
                self._repeats[key] = _Window(i, flight, tail.window(cycle, self.window))

    def _earlier(
        self, stored: dict[EngineCycle, StoredPrediction]
    ) -> dict[EngineCycle, tuple[StoredPrediction, BatchSlice[BatchPredictions]]]:
        """Return stored predictions, calibrated as when they were stored."""
        rows = list(stored.values())
        logits = np.frombuffer(b"".join([row.logits for row in rows]), np.float32).reshape(len(rows), -1)
        rul = None if rows[0].rul is None else np.array([row.rul for row in rows], np.float32)
        finite = np.ones(len(rows), np.bool_)
        output = BatchPredictions.of(calibrate(self.predictor.model, logits, rul, finite, self.predictor.temperature))
        return {key: (row, BatchSlice(output, k, k + 1)) for k, (key, row) in enumerate(stored.items())}


def _recorded(
    request: FlightRequest,
    predicted: Mapping[EngineCycle, tuple[NewPrediction | StoredPrediction, BatchSlice[BatchPredictions]]],
) -> RecordedFlights:
    outcomes, ids, pieces = [], list[str](), list[BatchSlice[BatchPredictions]]()
    for i, flight in enumerate(request.flights):
        outcome = request.outcomes[i]
        assert outcome is not None  # every flight of a request was added
        outcomes.append(outcome)
        if outcome.stored is None:
            row, piece = predicted[flight.engine_id, flight.cycle]
            ids.append(row.id)
            _append_slice(pieces, piece)
    return RecordedFlights(outcomes, PredictionResult(request.predictor.temperature, pieces) if ids else None, ids)


def _append_slice(slices: list[BatchSlice[BatchPredictions]], new: BatchSlice[BatchPredictions]) -> None:
    """Append a slice, or extend the last one by it if it follows that one in the same output."""
    if slices and slices[-1].output is new.output and slices[-1].end == new.begin:
        slices[-1] = BatchSlice(new.output, slices[-1].begin, new.end)
    else:
        slices.append(new)


def _name_flight(error: InvalidInput, windows: Sequence[_Window]) -> InvalidInput:
    """Return the same error by the place of the flight in its request."""
    (fault,) = error.faults
    place = windows[int(fault.loc[1])].place
    return InvalidInput(f"cycles[{place}].telemetry: {fault.msg}", (Fault(("cycles", place, "telemetry"), fault.msg),))
