import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, create_engine, func, select

from model.contract import Manifest
from model.windows import Readings
from service.errors import Overloaded
from service.store.flight_recording import EngineLocks
from service.store.sql import flights, retention
from service.store.sql import predictions as remember
from service.store.sql.flight_cache import EngineTail
from service.store.sql.flights import EngineFlights, FlightWrite, FlightWriteResult, TailRequest
from service.store.sql.migrate import migrate
from service.store.sql.predictions import Batch, By, Made
from service.store.sql.session import Book
from service.store.sql.tables import predictions
from tests.support.stored import MANIFEST

names = count()


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{tmp_path}/memory.db")
    migrate(engine)
    with engine.begin() as found:
        yield found
    engine.dispose()


def by(window: int) -> By:
    manifest = {"window": window, "channels": [{"name": "x"}]}
    return By("d" * 64, Manifest.model_validate(MANIFEST.model_dump() | manifest), 1.0, "artefact")


def made(cycle: int, window: Readings) -> Made:
    """Logits that identify the window: its first, its last and its mean value."""
    logits = np.array([window[0, 0], window[-1, 0], window.mean()], np.float32)
    return Made(f"{next(names):032x}", "a", cycle, logits.tobytes(), None, 0, 0.5, None)


def flight(cycle: int) -> Readings:
    """One reading, the cycle."""
    return np.array([cycle], dtype=np.float32)


def tail(book: Book, connection: Connection, lowest: int, window: int, cached: EngineTail | None = None) -> EngineTail:
    """What is stored of the engine."""
    asked = TailRequest("a", lowest, window)
    return flights.read_tails(connection, [(asked, cached)], book.generation)["a"]


def write(who: By, base: EngineTail, *cycles: int, told: float = 1.0) -> FlightWrite:
    """Flights of one engine, with predictions of those that are not in its tail."""
    window, updated = who.manifest.window or 1, base.copy()
    results = {cycle: updated.add(cycle, flight(cycle)) for cycle in sorted(cycles)}
    new = [(cycle, flight(cycle)) for cycle, result in results.items() if result == "joined"]
    predicted = [made(cycle, updated.window(cycle, window)) for cycle, _ in new]
    repeats = [("a", cycle) for cycle, result in results.items() if result == "unchanged"]
    asked = TailRequest("a", min(cycles), window)
    return FlightWrite(who, [EngineFlights(asked, base.revision, base.generation, new)], predicted, repeats, told)


def record(
    book: Book, connection: Connection, who: By, *cycles: int, told: float = 1.0
) -> tuple[FlightWrite, FlightWriteResult]:
    """Store flights as one request does that nothing interferes with."""
    asked = write(who, tail(book, connection, min(cycles), who.manifest.window or 1), *cycles, told=told)
    (result,) = flights.record_flights(book, connection, [asked])
    assert not result.stale
    return asked, result


def logits(one: Made) -> list[float]:
    found: list[float] = np.frombuffer(one.logits, np.float32).tolist()
    return found


def test_stale_window_is_rebuilt_from_what_is_stored(connection: Connection) -> None:
    """Of two requests that built on the same flights the second stores nothing, and gets the flights of the first."""
    book, who = Book(), by(3)
    record(book, connection, who, 2, 4, 6)
    base = tail(book, connection, 1, 3)
    first, late = write(who, base, 8), write(who, base, 1, 3)
    stored, refused = flights.record_flights(book, connection, [first, late])
    assert (1, {}, 0) == (stored.stored, stored.stale, refused.stored)
    assert [2, 4, 6, 8] == refused.stale["a"].cycles
    again = write(who, refused.stale["a"], 1, 3)
    (result,) = flights.record_flights(book, connection, [again])
    assert (2, {}) == (result.stored, result.stale)
    assert [4.0, 8.0, 6.0] == logits(first.made[0])
    assert [[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]] == [logits(one) for one in again.made]
    assert [1, 2, 3, 4, 6, 8] == tail(book, connection, 1, 3).cycles
    assert 6 == connection.execute(select(func.count()).select_from(predictions)).scalar()


def test_repeated_flight_has_its_own_prediction(connection: Connection) -> None:
    """A flight that is stored already has the prediction made for it, whatever else was predicted of its cycle."""
    book, who = Book(), by(3)
    remember.remember(book, connection, [Batch(who, 0.5, [made(5, np.zeros((3, 1), np.float32))])])
    first, _ = record(book, connection, who, 5)
    remember.remember(book, connection, [Batch(who, 0.5, [made(5, np.ones((3, 1), np.float32))])])
    again, result = record(book, connection, who, 5)
    assert ([("a", 5)], [], 0) == (again.repeats, again.made, result.stored)
    assert first.made[0].id == result.earlier["a", 5].id
    assert 3 == connection.execute(select(func.count()).select_from(predictions)).scalar()


def test_repeated_flight_without_prediction_stores_nothing(connection: Connection) -> None:
    """Another model has not predicted a stored flight: it is asked to, and until then the request is not stored."""
    book, who = Book(), by(3)
    other = who._replace(temperature=2.0)
    record(book, connection, who, 5)
    asked, result = record(book, connection, other, 5, 6)
    assert ([("a", 5)], 0, {}) == (result.unpredicted, result.stored, result.earlier)
    assert [5] == tail(book, connection, 5, 3).cycles
    complete = asked._replace(made=[*asked.made, made(5, np.full((3, 1), 5, np.float32))])
    assert [(2, []), (0, [])] == [
        (one.stored, one.unpredicted)
        for one in (
            *flights.record_flights(book, connection, [complete]),
            record(book, connection, other, 5, 6)[1],
        )
    ]


def test_old_repeated_flight_is_recognised_with_any_window(connection: Connection) -> None:
    """Flights that are no longer cached are read, also for a model whose window is a single flight."""
    for window in (1, 2):
        book, who = Book(), by(window)
        first = [bool(record(book, connection, who, cycle)[0].repeats) for cycle in range(9)]
        again = [bool(record(book, connection, who, cycle)[0].repeats) for cycle in range(9)]
        assert [window == 2] * 9 == first
        assert [True] * 9 == again


def test_expired_flights_make_a_cached_tail_stale(connection: Connection) -> None:
    """After old flights were deleted a window begins with what is left, also in a process that has them cached."""
    book, who = Book(), by(3)
    record(book, connection, who, 2, 4)
    record(book, connection, who, 6, told=5.0)
    cached = tail(book, connection, 8, 3)
    assert [2, 4, 6] == cached.cycles
    assert cached is tail(book, connection, 8, 3, cached)
    assert (
        4 == retention.prune(connection, [retention.too_old(connection, 3.0)])[0]
    )  # two flights, and their predictions
    (refused,) = flights.record_flights(book, connection, [write(who, cached, 8, told=6.0)])
    assert (0, [6]) == (refused.stored, refused.stale["a"].cycles)
    assert [6] == tail(book, connection, 8, 3, cached).cycles
    after, _ = record(book, connection, who, 8, told=6.0)
    assert [6.0, 8.0] == logits(after.made[0])[:2]


def test_replaced_database_makes_every_tail_stale(connection: Connection) -> None:
    """The revision of another database may be the same by chance: its generation tells them apart."""
    book, who = Book(), by(3)
    cached = tail(book, connection, 1, 3)
    book.forget()  # a transaction failed
    assert not flights.record_flights(book, connection, [write(who, cached, 1)])[0].stale
    cached = tail(book, connection, 2, 3)
    book.forget(replaced=True)
    (refused,) = flights.record_flights(book, connection, [write(who, cached, 2)])
    assert (0, [1]) == (refused.stored, refused.stale["a"].cycles)


def test_engine_locks_serve_in_order_of_arrival() -> None:
    """One request at a time per engine; one that is cancelled while it waits, or as its turn comes, blocks nobody."""

    async def run() -> list[str]:
        locks, order = EngineLocks(10, 60), list[str]()

        @asynccontextmanager
        async def held(*engines: str) -> AsyncIterator[None]:
            if not locks.take_free(engines):
                await locks.take(engines)
            try:
                yield
            finally:
                locks.release(engines)

        async def work(name: str, *engines: str) -> None:
            async with held(*engines):
                order.append(name)
                await asyncio.sleep(0.01)

        async with held("a", "b"):
            tasks = [asyncio.create_task(work(f"{k}", *engines)) for k, engines in enumerate(["a", "ab", "b", "a"])]
            await asyncio.sleep(0)
            tasks[2].cancel()
            await asyncio.sleep(0)
            async with held("c"):
                order.append("free")
        tasks[0].cancel()  # whose turn has just come
        await asyncio.gather(*tasks, return_exceptions=True)
        assert locks.take_free(["a", "b", "c"])
        return order

    assert ["free", "1", "3"] == asyncio.run(run())


def test_engine_locks_refuse_what_would_wait_too_long() -> None:
    """As many requests wait for one engine as the queue allows, and none longer than it allows."""

    async def run(most: int, seconds: float) -> Sequence[BaseException | None]:
        locks = EngineLocks(most, seconds)
        assert locks.take_free(["a"])
        waiting = [asyncio.create_task(locks.take(["a"])) for _ in range(2)]
        await asyncio.sleep(0.02)
        locks.release(["a"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [task.exception() if task.done() else None for task in waiting]

    first, second = asyncio.run(run(1, 60))
    assert first is None
    assert isinstance(second, Overloaded)
    late, also_late = asyncio.run(run(2, 0.01))
    assert isinstance(late, Overloaded)
    assert also_late is None or isinstance(also_late, Overloaded)
