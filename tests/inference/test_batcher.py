import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import numpy as np
import pytest

from service.errors import ClientDisconnected, Overloaded
from service.inference import batcher
from service.inference.batcher import MAX_NOTIFY_DELAY_SECONDS, Batcher, BatchSlice, Rows
from tests.support.clock import Clock


class Seen:
    """An observer that records the calls of the batcher."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.waits: list[float] = []
        self.rows_answered = 0

    def batch(
        self, rows: int, seconds: float, waits: list[float], completed: list[tuple[Rows, list[BatchSlice[Rows]]]]
    ) -> None:
        assert seconds >= 0
        self.batches.append(rows)
        self.waits += waits
        if completed:
            self.record_completed(completed)

    def record_completed(self, completed: list[tuple[Rows, list[BatchSlice[Rows]]]]) -> None:
        self.rows_answered += sum(len(rows) for rows, _ in completed)


class Gate:
    """A model that returns twice the sum of each row, and can be blocked."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.batches: list[Rows] = []

    def __call__(self, rows: Rows) -> Rows:
        self.entered.set()
        assert self.open.wait(10)
        if np.isnan(rows).any():
            raise ValueError("poisoned")
        self.batches.append(rows)
        result: Rows = 2 * rows.sum(axis=1)
        return result


class Stage(NamedTuple):
    """A batcher with its model and its observer."""

    batcher: Batcher[Rows]
    gate: Gate
    seen: Seen


def rows_of(*values: float) -> Rows:
    return np.array(values, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)


def whole(pieces: list[BatchSlice[Rows]]) -> Rows:
    return np.concatenate([piece.output[piece.begin : piece.end] for piece in pieces])


def run(scene: Callable[[Stage], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Run a scene with a new batcher, and close the batcher."""

    async def play() -> None:
        gate, seen = Gate(), Seen()
        chosen = {"max_batch_rows": 8, "max_queue_rows": 100, "max_queue_seconds": 60.0} | limits
        stage = Stage(Batcher(gate, seen, **chosen), gate, seen)
        await scene(stage)
        gate.open.set()
        await stage.batcher.close()

    asyncio.run(play())


async def busy(stage: Stage) -> "asyncio.Task[list[BatchSlice[Rows]]]":
    """Start a batch that is blocked inside the model, and return its task."""
    stage.gate.open.clear()
    stage.gate.entered.clear()
    first = asyncio.create_task(stage.batcher.submit(rows_of(1)))
    await asyncio.to_thread(stage.gate.entered.wait, 10)
    return first


def test_batcher_returns_each_caller_its_rows() -> None:
    """1000 concurrent callers with different numbers of rows each receive their own results in order."""

    async def scene(stage: Stage) -> None:
        requests = [rows_of(*(100.0 * i + k for k in range(1 + i % 21))) for i in range(1000)]
        results = await asyncio.gather(*(stage.batcher.submit(rows) for rows in requests))
        for rows, result in zip(requests, results, strict=True):
            np.testing.assert_array_equal(2 * rows.sum(axis=1), whole(result))
        assert max(stage.seen.batches) == 8
        assert sum(stage.seen.batches) == sum(len(rows) for rows in requests)
        assert len(stage.seen.waits) == 1000
        assert stage.seen.rows_answered == sum(len(rows) for rows in requests)

    run(scene, max_queue_rows=100_000)


def test_requests_during_inference_form_the_next_batch() -> None:
    """No request waits for a timer: a single caller is a batch of 1, five later ones are a batch of 5."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        others = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(5)]
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        await asyncio.gather(first, *others)
        assert [1, 5] == stage.seen.batches

    run(scene)


def test_large_request_does_not_delay_small_ones() -> None:
    """One row that arrives behind 50 rows is answered after the current batch, before all 50."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        large = asyncio.create_task(stage.batcher.submit(rows_of(*range(50))))
        await asyncio.sleep(0)
        small = asyncio.create_task(stage.batcher.submit(rows_of(7)))
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        await small
        assert not large.done()
        await asyncio.gather(first, large)
        assert 8 == max(stage.seen.batches)

    run(scene)


def test_large_request_in_progress_is_completed() -> None:
    """A large request gets every second batch among small ones, and large requests are processed one by one."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        requests = (rows_of(*[1] * 24), rows_of(*[2] * 24), *(rows_of(*[3] * 8) for _ in range(20)))
        tasks = [asyncio.create_task(stage.batcher.submit(rows)) for rows in requests]
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        await asyncio.gather(first, *tasks)
        kinds = [int(rows[0, 0]) for rows in stage.gate.batches[1:]]
        larger = [kind for kind in kinds if kind < 3]
        assert [1, 1, 1, 2, 2, 2] == larger
        assert 12 >= max(place for place, kind in enumerate(kinds, 1) if kind < 3)
        assert 20 == kinds.count(3)

    run(scene, max_queue_rows=1000)


def test_full_batches_need_no_event_loop() -> None:
    """Full batches are inferred while the event loop is blocked."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        full = [asyncio.create_task(stage.batcher.submit(rows_of(*range(8)))) for _ in range(5)]
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        deadline = time.monotonic() + 10
        while len(stage.gate.batches) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)  # blocks the event loop
        assert [1, *[8] * 5] == [len(rows) for rows in stage.gate.batches]
        assert [] == stage.seen.batches
        await asyncio.gather(first, *full)
        assert [1, *[8] * 5] == stage.seen.batches

    run(scene)


def test_slow_batches_are_reported_immediately() -> None:
    """Slow batches of a large request are reported before the request is complete, and later checks use them."""

    async def scene(stage: Stage) -> None:
        answered, run = 0, stage.batcher.run

        def slowly(rows: Rows) -> Rows:
            nonlocal answered
            if answered == 3:
                stage.gate.open.clear()
            else:
                time.sleep(2 * MAX_NOTIFY_DELAY_SECONDS)
            answered += 1
            return run(rows)

        stage.batcher.run = slowly
        large = asyncio.create_task(stage.batcher.submit(rows_of(*range(80))))
        while answered < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert stage.seen.batches == [8, 8, 8]
        with pytest.raises(Overloaded):
            stage.batcher.check_capacity(9)
        stage.gate.open.set()
        await large

    run(scene, max_queue_seconds=4 * MAX_NOTIFY_DELAY_SECONDS)


def test_request_with_too_long_a_wait_is_rejected() -> None:
    """Once the rate is measured, a request whose expected wait exceeds the limit is rejected on arrival."""

    async def scene(stage: Stage) -> None:
        def slow(rows: Rows) -> Rows:
            time.sleep(0.04)  # 5 ms per row of a full batch
            return stage.gate(rows)

        stage.batcher.run = slow
        await asyncio.gather(*(stage.batcher.submit(rows_of(*range(8))) for _ in range(6)))
        first = await busy(stage)
        waiting = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(300)]
        await asyncio.sleep(0.01)
        refused = [task for task in waiting if task.done()]
        assert len(refused) >= 300 - 1.0 / 0.005
        assert all("inference queue is too long" in str(task.exception()) for task in refused)
        stage.batcher.check_capacity(20)  # large requests have a separate queue, which is empty
        with pytest.raises(Overloaded, match=r"0 rows, 1\.1 s"):
            stage.batcher.check_capacity(20, other_delay=1.1)
        stage.gate.open.set()
        await asyncio.gather(first, *waiting, return_exceptions=True)

    run(scene, max_queue_rows=1000, max_queue_seconds=1.0)


def test_observer_receives_counted_rows_only() -> None:
    """Rows beyond `counted` are inferred and returned, but not reported to the observer."""

    async def scene(stage: Stage) -> None:
        result = await stage.batcher.submit(rows_of(*range(20)), counted=3)
        assert 20 == len(whole(result))
        assert 3 == stage.seen.rows_answered
        assert [8, 8, 4] == stage.seen.batches

    run(scene)


def test_request_after_close_is_answered() -> None:
    """A request that began before its model was replaced is still answered by that model."""

    async def scene(stage: Stage) -> None:
        for k in range(3):
            await stage.batcher.submit(rows_of(k))
            await stage.batcher.close()
        before = threading.active_count()
        result = await asyncio.wait_for(stage.batcher.submit(rows_of(7)), 10)
        np.testing.assert_array_equal([42], whole(result))
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert before >= threading.active_count()  # an ended thread may have been in the count before

    run(scene)


def test_queue_beyond_its_limits_rejects() -> None:
    """Rows beyond the limit are rejected on arrival, and expired rows at their turn; both with a retry time."""

    async def full(stage: Stage) -> None:
        first = await busy(stage)
        waiting = asyncio.create_task(stage.batcher.submit(rows_of(*range(100))))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refusal:
            await stage.batcher.submit(rows_of(1))
        assert refusal.value.retry_after > 0
        stage.gate.open.set()
        await asyncio.gather(first, waiting)

    async def old(stage: Stage) -> None:
        first = await busy(stage)
        waiting = asyncio.create_task(stage.batcher.submit(rows_of(2)))
        await asyncio.sleep(0.05)
        stage.gate.open.set()
        await first
        with pytest.raises(Overloaded, match="waited"):
            await waiting
        await stage.batcher.submit(rows_of(3))

    run(full)
    run(old, max_queue_seconds=0.02)


def test_empty_queue_accepts_a_larger_request() -> None:
    """An empty queue accepts a request that is larger than its limit."""

    async def scene(stage: Stage) -> None:
        result = await stage.batcher.submit(rows_of(*range(500)))
        assert 500 == len(whole(result))

    run(scene)


def test_rows_of_disconnected_callers_are_not_inferred() -> None:
    """Rows of a disconnected or cancelled caller never reach the model."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        left = asyncio.create_task(stage.batcher.submit(rows_of(5), lambda: True))
        gave_up = asyncio.create_task(stage.batcher.submit(rows_of(6)))
        stayed = asyncio.create_task(stage.batcher.submit(rows_of(7)))
        await asyncio.sleep(0.01)
        gave_up.cancel()
        stage.gate.open.set()
        await asyncio.gather(first, stayed)
        with pytest.raises(ClientDisconnected, match=r"^the client left before its rows were taken$"):
            await left
        np.testing.assert_array_equal(rows_of(1, 7), np.concatenate(stage.gate.batches))

    run(scene)


def test_rows_around_disconnected_caller_form_one_batch() -> None:
    """Callers before and after one that has disconnected are inferred together."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        gone = (lambda: False, lambda: True, lambda: False)
        tasks = [asyncio.create_task(stage.batcher.submit(rows_of(2), disconnected)) for disconnected in gone]
        await asyncio.sleep(0)
        stage.gate.open.set()
        await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [1, 2] == stage.seen.batches
        assert [False, True, False] == [task.exception() is not None for task in tasks]

    run(scene)


def test_failing_batch_fails_only_its_callers() -> None:
    """A failed batch fails each caller with rows in it, and no other caller."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        poisoned = asyncio.create_task(stage.batcher.submit(rows_of(np.nan, *range(8))))
        neighbour = asyncio.create_task(stage.batcher.submit(rows_of(1)))
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        for task in (poisoned, neighbour):
            with pytest.raises(ValueError, match="poisoned"):
                await task
        await first
        await stage.batcher.submit(rows_of(2))

    run(scene)


def test_close_returns_after_every_admitted_request() -> None:
    """`close` returns after every admitted request is answered."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        waiting = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(30)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, stage.gate.open.set)
        await stage.batcher.close()
        assert [True] * 31 == [task.done() for task in (first, *waiting)]
        await asyncio.gather(first, *waiting)

    run(scene)


def test_thread_after_the_loop_ended_raises_nothing() -> None:
    """An inference that ends after the event loop was closed is dropped without an error."""
    gate = Gate()
    gate.open.clear()

    async def scene() -> threading.Thread:
        batcher = Batcher[Rows](gate, Seen(), max_batch_rows=8, max_queue_rows=100, max_queue_seconds=60.0)
        task = asyncio.create_task(batcher.submit(rows_of(*range(20))))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        task.cancel()
        assert batcher._thread is not None
        return batcher._thread

    thread = asyncio.run(scene())
    raised: list[object] = []
    before, threading.excepthook = threading.excepthook, raised.append
    gate.open.set()
    thread.join(0.5)  # waits for rows that never arrive
    threading.excepthook = before
    assert gate.batches
    assert not raised


async def infer_full_batches(stage: Stage, clock: Clock, *seconds: float) -> None:
    """Infer one full batch of 8 rows for each duration."""
    for duration in seconds:

        def run(rows: Rows, duration: float = duration) -> Rows:
            clock.now += duration
            return stage.gate(rows)

        stage.batcher.run = run
        await stage.batcher.submit(rows_of(*range(8)))
    stage.batcher.run = stage.gate


async def queued(stage: Stage, *sizes: int) -> "list[asyncio.Task[list[BatchSlice[Rows]]]]":
    """Submit requests of the given sizes, which wait behind a blocked batch."""
    tasks = [await busy(stage)]
    tasks += [asyncio.create_task(stage.batcher.submit(rows_of(*range(size)))) for size in sizes]
    await asyncio.sleep(0)
    return tasks


def test_capacity_of_the_queue_is_used_up_to_its_last_row() -> None:
    """Waiting rows may reach the limit exactly, and an empty queue accepts any number of rows."""

    async def scene(stage: Stage) -> None:
        stage.batcher.check_capacity(101)
        tasks = await queued(stage, 8, 30)
        stage.batcher.check_capacity(62)
        with pytest.raises(Overloaded, match=r"^inference queue is full \(38 of 100 rows\)$") as refusal:
            stage.batcher.check_capacity(63)
        assert 60 == refusal.value.retry_after
        stage.gate.open.set()
        await asyncio.gather(*tasks)

    run(scene)


@pytest.mark.parametrize(
    ("sizes", "rows", "accepted"),
    [
        ((5, 5), 1, True),  # 10 rows of 0.5 s each equal the longest wait
        ((5, 6), 1, False),
        ((5, 5), 8, True),  # one full batch is not a large request
        ((5, 6), 8, False),
        ((5, 6), 9, True),  # a large request, and no other large one waits
        ((10,), 1, True),
        ((10,), 9, True),
        ((9, 2), 1, True),  # behind 2 rows and 2 alternating rows of the large request
        ((9, 5), 1, True),
        ((9, 6), 1, False),
        ((9, 1), 9, True),  # behind 9 rows and 1 alternating row of the small ones
        ((9, 2), 9, False),
    ],
)
def test_expected_delay_depends_on_rows_before(clock: Clock, sizes: tuple[int, ...], rows: int, accepted: bool) -> None:
    """The expected delay counts the rows ahead in the same queue and as many of the other queue."""

    async def scene(stage: Stage) -> None:
        await infer_full_batches(stage, clock, 4.0)
        tasks = await queued(stage, *sizes)
        if accepted:
            stage.batcher.check_capacity(rows)
        else:
            with pytest.raises(Overloaded, match=r"[56]\.[05] s of at most 5 s$") as refusal:
                stage.batcher.check_capacity(rows)
            assert 5 == refusal.value.retry_after
        stage.gate.open.set()
        await asyncio.gather(*tasks)

    run(scene, max_queue_seconds=5.0)


def test_other_delay_is_added_and_none_by_default(clock: Clock) -> None:
    """The delay outside of the queue shortens the time that rows may wait in it."""

    async def scene(stage: Stage) -> None:
        await infer_full_batches(stage, clock, 4.0)
        tasks = await queued(stage, 4)
        stage.batcher.check_capacity(1, other_delay=3.0)
        with pytest.raises(Overloaded, match=r"4 rows, 5\.5 s of at most 5 s"):
            await stage.batcher.submit(rows_of(1), other_delay=3.5)
        in_time = asyncio.create_task(stage.batcher.submit(rows_of(1), other_delay=2.0))
        late = asyncio.create_task(stage.batcher.submit(rows_of(1), other_delay=2.5))
        await asyncio.sleep(0)
        clock.now += 3.0
        stage.gate.open.set()
        await asyncio.gather(*tasks, in_time)
        with pytest.raises(Overloaded, match=r"waited 3\.0 s in the inference queue, at most 2\.5 s") as refusal:
            await late
        assert 5 == refusal.value.retry_after

    run(scene, max_queue_seconds=5.0)


def test_rate_is_the_median_of_the_last_full_batches(clock: Clock) -> None:
    """The rate is the median of the last 9 full batches; one pause and partial batches do not change it."""

    async def scene(stage: Stage) -> None:
        async def expected() -> str:
            tasks = await queued(stage, 8)
            with pytest.raises(Overloaded) as refusal:
                stage.batcher.check_capacity(1, other_delay=1000.0)
            stage.gate.open.set()
            await asyncio.gather(*tasks)
            return str(refusal.value)

        await infer_full_batches(stage, clock, *[800.0] * 20)
        await infer_full_batches(stage, clock, *[8.0] * 4)
        assert "8 rows, 1800.0 s" in await expected()  # its batch took no time
        await infer_full_batches(stage, clock, *[8.0] * 3, 8000.0)
        assert "8 rows, 1008.0 s" in await expected()

    run(scene, max_queue_seconds=999.0)


def test_results_delivered_when_caller_is_done_or_late(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are delivered together, when a caller completes, fails or expires, or after the maximum delay."""
    monkeypatch.setattr(batcher, "MAX_NOTIFY_DELAY_SECONDS", 0.25)

    async def scene(stage: Stage) -> None:
        loop, deliveries = asyncio.get_running_loop(), list[int]()
        usual = loop.call_soon_threadsafe

        def call_soon_threadsafe(callback: Any, *arguments: Any) -> Any:
            if arguments and isinstance(arguments[0], list):
                deliveries.append(len(arguments[0]))
            return usual(callback, *arguments)

        def timed(rows: Rows) -> Rows:
            clock.now += seconds
            return stage.gate(rows)

        async def deliver(*tasks: "asyncio.Task[list[BatchSlice[Rows]]]") -> list[int]:
            await asyncio.sleep(0)
            deliveries.clear()
            stage.gate.open.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            return list(deliveries)

        monkeypatch.setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)
        stage.batcher.run = timed
        seconds = 0.0
        assert [1, 3, 3] == await deliver(*await queued(stage, 24, 24))
        large = (await busy(stage), asyncio.create_task(stage.batcher.submit(rows_of(*range(40)))))
        assert [1, 2, 3] == await deliver(*large, asyncio.create_task(stage.batcher.submit(rows_of(1), lambda: True)))
        seconds = 0.125  # two batches reach the delay, three exceed it
        assert [1, 3, 3, 1] == await deliver(*await queued(stage, 56))
        seconds = 0.0
        failing = rows_of(*range(10), np.nan, *range(29))
        counts = await deliver(await busy(stage), asyncio.create_task(stage.batcher.submit(failing)))
        assert [1, 2] == counts[:2]  # rows behind the failure may be dropped or inferred

    run(scene)


def test_observer_receives_batches_with_their_waits(clock: Clock) -> None:
    """A batch is reported with its duration and with the wait of each caller that starts in it."""

    async def scene(stage: Stage) -> None:
        received: list[tuple[int, float, list[float]]] = []
        stage.seen.batch = lambda *batch: received.append(batch[:3])  # type: ignore[method-assign]  # records every call

        def slow(rows: Rows) -> Rows:
            clock.now += 4.0
            return stage.gate(rows)

        stage.batcher.run = slow
        tasks = await queued(stage, 10, 2)
        clock.now += 0.5
        tasks.append(asyncio.create_task(stage.batcher.submit(rows_of(1))))
        await asyncio.sleep(0)
        stage.gate.open.set()
        await asyncio.gather(*tasks)
        assert [(1, 4.5, [0.0]), (8, 4.0, [0.5, 0.0, 0.5]), (5, 4.0, [])] == received

    run(scene)


async def observed(stage: Stage) -> "list[list[tuple[Rows, list[BatchSlice[Rows]]]]]":
    """Record the calls of the observer from this point, with outputs that equal their rows."""
    calls: list[list[tuple[Rows, list[BatchSlice[Rows]]]]] = []

    def record(completed: list[tuple[Rows, list[BatchSlice[Rows]]]]) -> None:
        for rows, slices in completed:
            np.testing.assert_array_equal(2 * rows.sum(axis=1), whole(slices))
        calls.append(completed)

    stage.seen.record_completed = record  # type: ignore[method-assign]  # records every call
    return calls


def test_observer_receives_callers_of_a_whole_batch_as_one() -> None:
    """Callers that fill one batch are one entry; callers of shared or split batches are one entry each."""

    async def scene(stage: Stage) -> None:
        calls = await observed(stage)
        tasks = await queued(stage, 3, 4)
        stage.gate.open.set()
        await asyncio.gather(*tasks)
        assert [[1], [7]] == [[len(rows) for rows, _ in call] for call in calls]
        calls.clear()
        tasks = await queued(stage, 20, 3, 4)
        stage.gate.open.set()
        await asyncio.gather(*tasks)
        assert [[1], [3, 4], [20]] == [[len(rows) for rows, _ in call] for call in calls]

    run(scene)


@pytest.mark.parametrize(("counted", "slices"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (19, 3), (20, 3)])
def test_observer_receives_the_leading_rows_of_each_caller(counted: int, slices: int) -> None:
    """The observer receives the first `counted` rows of a caller and their outputs in as few slices as possible."""

    async def scene(stage: Stage) -> None:
        calls = await observed(stage)
        await stage.batcher.submit(rows_of(*range(20)), counted=counted)
        await stage.batcher.submit(rows_of(*range(5)), counted=2)
        assert [[counted], [2]] == [[len(rows) for rows, _ in call] for call in calls]
        assert [[slices], [1]] == [[len(some) for _, some in call] for call in calls]

    run(scene)


def test_observer_ignores_callers_without_counted_rows() -> None:
    """A caller without counted rows is answered and not reported; the others of its batch are reported."""

    async def scene(stage: Stage) -> None:
        calls = await observed(stage)
        assert 20 == len(whole(await stage.batcher.submit(rows_of(*range(20)), counted=0)))
        assert [] == calls
        tasks = [await busy(stage), asyncio.create_task(stage.batcher.submit(rows_of(1, 2), counted=0))]
        tasks.append(asyncio.create_task(stage.batcher.submit(rows_of(3))))
        await asyncio.sleep(0)
        stage.gate.open.set()
        await asyncio.gather(*tasks)
        assert [[1], [1]] == [[len(rows) for rows, _ in call] for call in calls]

    run(scene)


def test_observer_ignores_cancelled_callers() -> None:
    """A caller that is cancelled during inference is not reported; the others of its batch are."""

    async def scene(stage: Stage) -> None:
        calls = await observed(stage)
        first = await busy(stage)
        first.cancel()
        stayed = asyncio.create_task(stage.batcher.submit(rows_of(5, 6)))
        await asyncio.sleep(0)
        stage.gate.open.set()
        await stayed
        assert [[2]] == [[len(rows) for rows, _ in call] for call in calls]

    run(scene)


@pytest.mark.parametrize("name", ["batch", "record_completed"])
def test_error_of_the_observer_is_raised_to_the_callers(name: str) -> None:
    """An error of the observer is raised to the callers of the batch, and later callers are answered."""

    async def scene(stage: Stage) -> None:
        def fail(*_: object) -> None:
            raise LookupError("observer")

        usual = getattr(stage.seen, name)
        setattr(stage.seen, name, fail)
        with pytest.raises(LookupError, match="observer"):
            await asyncio.wait_for(stage.batcher.submit(rows_of(1)), 10)
        setattr(stage.seen, name, usual)
        np.testing.assert_array_equal([6], whole(await stage.batcher.submit(rows_of(1))))

    run(scene)


def test_thread_runs_until_the_close() -> None:
    """One daemon thread serves all requests until `close`; a later request starts a temporary one."""

    async def scene(stage: Stage) -> None:
        threads = list[threading.Thread | None]()
        for _ in range(2):
            first = await busy(stage)
            threads.append(stage.batcher._thread)
            stage.gate.open.set()
            await first
            assert threads[0] is stage.batcher._thread
        await stage.batcher.close()
        later = await busy(stage)
        threads.append(stage.batcher._thread)
        stage.gate.open.set()
        await later
        assert stage.batcher._thread is None
        for thread in threads:
            assert thread is not None
            assert ("inference", True) == (thread.name, thread.daemon)
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()

    run(scene)


def test_requests_of_one_turn_wake_the_thread_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one event-loop turn wake the thread once, and a running thread is not woken."""

    async def scene(stage: Stage) -> None:
        loop, wakes = asyncio.get_running_loop(), list[object]()
        usual = loop.call_soon

        def call_soon(callback: Any, *arguments: Any, **options: Any) -> Any:
            if getattr(callback, "__self__", None) is stage.batcher:
                wakes.append(callback)
            return usual(callback, *arguments, **options)

        monkeypatch.setattr(loop, "call_soon", call_soon)
        await asyncio.gather(*(stage.batcher.submit(rows_of(k)) for k in range(5)))
        assert 1 == len(wakes)
        tasks = await queued(stage, 1, 2, 3)
        assert 2 == len(wakes)
        stage.gate.open.set()
        await asyncio.gather(*tasks)

    run(scene)


def test_rows_of_a_single_caller_are_not_copied() -> None:
    """The model receives the rows of a single caller without a copy."""

    async def scene(stage: Stage) -> None:
        rows = rows_of(*range(20))
        await stage.batcher.submit(rows)
        assert [True] * 3 == [np.shares_memory(rows, batch) for batch in stage.gate.batches]

    run(scene)


def test_close_waits_for_callers_behind_a_failed_one() -> None:
    """A caller whose batches all fail counts once, so that `close` waits for all others."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        poisoned = asyncio.create_task(stage.batcher.submit(rows_of(*[np.nan] * 24)))
        others = [asyncio.create_task(stage.batcher.submit(rows_of(*range(40)))) for _ in range(2)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(stage.gate.open.set)
        await stage.batcher.close()
        assert [True] * 4 == [task.done() for task in (first, poisoned, *others)]
        with pytest.raises(ValueError, match="poisoned"):
            await poisoned
        await asyncio.gather(first, *others)

    run(scene, max_queue_rows=1000)
