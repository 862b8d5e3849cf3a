from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, create_engine, func, select

from model.contract import Manifest
from model.windows import Readings
from service.storage import forget, readings, remember
from service.storage.book import Book
from service.storage.migrate import migrate
from service.storage.readings import Flight, Flights, Landed, Predicted
from service.storage.remember import Batch, By, Made
from service.storage.tables import predictions
from tests.test_storage import MANIFEST

names = count()


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{tmp_path}/memory.db")
    migrate(engine)
    with engine.begin() as found:
        yield found
    engine.dispose()


def by(window: int) -> By:
    return By("d" * 64, Manifest.model_validate(MANIFEST.model_dump() | {"window": window}), 1.0, "artefact")


def made(rows: Sequence[Flight], windows: Readings) -> Predicted:
    """Logits that tell the window: its first, its last and its mean value."""
    logits = np.stack([windows[:, 0, 0], windows[:, -1, 0], windows.mean(axis=(1, 2))], axis=1).astype(np.float32)
    return Predicted(
        [
            Made(f"{next(names):032x}", row.engine_id, row.cycle, one.tobytes(), None, 0, 0.5, None)
            for row, one in zip(rows, logits, strict=True)
        ]
    )


def told(who: By, *cycles: int) -> Flights:
    """Flights of one engine whose one reading is the cycle."""
    return Flights([Flight("a", c, np.array([c], dtype=np.float32)) for c in cycles], who, made, 1.0)


def logits(landed: Landed) -> list[float]:
    assert landed.made is not None
    found: list[float] = np.frombuffer(landed.made.logits, np.float32).tolist()
    return found


def test_a_late_flight_of_another_request_moves_nobody_s_window(connection: Connection) -> None:
    """Requests that share a transaction are answered as one after the other, late flights of one engine included."""
    book, who = Book(), by(3)
    readings.store(book, connection, [told(who, 2, 4, 6)])
    (first, *_), (late, *_) = readings.store(book, connection, [told(who, 8), told(who, 1, 3)])
    assert [4.0, 8.0, 6.0] == logits(first[0])
    assert [[1.0, 1.0, 1.0], [1.0, 3.0, 2.0]] == [logits(one) for one in late]


def test_the_same_flight_twice_in_one_request_is_one_prediction(connection: Connection) -> None:
    """A flight that stands twice in one transaction has one answer, its own, whatever was predicted of it before."""
    book, who = Book(), by(3)
    before = made([Flight("a", 5, np.zeros(1, np.float32))], np.zeros((1, 3, 1), np.float32)).made
    remember.remember(book, connection, [Batch(who, 0.5, before)])
    (first, *_), (second, *_) = readings.store(book, connection, [told(who, 5, 5), told(who, 5)])
    every = [*first, *second]
    assert ["joined", "unchanged", "unchanged"] == [one.result for one in every]
    assert [[5.0, 5.0, 5.0]] * 3 == [logits(one) for one in every]
    assert 1 == len({one.made.id for one in every if one.made})
    assert 2 == connection.execute(select(func.count()).select_from(predictions)).scalar()


def test_an_old_flight_told_again_is_known_whatever_the_window(connection: Connection) -> None:
    """Flights that are no longer in mind are looked up, also for a model whose window is a single flight."""
    for window in (1, 2):
        book, who = Book(), by(window)
        first = [readings.store(book, connection, [told(who, c)])[0].landed[0].result for c in range(9)]
        again = [readings.store(book, connection, [told(who, c)])[0].landed[0].result for c in range(9)]
        assert ["joined" if window == 1 else "unchanged"] * 9 == first
        assert ["unchanged"] * 9 == again


def test_flights_that_are_forgotten_are_in_nobody_s_mind(connection: Connection) -> None:
    """After old flights were pruned a window begins with what is left, also in a process that remembers them."""
    book, who = Book(), by(3)
    readings.store(book, connection, [told(who, 2, 4)])
    readings.store(book, connection, [told(who, 6)._replace(told=5.0)])
    assert 4 == forget.prune(connection, [forget.too_old(connection, 3.0)])[0]  # two flights, and their predictions
    ((after, *_),) = readings.store(book, connection, [told(who, 8)._replace(told=6.0)])
    assert [6.0, 8.0] == logits(after[0])[:2]
