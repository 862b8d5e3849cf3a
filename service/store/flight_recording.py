"""`/v1/cycles`: build windows from cached engine tails, predict them like any other, store both in one transaction.

A transaction stores a request only if the revision of each of its engines is the one that the windows were built from.
Otherwise it returns what is stored now, and the request predicts those engines again. Within a process the requests of
one engine take turns, so that only writes of other processes and retention make a tail stale. Runs in the event loop.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from model.windows import Readings
from service.errors import Conflict, Fault, InvalidInput, Overloaded
from service.ids import prediction_ids
from service.inference.predictions import (
    PredictionResult,
    Predictions,
    as_slices,
    calibrate,
    concatenate_predictions,
    select_range,
)
from service.inference.predictor import Predictor
from service.store.label_accounting import LabelAccounting
from service.store.new_predictions import model_version, new_predictions
from service.store.sql import flights as readings
from service.store.sql.database import Database
from service.store.sql.flight_cache import EngineTail, Result
from service.store.sql.flights import (
    CachedTail,
    EngineCycle,
    EngineFlights,
    FlightWrite,
    FlightWriteResult,
    StoredPrediction,
    TailRequest,
)
from service.store.sql.predictions import Made
from service.store.sql.session import Book

MAX_CACHED_ENGINES = 10_000  # two hundred flights of each are 140 MB
SHARED_SECONDS = 60.0  # that tails are verified first after another process changed an engine
MAX_TRIES = 20  # of one request whose engines other processes keep changing


class Flight(NamedTuple):
    """One engine's readings (channels,) float32 of one cycle."""

    engine_id: str
    cycle: int
    telemetry: Readings


class FlightOutcome(NamedTuple):
    """The result of one flight."""

    result: Result
    known: Readings | None = None  # the stored readings, where these were rejected


class RecordedFlights(NamedTuple):
    """The outcome of every flight, and the predictions and ids of those that were not rejected, in their order."""

    outcomes: list[FlightOutcome]
    prediction: PredictionResult | None
    ids: list[str]


class FlightRecorder:
    """Stores flights and predicts each from all that is known up to its cycle.

    `shared` says that other processes store flights too: cached tails are then compared with the store before anything
    is predicted. Without it this is done for a while after another process was noticed.
    """

    def __init__(
        self,
        database: Database,
        book: Book,
        accounting: LabelAccounting,
        max_queue: int,
        max_queue_seconds: float,
        shared: bool = False,
    ) -> None:
        self._database, self._book, self._accounting = database, book, accounting
        self._record_flights = partial(readings.record_flights, book)
        self._tails: dict[str, EngineTail] = {}  # the engine used longest ago first
        self._shared = shared
        self._shared_until = 0.0  # other processes changed these engines lately
        self._all_cached, self._generation = False, -1  # whether every engine with flights is cached, and as of when
        self._reads: list[tuple[list[CachedTail], asyncio.Future[dict[str, EngineTail]]]] = []
        self._reader: asyncio.Task[None] | None = None  # reads tails while there are any to be read
        self._locks = EngineLocks(max_queue, max_queue_seconds)

    async def record(
        self, predictor: Predictor, flights: Sequence[Flight], gone: Callable[[], bool] = lambda: False
    ) -> RecordedFlights:
        """Store flights and their predictions, all of them or none.

        Raises:
            InvalidInput: the output of the network is not finite for some readings; nothing was stored.
            Conflict: flights with other channels are stored for an engine; nothing was stored.
            StoreUnavailable: nothing was stored.
            Overloaded: nothing was stored.
            ClientDisconnected: the client disconnected before its flights were predicted.
        """
        engines: dict[str, list[int]] = {}
        for i, flight in enumerate(flights):
            engines.setdefault(flight.engine_id, []).append(i)
        if not self._database.up:  # it is tried before anything is predicted
            await self._database.write(_nothing, None)
        names = sorted(engines)
        if not self._locks.take_free(names):
            await self._locks.take(names)
        try:
            request = _Request(predictor, flights, engines)
            tails = await self._current_tails(request)
            for _ in range(MAX_TRIES):
                request.build(tails)
                await request.predict(gone)
                result = await self._write(request)
                if not result.stale and not result.unpredicted:
                    return request.recorded(result.earlier)
                if result.stale:
                    self._all_cached, self._shared_until = False, time.monotonic() + SHARED_SECONDS
                tails = result.stale
                request.require(result.unpredicted)
            raise Overloaded("other processes keep changing these engines", 1.0)
        finally:
            self._locks.release(names)

    def clear_cache(self) -> None:
        """Drop every tail: flights were removed from the store."""
        self._tails.clear()
        self._all_cached = False

    async def _current_tails(self, request: "_Request") -> dict[str, EngineTail]:
        """Return the tails of the engines of a request, as far as this process can tell without a lock.

        A cached tail is read again only if other processes write, or if it does not reach far enough back.
        """
        generation, found = self._book.generation, dict[str, EngineTail]()
        asked: list[CachedTail] = []
        if self._generation != generation:
            self._tails.clear()
            self._all_cached, self._generation = not await self._database.read(readings.any_flights), generation
        shared = self._shared or time.monotonic() < self._shared_until
        for name in request.engines:
            tail, wanted = self._tails.get(name), request.tail_request(name)
            if tail is None and self._all_cached and not shared:
                found[name] = readings.empty_tail(generation, request.window)
            elif tail is None or not tail.reaches(wanted.lowest_cycle, request.window):
                asked.append((wanted, None))
            elif shared:
                asked.append((wanted, tail))
            else:
                found[name] = tail
        return found | await self._read(asked) if asked else found

    async def _read(self, requests: list[CachedTail]) -> dict[str, EngineTail]:
        """Read tails together with whatever other requests have to read."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, EngineTail]] = loop.create_future()
        self._reads.append((requests, done))
        if self._reader is None:
            self._reader = loop.create_task(self._read_all())
        return await done

    async def _read_all(self) -> None:
        while self._reads:
            reads, self._reads = self._reads, []
            every, generation = [one for requests, _ in reads for one in requests], self._book.generation
            try:
                tails = await self._database.read(partial(readings.read_tails, requests=every, generation=generation))
            except Exception as error:  # raised in every request that waits for these tails
                for _, done in reads:
                    if not done.done():
                        done.set_exception(error)
                continue
            for requests, done in reads:
                if not done.done():
                    done.set_result({request.engine_id: tails[request.engine_id] for request, _ in requests})
        self._reader = None

    def _write(self, request: "_Request") -> Awaitable[FlightWriteResult]:
        updated = list(request.updated.items())

        def committed(result: FlightWriteResult) -> None:
            self._accounting.count_stored(result.stored)
            self._accounting.count_joined(result.joined)
            if not result.stale and not result.unpredicted:
                self._cache(updated, request.window)

        return self._database.write(self._record_flights, request.write(), committed, len(request.flights))

    def _cache(self, tails: Iterable[tuple[str, EngineTail]], window: int) -> None:
        for name, tail in tails:
            tail.trim(window)
            self._tails.pop(name, None)  # inserted again as the newest
            self._tails[name] = tail
        while len(self._tails) > MAX_CACHED_ENGINES:
            del self._tails[next(iter(self._tails))]
            self._all_cached = False


class _Request:
    """The flights of one request on their way into the store."""

    def __init__(self, predictor: Predictor, flights: Sequence[Flight], engines: dict[str, list[int]]) -> None:
        self.predictor, self.flights, self.engines = predictor, flights, engines
        self.window, self._channels = predictor.model.manifest.window or 1, predictor.model.channels
        for places in engines.values():
            places.sort(key=lambda i: flights[i].cycle)
        self.updated: dict[str, EngineTail] = {}  # as they are once this is stored
        self._writes: dict[str, EngineFlights] = {}
        self._outcomes: dict[int, FlightOutcome] = {}
        self._windows: dict[int, Readings] = {}  # not predicted yet
        self._predicted: dict[int, tuple[PredictionResult, int]] = {}  # and the row there
        self._made: dict[int, Made] = {}
        self._rounds: list[PredictionResult] = []
        self._repeats: dict[EngineCycle, int] = {}  # of flights that are stored already
        self._same: dict[int, int] = {}  # flights that are in this request twice, and where they are first

    def tail_request(self, name: str) -> TailRequest:
        """Return what is needed of an engine's tail."""
        return TailRequest(name, self.flights[self.engines[name][0]].cycle, self.window)

    def build(self, tails: dict[str, EngineTail]) -> None:
        """Add the flights of some engines to copies of their tails, and build the windows to be predicted.

        Raises:
            Conflict: the flights of a tail have other channels.
        """
        for name, tail in tails.items():
            if tail.channels is not None and tail.channels != self._channels:
                raise Conflict(f"engine {name!r} has flights with other channels than this model's")
            if name in self._writes:
                self._discard(name)
            updated, first, new = tail.copy(), dict[int, int](), []
            updated.channels = self._channels
            for i in self.engines[name]:
                _, cycle, values = self.flights[i]
                result = updated.add(cycle, values)
                if result == "conflict":
                    self._outcomes[i] = FlightOutcome(result, updated.row(cycle))
                    continue
                self._outcomes[i] = FlightOutcome(result)
                if cycle in first:
                    self._same[i] = first[cycle]
                    continue
                first[cycle] = i
                if result == "joined":
                    new.append((cycle, values))
                    self._windows[i] = updated.window(cycle, self.window)
                else:
                    self._repeats[name, cycle] = i
            updated.revision += bool(new)
            self.updated[name] = updated
            self._writes[name] = EngineFlights(self.tail_request(name), tail.revision, tail.generation, new)

    def require(self, repeats: Sequence[EngineCycle]) -> None:
        """Predict some flights that are stored without a prediction by this model at this temperature."""
        for name, cycle in repeats:
            self._windows[self._repeats[name, cycle]] = self.updated[name].window(cycle, self.window)

    async def predict(self, gone: Callable[[], bool]) -> None:
        """Predict every window that was built and not predicted yet.

        Raises:
            InvalidInput: the output of the network is not finite for a window, named by its place in the request.
        """
        places = sorted(self._windows)
        if not places:
            return
        windows = self._windows[places[0]][None] if len(places) == 1 else np.stack([self._windows[i] for i in places])
        try:
            prediction = await self.predictor.predict(windows, gone=gone)
        except InvalidInput as error:
            raise _at_flight(error, places) from None
        rows, ids = [self.flights[i] for i in places], prediction_ids(len(places), time.time())
        made = new_predictions(self.predictor, prediction, rows, windows, ids)
        self._rounds.append(prediction)
        for k, i in enumerate(places):
            self._predicted[i], self._made[i] = (prediction, k), made[k]
        self._windows.clear()

    def write(self) -> FlightWrite:
        """Return what is to be stored."""
        made = [self._made[i] for i in sorted(self._made)]
        by = model_version(self.predictor)
        return FlightWrite(by, list(self._writes.values()), made, list(self._repeats), time.time())

    def recorded(self, earlier: dict[EngineCycle, StoredPrediction]) -> RecordedFlights:
        """Return the response once all is stored; repeated flights have their earlier predictions."""
        outcomes = [self._outcomes[i] for i in range(len(self.flights))]
        accepted = [i for i, outcome in enumerate(outcomes) if outcome.known is None]
        if not accepted:
            return RecordedFlights(outcomes, None, [])
        if len(self._rounds) == 1 and not self._repeats and not self._same:
            return RecordedFlights(outcomes, self._rounds[0], [self._made[i].id for i in accepted])
        ids, parts = [], []
        for i in accepted:
            place = self._same.get(i, i)
            stored = earlier.get(self.flights[place][:2])
            if stored is not None:
                ids.append(stored.id)
                parts.append(_answers(self.predictor, stored))
            else:
                ids.append(self._made[place].id)
                own, k = self._predicted[place]
                parts.append(select_range(own.answers, k, k + 1))
        return RecordedFlights(
            outcomes, PredictionResult(self.predictor.temperature, as_slices(concatenate_predictions(parts))), ids
        )

    def _discard(self, name: str) -> None:
        """Drop what was built from a tail that is stale."""
        for i in self.engines[name]:
            for column in (self._windows, self._predicted, self._made, self._same):
                column.pop(i, None)
            self._repeats.pop((name, self.flights[i].cycle), None)


class EngineLocks:
    """Lets one request at a time work on an engine, in order of arrival; several engines are locked in one order."""

    def __init__(self, max_queue: int, max_queue_seconds: float) -> None:
        self._max_queue, self._max_seconds = max_queue, max_queue_seconds
        self._taken: dict[str, deque[asyncio.Future[None]]] = {}  # engines, and who waits for each

    def take_free(self, names: Sequence[str]) -> bool:
        """Take all of some engines if none of them is taken."""
        for name in names:
            if name in self._taken:
                return False
        for name in names:
            self._taken[name] = deque()
        return True

    async def take(self, names: Sequence[str]) -> None:
        """Take some engines, given in order of their names, as soon as they are free.

        Raises:
            Overloaded: too many requests wait for one of them, or this one waited too long.
        """
        since, taken = time.monotonic(), 0
        try:
            for name in names:
                await self._take(name)
                taken += 1
            if time.monotonic() - since > self._max_seconds:
                detail = f"waited {self._max_seconds:g} s for other requests of the same engine"
                raise Overloaded(detail, self._max_seconds)
        except BaseException:
            self.release(names[:taken])
            raise

    def release(self, names: Iterable[str]) -> None:
        """Hand each engine to the request that has waited longest for it."""
        for name in names:
            waiting = self._taken[name]
            while waiting:
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    break
            else:
                del self._taken[name]

    async def _take(self, name: str) -> None:
        waiting = self._taken.get(name)
        if waiting is None:
            self._taken[name] = deque()
            return
        if len(waiting) >= self._max_queue:
            raise Overloaded(f"{self._max_queue} requests of one engine wait", self._max_seconds)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was handed over meanwhile
                self.release([name])
            raise


def _at_flight(error: InvalidInput, places: Sequence[int]) -> InvalidInput:
    """The same error by the place of the flight in its request."""
    (fault,) = error.faults
    place = places[int(fault.loc[1])]
    return InvalidInput(f"cycles[{place}].telemetry: {fault.msg}", (Fault(("cycles", place, "telemetry"), fault.msg),))


def _answers(predictor: Predictor, stored: StoredPrediction) -> Predictions:
    rul = None if stored.rul is None else np.array([stored.rul], dtype=np.float32)
    logits, finite = np.frombuffer(stored.logits, np.float32)[None], np.ones(1, dtype=np.bool_)
    return calibrate(predictor.model, logits, rul, finite, predictor.temperature)


def _nothing(_: Any, items: Sequence[None]) -> list[None]:
    return list(items)
