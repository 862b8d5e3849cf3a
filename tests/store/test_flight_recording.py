import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.samples import Sample

from service.errors import InvalidInput, Overloaded, StoreUnavailable
from service.inference.model_loader import open_model
from service.inference.predictor import Predictor
from service.metrics import Metrics
from service.settings import read_settings
from service.store.flight_rounds import NewFlight, RecordedFlights
from service.store.label_accounting import LabelAccounting
from service.store.store import Store
from tests.support.models import window_classifier

INFINITE = 3e38  # the network overflows on this value
Requests = Sequence[Sequence[NewFlight]]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of windows (3, 2) whose logits are ten times the sums over time."""
    return window_classifier(tmp_path_factory.mktemp("model") / "sums.onnx", "ReduceSum", 3)


@asynccontextmanager
async def opened(artefact: Path, folder: Path, **settings: Any) -> AsyncIterator[tuple[Store, Predictor, Metrics]]:
    """Open a store on an empty database, and a predictor."""
    metrics = Metrics(CollectorRegistry())
    chosen = read_settings(database_url=f"sqlite:///{folder}/{len(list(folder.iterdir()))}.db", **settings)
    predictor = Predictor(open_model(artefact), metrics, chosen)
    predictor.serve()
    store = Store(chosen, metrics, LabelAccounting(metrics))
    await store.open()
    try:
        yield store, predictor, metrics
    finally:
        await predictor.close()
        await store.close()


def flight(engine_id: str, cycle: int, value: float | None = None) -> NewFlight:
    x = cycle / 7 if value is None else value
    return NewFlight(engine_id, cycle, np.array([x, 1 / (1 + cycle)], dtype=np.float32))


async def record(store: Store, predictor: Predictor, requests: Requests, together: bool) -> list[Any]:
    """Return the result of every request, or its error."""
    if together:
        calls = [store.record_flights(predictor, flights) for flights in requests]
        return list(await asyncio.gather(*calls, return_exceptions=True))
    results = list[Any]()
    for flights in requests:
        results += await asyncio.gather(store.record_flights(predictor, flights), return_exceptions=True)
    return results


def describe(result: Any, names: dict[str, int]) -> Any:
    """Return outcomes, logits and the ids as numbers in order of appearance, or the error."""
    if not isinstance(result, RecordedFlights):
        return type(result), str(result)
    outcomes = [(o.result, None if o.stored is None else o.stored.tolist()) for o in result.outcomes]
    ids = [names.setdefault(name, len(names)) for name in result.ids]
    logits = None if result.prediction is None else result.prediction.answers.logits.tobytes()
    return outcomes, ids, logits


async def rows(store: Store, engines: Sequence[str]) -> list[Any]:
    """Return the stored flights of each engine, and cycle, logits and `is_latest` of its predictions."""
    stored: list[Any] = []
    for name in engines:
        cycles, readings = await store.sensors(name, ("x", "y"), 500)
        history = await store.history(name, True)
        predicted = [] if history is None else sorted((p.cycle, p.logits, p.is_latest) for p in history.rows)
        stored.append((name, cycles, readings.tolist(), predicted))
    return stored


def compare(artefact: Path, folder: Path, requests: Requests) -> tuple[list[Any], int]:
    """Record requests sequentially and concurrently, and compare; return results and the number of predictions."""

    async def run(together: bool) -> tuple[list[Any], list[Any], int]:
        async with opened(artefact, folder) as (store, predictor, metrics):
            results = await record(store, predictor, requests, together)
            names = dict[str, int]()
            engines = sorted({one.engine_id for flights in requests for one in flights})
            described = [describe(result, names) for result in results]
            assert counted(metrics) == (metrics.labellable._value.get(),) * 2  # each stored prediction counts once
            return described, await rows(store, engines), int(metrics.labellable._value.get())

    sequential, concurrent = asyncio.run(run(False)), asyncio.run(run(True))
    assert sequential == concurrent
    return concurrent[0], concurrent[2]


def counted(metrics: Metrics) -> tuple[float, float]:
    """Return the number of predictions in `predictions_total` and in `confidence`."""
    by_class = {s.labels["health"]: s.value for s in samples(metrics.predictions) if s.name.endswith("_total")}
    (confidence,) = (s.value for s in samples(metrics.confidence) if s.name.endswith("_count"))
    return sum(by_class.values()), confidence


def samples(family: Counter | Histogram) -> list[Sample]:
    return [sample for metric in family.collect() for sample in metric.samples]


@pytest.mark.parametrize("split", [False, True])
def test_same_flight_twice_is_one_prediction(artefact: Path, tmp_path: Path, split: bool) -> None:
    """A flight that is repeated in one request, or in two concurrent ones, is stored and predicted once."""
    a, b = flight("a", 1), flight("a", 1)
    results, predictions = compare(artefact, tmp_path, [[flight("a", 0)], [a], [b]] if split else [[a, b]])
    ids = [number for _, numbers, _ in results for number in numbers]
    assert ([0, 1, 1], 2) == (ids, predictions) if split else ([0, 0], 1) == (ids, predictions)


def test_concurrent_requests_equal_sequential_ones(artefact: Path, tmp_path: Path) -> None:
    """Outcomes, bits of predictions and stored rows do not depend on whether requests form rounds."""
    random = np.random.default_rng(3)
    requests = [
        [
            flight("abc"[random.integers(3)], int(random.integers(30)), float(random.integers(2)))
            for _ in range(random.integers(1, 5))
        ]
        for _ in range(80)
    ]
    results, _ = compare(artefact, tmp_path, requests)
    kinds = {result for outcomes, _, _ in results for result, _ in outcomes}
    assert {"joined", "unchanged", "conflict"} == kinds


def test_request_that_fails_in_a_round_fails_alone(artefact: Path, tmp_path: Path) -> None:
    """A request without finite output has no effect on other requests for the same engines."""
    wrong = [flight("b", 5), flight("a", 3, INFINITE)]
    requests = [[flight("a", 1)], [flight("a", 2)], wrong, [flight("a", 4)], [flight("b", 6)], [flight("c", 1)]]
    results, predictions = compare(artefact, tmp_path, requests)
    assert InvalidInput is results[2][0]
    assert results[2][1].startswith("cycles[1].telemetry")
    assert (5, 5) == (predictions, sum(len(result) == 3 for result in results))


def test_waiting_requests_form_one_round(artefact: Path, tmp_path: Path) -> None:
    """All requests that arrive while their engine is busy are predicted in one batch."""

    async def run() -> tuple[float, float]:
        async with opened(artefact, tmp_path) as (store, predictor, metrics):
            await record(store, predictor, [[flight("a", cycle)] for cycle in range(50)], True)
            sums = {s.name: s.value for m in metrics.batch_rows.collect() for s in m.samples}
            return sums["engine_health_batch_rows_count"], sums["engine_health_batch_rows_sum"]

    assert (2, 50) == asyncio.run(run())


def test_cancelled_request_blocks_no_other(artefact: Path, tmp_path: Path) -> None:
    """A request that is cancelled while it waits or is stored does not delay any other one."""

    async def run() -> list[Any]:
        async with opened(artefact, tmp_path) as (store, predictor, _):
            tasks = [asyncio.create_task(store.record_flights(predictor, [flight("a", cycle)])) for cycle in range(5)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[1].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            again = await store.record_flights(predictor, [flight("a", 5)])
            return [*map(type, results), type(again)]

    cancelled, stored = asyncio.CancelledError, RecordedFlights
    assert [cancelled, cancelled, stored, stored, stored, stored] == asyncio.run(run())


def test_requests_that_wait_too_long_are_rejected(artefact: Path, tmp_path: Path) -> None:
    """Waiting requests are limited by the queue, and expired requests are not stored."""

    async def run(locked: float, **settings: Any) -> list[Any]:
        folder = tmp_path / str(locked)
        folder.mkdir()
        async with opened(artefact, folder, **settings) as (store, predictor, _):
            with sqlite3.connect(folder / "0.db", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                tasks = [asyncio.create_task(store.record_flights(predictor, [flight("a", k)])) for k in range(3)]
                await asyncio.sleep(locked)
                other.execute("ROLLBACK")
            return [type(result) for result in await asyncio.gather(*tasks, return_exceptions=True)]

    assert [RecordedFlights, RecordedFlights, Overloaded] == asyncio.run(run(0, max_queue_rows=1))
    assert [RecordedFlights, Overloaded, Overloaded] == asyncio.run(run(0.7, max_queue_seconds=0.5))


def test_flight_predicted_again_is_counted_once(artefact: Path, tmp_path: Path) -> None:
    """Two processes that make each other's tails stale count each stored prediction once."""

    async def run() -> tuple[float, ...]:
        async with opened(artefact, tmp_path) as (store, predictor, metrics):
            one = tmp_path / "0.db"
            other_metrics = Metrics(CollectorRegistry())
            other = Store(read_settings(database_url=f"sqlite:///{one}"), other_metrics, LabelAccounting(other_metrics))
            await other.open()
            try:
                for cycle in range(4):
                    for each in (store, other):
                        both = [flight("a", 2 * cycle + (each is other)), flight("b", 2 * cycle + (each is other))]
                        await each.record_flights(predictor, both)
            finally:
                await other.close()
            (inferences,) = (s.value for s in samples(metrics.batch_rows) if s.name.endswith("_sum"))
            return *counted(metrics), inferences

    predictions, confidence, inferences = asyncio.run(run())
    assert (16, 16) == (predictions, confidence)
    assert inferences > 16  # some predictions were repeated


def test_flight_that_is_not_stored_is_not_counted(artefact: Path, tmp_path: Path) -> None:
    """The prediction of a flight that is not stored is not counted, and its retry is counted once."""

    async def run() -> list[tuple[float, float]]:
        async with opened(artefact, tmp_path, max_queue_seconds=0.5) as (store, predictor, metrics):
            with sqlite3.connect(tmp_path / "0.db", isolation_level=None) as other:
                other.execute("ALTER TABLE predictions RENAME TO hidden")
                with pytest.raises(StoreUnavailable):
                    await store.record_flights(predictor, [flight("a", 1)])
                before = counted(metrics)
                other.execute("ALTER TABLE hidden RENAME TO predictions")
            await store.record_flights(predictor, [flight("a", 1)])
            return [before, counted(metrics)]

    assert [(0, 0), (1, 1)] == asyncio.run(run())
