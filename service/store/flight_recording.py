"""`/v1/cycles`: build windows from cached engine tails, predict them like any other, store both in one transaction.

A transaction stores a round of requests only if the revision of each of its engines is the one that the windows were
built from. Otherwise it returns what is stored now, and the round predicts those engines again. Within a process one
round at a time works on an engine, and all requests that arrive meanwhile form the next one. Thus only writes of other
processes and retention make a tail stale. Runs in the event loop.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from service.errors import Overloaded, StoreUnavailable
from service.inference.predictor import Predictor
from service.store.flight_rounds import FlightRequest, FlightRound, NewFlight, RecordedFlights
from service.store.label_accounting import LabelAccounting
from service.store.sql import flights as readings
from service.store.sql.database import Database
from service.store.sql.flight_cache import EngineTail
from service.store.sql.flights import CachedTail, FlightWriteResult
from service.store.sql.session import WriteSession

MAX_CACHED_ENGINES = 10_000  # 200 flights of each take 140 MB
MAX_ROUND_FLIGHTS = 1024  # of waiting requests, beyond which a round takes no further request
SHARED_SECONDS = 60.0  # for which tails are verified after another process has changed an engine
MAX_TRIES = 20  # of one round whose engines other processes keep changing

Recorded = RecordedFlights | Exception  # the result of one request


class _Waiting(NamedTuple):
    """A request that waits for its engines."""

    request: FlightRequest
    done: "asyncio.Future[RecordedFlights]"
    since: float


class FlightRecorder:
    """Stores flights and predicts each from the flights of its engine up to its cycle.

    With `shared`, other processes store flights too: cached tails are compared with the store before each prediction.
    Without it this is done for `SHARED_SECONDS` after a write of another process was noticed.
    """

    def __init__(
        self,
        database: Database,
        session: WriteSession,
        accounting: LabelAccounting,
        max_queue: int,
        max_queue_seconds: float,
        shared: bool = False,
    ) -> None:
        self._database, self._session, self._accounting = database, session, accounting
        self._record_flights = partial(readings.record_flights, session)
        self._tails: dict[str, EngineTail] = {}  # least recently used engine first
        self._shared = shared
        self._shared_until = 0.0  # end of the time in which tails are verified
        self._all_cached, self._generation = (
            False,
            -1,
        )  # whether every engine with flights is cached, and in which generation
        self._reads: list[tuple[list[CachedTail], asyncio.Future[dict[str, EngineTail]]]] = []
        self._reader: asyncio.Task[None] | None = None  # runs while there are tails to read
        self._max_queue, self._max_seconds = max_queue, max_queue_seconds
        self._busy: set[str] = set()  # engines that a round works on
        self._waiting: list[_Waiting] = []  # in order of arrival
        self._reserved: set[str] = set()  # engines of waiting requests
        self._rounds: set[asyncio.Task[None]] = set()  # of requests that have waited

    async def record(self, predictor: Predictor, flights: Sequence[NewFlight]) -> RecordedFlights:
        """Store flights and their predictions, all of them or none, even if the client has left meanwhile.

        Raises:
            InvalidInput: the output of the network is not finite for some readings; nothing was stored.
            Conflict: flights with other channels are stored for an engine; nothing was stored.
            StoreUnavailable: nothing was stored.
            Overloaded: nothing was stored.
        """
        if not self._database.up:  # so that an unavailable store fails before the prediction
            await self._database.connect()
        request = FlightRequest(predictor, flights)
        engines = request.engines
        if not (self._busy.isdisjoint(engines) and self._reserved.isdisjoint(engines)):
            return await self._wait(request)
        self._busy.update(engines)
        try:
            (result,) = await self._store([request])
        finally:
            self._release(engines)
        if isinstance(result, Exception):
            raise result
        return result

    def clear_cache(self) -> None:
        """Drop every tail: flights were removed from the store."""
        self._tails.clear()
        self._all_cached = False

    async def _wait(self, request: FlightRequest) -> RecordedFlights:
        """Wait for the round of a request, and return its result."""
        if len(self._waiting) >= self._max_queue:
            raise Overloaded(
                f"{self._max_queue} requests wait for the same engines, which is the limit", self._max_seconds
            )
        done: asyncio.Future[RecordedFlights] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(request, done, time.monotonic()))
        self._reserved.update(request.engines)
        return await done

    def _release(self, engines: Iterable[str]) -> None:
        """Free engines, and start a round of all waiting requests whose engines are free, in order of arrival."""
        self._busy.difference_update(engines)
        if not self._waiting:
            return
        waiting, self._waiting, chosen, flights = self._waiting, [], list[_Waiting](), 0
        blocked, late = self._busy.copy(), time.monotonic() - self._max_seconds
        for entry in waiting:
            request, done, since = entry
            if done.done():  # the caller was cancelled
                continue
            if since < late:
                detail = f"waited {self._max_seconds:g} s for other requests of the same engine"
                done.set_exception(Overloaded(detail, self._max_seconds))
            elif (
                blocked.isdisjoint(request.engines)
                and (not chosen or request.predictor is chosen[0].request.predictor)
                and flights < MAX_ROUND_FLIGHTS
            ):
                chosen.append(entry)
                flights += len(request.flights)
            else:
                blocked.update(request.engines)
                self._waiting.append(entry)
        self._reserved = {name for entry in self._waiting for name in entry.request.engines}
        if chosen:
            engines = {name for entry in chosen for name in entry.request.engines}
            self._busy |= engines
            task = asyncio.get_running_loop().create_task(self._run(chosen, engines))
            self._rounds.add(task)  # the loop itself keeps no reference to a task
            task.add_done_callback(self._rounds.discard)

    async def _run(self, chosen: Sequence[_Waiting], engines: set[str]) -> None:
        """Store a round of requests that have waited, and give each its result."""
        try:
            results = await self._store_apart([entry.request for entry in chosen])
        except asyncio.CancelledError:  # the service stops
            for entry in chosen:
                entry.done.cancel()
            raise
        finally:
            self._release(engines)
        for (_, done, _), result in zip(chosen, results, strict=True):
            if done.done():
                continue
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

    async def _store_apart(self, requests: Sequence[FlightRequest]) -> list[Recorded]:
        """Store requests together, or one after the other if one of them fails."""
        try:
            return await self._store(requests)
        except (StoreUnavailable, Overloaded) as error:
            return [error] * len(requests)
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [(await self._store_apart([request]))[0] for request in requests]

    async def _store(self, requests: Sequence[FlightRequest]) -> list[Recorded]:
        """Store requests together, and return the result of each."""
        current = FlightRound(requests)
        current.build(await self._current_tails(current))
        for _ in range(MAX_TRIES):
            if not current.updated:
                return [current.failures[request] for request in requests]
            await current.predict()
            try:
                result = await self._database.write(
                    self._record_flights, current.write(), partial(self._stored, current), current.flights
                )
            except BaseException:  # it may be committed later, when another round has changed the arrays of the tails
                current.updated.clear()
                raise
            if not result.stale and not result.unpredicted:
                return current.results(result)
            if result.stale:
                self._all_cached, self._shared_until = False, time.monotonic() + SHARED_SECONDS
                current.build(result.stale)
            current.require(result.unpredicted)
        raise Overloaded("other processes change these engines at the same time", 1.0)

    def _stored(self, current: FlightRound, result: FlightWriteResult) -> None:
        """Count what was committed, and cache the tails."""
        self._accounting.count_stored(result.stored)
        if result.joined:
            self._accounting.count_joined(result.joined)
        if result.stale or result.unpredicted:
            return
        if result.stored:
            current.predictor.count(*current.stored_predictions(result))
        for name, tail in current.updated.items():
            tail.trim(current.window)
            self._tails.pop(name, None)  # inserted again as the newest
            self._tails[name] = tail
        while len(self._tails) > MAX_CACHED_ENGINES:
            del self._tails[next(iter(self._tails))]
            self._all_cached = False

    async def _current_tails(self, current: FlightRound) -> dict[str, EngineTail]:
        """Return the tails of the engines of a round, without a lock in the store.

        A cached tail is read again only if other processes write, or if it does not reach far enough back.
        """
        generation, tails = self._session.generation, dict[str, EngineTail]()
        missing: list[CachedTail] = []
        if self._generation != generation:
            self._tails.clear()
            self._all_cached, self._generation = not await self._database.read(readings.any_flights), generation
        shared = self._shared or time.monotonic() < self._shared_until
        for name, wanted in current.engines.items():
            tail = self._tails.get(name)
            if tail is None and self._all_cached and not shared:
                tails[name] = readings.empty_tail(generation, current.window)
            elif tail is None or not tail.reaches(wanted.lowest_cycle, current.window):
                missing.append((wanted, None))
            elif shared:
                missing.append((wanted, tail))
            else:
                tails[name] = tail
        return tails | await self._read(missing) if missing else tails

    async def _read(self, requests: list[CachedTail]) -> dict[str, EngineTail]:
        """Read tails together with those that other requests wait for."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, EngineTail]] = loop.create_future()
        self._reads.append((requests, done))
        if self._reader is None:
            self._reader = loop.create_task(self._read_all())
        return await done

    async def _read_all(self) -> None:
        while self._reads:
            reads, self._reads = self._reads, []
            tail_requests, generation = [tail for tails, _ in reads for tail in tails], self._session.generation
            try:
                tails = await self._database.read(
                    partial(readings.read_tails, requests=tail_requests, generation=generation)
                )
            except Exception as error:  # raised in every request that waits for these tails
                for _, done in reads:
                    if not done.done():
                        done.set_exception(error)
                continue
            for requests, done in reads:
                if not done.done():
                    done.set_result({request.engine_id: tails[request.engine_id] for request, _ in requests})
        self._reader = None
