from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, create_engine, func, select

from model.contract import Manifest
from model.windows import Readings
from service.store.sql import flights, retention
from service.store.sql import predictions as stored_predictions
from service.store.sql.flight_cache import EngineTail
from service.store.sql.flights import EngineFlights, FlightWrite, FlightWriteResult, TailRequest
from service.store.sql.migrate import migrate
from service.store.sql.predictions import ModelVersion, NewPrediction, PredictionWrite
from service.store.sql.session import WriteSession
from service.store.sql.tables import predictions
from tests.support.stored import MANIFEST

names = count()


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{tmp_path}/memory.db")
    migrate(engine)
    with engine.begin() as connected:
        yield connected
    engine.dispose()


def model_of(window: int) -> ModelVersion:
    manifest = {"window": window, "channels": [{"name": "x"}]}
    return ModelVersion("d" * 64, Manifest.model_validate(MANIFEST.model_dump() | manifest), 1.0, "artefact")


def prediction_of(cycle: int, window: Readings) -> NewPrediction:
    """Return a prediction whose logits are the first, the last and the mean value of its window."""
    logits = np.array([window[0, 0], window[-1, 0], window.mean()], np.float32)
    return NewPrediction(f"{next(names):032x}", "a", cycle, logits.tobytes(), None, 0, 0.5, None)


def flight(cycle: int) -> Readings:
    """Return one reading that equals the cycle."""
    return np.array([cycle], dtype=np.float32)


def tail(
    session: WriteSession, connection: Connection, lowest: int, window: int, cached: EngineTail | None = None
) -> EngineTail:
    """Return the stored flights of the engine."""
    request = TailRequest("a", lowest, window)
    return flights.read_tails(connection, [(request, cached)], session.generation)["a"]


def write(model: ModelVersion, base: EngineTail, *cycles: int, recorded_at: float = 1.0) -> FlightWrite:
    """Return flights of one engine with predictions of those that are missing in its tail."""
    window, updated = model.manifest.window or 1, base.copy()
    results = {cycle: updated.add(cycle, flight(cycle)) for cycle in sorted(cycles)}
    new = [(cycle, flight(cycle)) for cycle, result in results.items() if result == "joined"]
    predicted = [prediction_of(cycle, updated.window(cycle, window)) for cycle, _ in new]
    repeats = [("a", cycle) for cycle, result in results.items() if result == "unchanged"]
    request = TailRequest("a", min(cycles), window)
    engine = EngineFlights(request, base.revision, base.generation, new)
    return FlightWrite(model, [engine], predicted, repeats, recorded_at)


def record(
    session: WriteSession, connection: Connection, model: ModelVersion, *cycles: int, recorded_at: float = 1.0
) -> tuple[FlightWrite, FlightWriteResult]:
    """Store flights as one request that no other request interferes with."""
    base = tail(session, connection, min(cycles), model.manifest.window or 1)
    written = write(model, base, *cycles, recorded_at=recorded_at)
    (result,) = flights.record_flights(session, connection, [written])
    assert not result.stale
    return written, result


def logits(prediction: NewPrediction) -> list[float]:
    values: list[float] = np.frombuffer(prediction.logits, np.float32).tolist()
    return values


def test_stale_tail_is_rebuilt_from_stored_flights(connection: Connection) -> None:
    """Of two writes on the same tail, the second stores nothing and receives the flights of the first."""
    session, model = WriteSession(), model_of(3)
    record(session, connection, model, 2, 4, 6)
    base = tail(session, connection, 1, 3)
    first, late = write(model, base, 8), write(model, base, 1, 3)
    stored, refused = flights.record_flights(session, connection, [first, late])
    assert (1, {}, 0) == (stored.stored, stored.stale, refused.stored)
    assert [2, 4, 6, 8] == refused.stale["a"].cycles
    again = write(model, refused.stale["a"], 1, 3)
    (result,) = flights.record_flights(session, connection, [again])
    assert (2, {}) == (result.stored, result.stale)
    assert [4.0, 8.0, 6.0] == logits(first.predictions[0])
    assert [[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]] == [logits(prediction) for prediction in again.predictions]
    assert [1, 2, 3, 4, 6, 8] == tail(session, connection, 1, 3).cycles
    assert 6 == connection.execute(select(func.count()).select_from(predictions)).scalar()


def test_repeated_flight_has_its_own_prediction(connection: Connection) -> None:
    """A stored flight returns the prediction made for it, whatever else was predicted for its cycle."""
    session, model = WriteSession(), model_of(3)
    stored_predictions.record_predictions(
        session, connection, [PredictionWrite(model, 0.5, [prediction_of(5, np.zeros((3, 1), np.float32))])]
    )
    first, _ = record(session, connection, model, 5)
    stored_predictions.record_predictions(
        session, connection, [PredictionWrite(model, 0.5, [prediction_of(5, np.ones((3, 1), np.float32))])]
    )
    again, result = record(session, connection, model, 5)
    assert ([("a", 5)], [], 0) == (again.repeats, again.predictions, result.stored)
    assert first.predictions[0].id == result.earlier["a", 5].id
    assert 3 == connection.execute(select(func.count()).select_from(predictions)).scalar()


def test_repeated_flight_without_prediction_stores_nothing(connection: Connection) -> None:
    """A stored flight that the model has not predicted is reported, and the request is not stored until it is."""
    session, model = WriteSession(), model_of(3)
    other = model._replace(temperature=2.0)
    record(session, connection, model, 5)
    written, result = record(session, connection, other, 5, 6)
    assert ([("a", 5)], 0, {}) == (result.unpredicted, result.stored, result.earlier)
    assert [5] == tail(session, connection, 5, 3).cycles
    complete = written._replace(predictions=[*written.predictions, prediction_of(5, np.full((3, 1), 5, np.float32))])
    assert [(2, []), (0, [])] == [
        (prediction.stored, prediction.unpredicted)
        for prediction in (
            *flights.record_flights(session, connection, [complete]),
            record(session, connection, other, 5, 6)[1],
        )
    ]


def test_old_repeated_flight_is_recognised_with_any_window(connection: Connection) -> None:
    """Flights beyond the cached tail are read from the store, also for a window of one flight."""
    for window in (1, 2):
        session, model = WriteSession(), model_of(window)
        first = [bool(record(session, connection, model, cycle)[0].repeats) for cycle in range(9)]
        again = [bool(record(session, connection, model, cycle)[0].repeats) for cycle in range(9)]
        assert [window == 2] * 9 == first
        assert [True] * 9 == again


def test_expired_flights_make_a_cached_tail_stale(connection: Connection) -> None:
    """After retention a window begins with the remaining flights, also where expired ones are cached."""
    session, model = WriteSession(), model_of(3)
    record(session, connection, model, 2, 4)
    record(session, connection, model, 6, recorded_at=5.0)
    cached = tail(session, connection, 8, 3)
    assert [2, 4, 6] == cached.cycles
    assert cached is tail(session, connection, 8, 3, cached)
    assert (
        4 == retention.delete_expired(connection, [retention.find_expired(connection, 3.0)])[0]
    )  # two flights, and their predictions
    (refused,) = flights.record_flights(session, connection, [write(model, cached, 8, recorded_at=6.0)])
    assert (0, [6]) == (refused.stored, refused.stale["a"].cycles)
    assert [6] == tail(session, connection, 8, 3, cached).cycles
    after, _ = record(session, connection, model, 8, recorded_at=6.0)
    assert [6.0, 8.0] == logits(after.predictions[0])[:2]


def test_replaced_database_makes_every_tail_stale(connection: Connection) -> None:
    """The generation makes a cached tail stale even if the revision in another database is equal."""
    session, model = WriteSession(), model_of(3)
    cached = tail(session, connection, 1, 3)
    session.clear()  # a transaction failed
    assert not flights.record_flights(session, connection, [write(model, cached, 1)])[0].stale
    cached = tail(session, connection, 2, 3)
    session.clear(replaced=True)
    (refused,) = flights.record_flights(session, connection, [write(model, cached, 2)])
    assert (0, [1]) == (refused.stored, refused.stale["a"].cycles)
