import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Connection, text

from model.contract import Manifest
from service.store.records import LabelSubmission
from service.store.sql import labels, predictions, retention
from service.store.sql.database import Database
from service.store.sql.labels import LabelWrite, OutcomeSubmission
from service.store.sql.locks import lock_all
from service.store.sql.predictions import ModelVersion, NewPrediction, PredictionWrite
from service.store.sql.session import WriteSession
from tests.support.postgres import Postgres, postgres

BY = ModelVersion("d" * 64, Manifest(name="tested", version="1", classes=("a", "b", "c")), 1.0, "artefact")
LABEL = np.array([1.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    with postgres() as started:
        yield started


class Process:
    """The database connection and write session of one process; `again` counts its failed transactions."""

    def __init__(self, url: str) -> None:
        self.again = 0
        self.session = WriteSession()
        self.database = Database(url, self._failed, 1000, 60, lock_all)

    def _failed(self, replaced: bool) -> None:
        self.again += 1
        self.session.clear(replaced)

    async def together(self, *work_items: tuple[Any, Any]) -> None:
        """Run work and items in one transaction, in this order."""
        waits = self.database.write(_wait, None)
        await asyncio.gather(waits, *(self.database.write(work, item) for work, item in work_items))

    def end(self, engine: str, at: int) -> tuple[Any, Any]:
        return partial(labels.record_outcomes, self.session), OutcomeSubmission(engine, at, True, 1.0)

    def label(self, engine: str, cycle: int) -> tuple[Any, Any]:
        return partial(labels.record_labels, self.session), LabelWrite(
            [LabelSubmission(None, engine, cycle, LABEL, False)], 1.0
        )

    def label_of(self, prediction: str) -> tuple[Any, Any]:
        return partial(labels.record_labels, self.session), LabelWrite(
            [LabelSubmission(prediction, None, None, LABEL, True)], 1.0
        )

    def predict(self, name: str, engine: str, cycle: int) -> tuple[Any, Any]:
        prediction = NewPrediction(name, engine, cycle, np.ones(3, np.float32).tobytes(), None, 0, 0.5, None)
        return partial(predictions.record_predictions, self.session), PredictionWrite(BY, 1.0, [prediction])


def _wait(connection: Connection, items: Any) -> list[None]:
    connection.execute(text("SELECT pg_sleep(0.01)"))
    return [None for _ in items]


def _pause(connection: Connection, items: Any) -> list[None]:
    return _wait(connection, items)  # differs from `_wait`, so that it separates two kinds of work


def test_writes_of_two_processes_never_deadlock(cluster: Postgres) -> None:
    """Mixed writes to the same engines from two processes never deadlock."""

    async def ask() -> tuple[int, int]:
        url = cluster.url("circles")
        one, other = Process(url), Process(url)
        await one.together(one.predict("0" * 32, "e1", 0), one.predict("1" * 32, "e2", 0))
        await other.together()
        for k in range(1, 30):
            ends = one.together(one.end("e1", k), one.label("e2", k))
            await asyncio.gather(ends, other.together(other.end("e2", k), other.label("e1", k)))
            first = one.together(one.predict(f"{k:032x}a"[1:], "e2", k), one.label_of("0" * 32))
            await asyncio.gather(first, other.together(other.predict(f"{k:032x}b"[1:], "e1", k), other.end("e2", k)))
        await one.database.close()
        await other.database.close()
        return one.again, other.again

    assert (0, 0) == asyncio.run(ask())


def test_retention_and_writes_never_deadlock(cluster: Postgres) -> None:
    """Retention of rows that another process writes to never deadlocks, and deletes all expired rows."""

    async def ask() -> tuple[int, int]:
        url = cluster.url("forgetting")
        one, other = Process(url), Process(url)
        await other.together()
        for k in range(10):
            await one.together(one.predict(f"{k:032x}", "e1", k))
            old = await other.database.read(lambda connection: retention.find_expired(connection, 2.0))
            forgets = other.together(other.end("e2", k), (_pause, None), (retention.delete_expired, old))
            await asyncio.gather(forgets, one.together(one.end("e1", k), one.end("e2", k)))
        old = await other.database.read(lambda connection: retention.find_expired(connection, 2.0))
        await other.database.write(retention.delete_expired, old)
        left = await other.database.read(lambda connection: retention.find_expired(connection, 2.0))
        await one.database.close()
        await other.database.close()
        return one.again + other.again, len(left.engines)

    assert (0, 0) == asyncio.run(ask())
