import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import numpy as np
import pytest

from service.errors import ClientDisconnected, Overloaded
from service.inference.batcher import MAX_NOTIFY_DELAY_SECONDS, Batcher, BatchSlice, Rows


class Seen:
    """What the batcher told its observer."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.waits: list[float] = []
        self.rows_answered = 0

    def batch(self, rows: int, seconds: float, waits: list[float]) -> None:
        assert seconds >= 0
        self.batches.append(rows)
        self.waits += waits

    def answered(self, answered: list[tuple[Rows, list[BatchSlice[Rows]]]]) -> None:
        self.rows_answered += sum(len(rows) for rows, _ in answered)


class Gate:
    """A callable over rows that answers twice their sum, and can be held shut."""

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
        found: Rows = 2 * rows.sum(axis=1)
        return found


class Stage(NamedTuple):
    """A batcher, the callable behind it and its observer."""

    batcher: Batcher[Rows]
    gate: Gate
    seen: Seen


def rows_of(*values: float) -> Rows:
    return np.array(values, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)


def whole(pieces: list[BatchSlice[Rows]]) -> Rows:
    return np.concatenate([piece.output[piece.begin : piece.end] for piece in pieces])


def run(scene: Callable[[Stage], Coroutine[Any, Any, None]], **limits: Any) -> None:
    """Play a scene with a batcher, and close it."""

    async def play() -> None:
        gate, seen = Gate(), Seen()
        chosen = {"max_batch_rows": 8, "max_queue_rows": 100, "max_queue_seconds": 60.0} | limits
        stage = Stage(Batcher(gate, seen, **chosen), gate, seen)
        await scene(stage)
        gate.open.set()
        await stage.batcher.close()

    asyncio.run(play())


async def busy(stage: Stage) -> "asyncio.Task[list[BatchSlice[Rows]]]":
    """A batch held inside the callable."""
    stage.gate.open.clear()
    stage.gate.entered.clear()
    first = asyncio.create_task(stage.batcher.submit(rows_of(1)))
    await asyncio.to_thread(stage.gate.entered.wait, 10)
    return first


def test_everyone_gets_their_own_answer() -> None:
    """A thousand callers with windows of different values and numbers of rows each hear of their own, in order."""

    async def scene(stage: Stage) -> None:
        asked = [rows_of(*(100.0 * i + k for k in range(1 + i % 21))) for i in range(1000)]
        answers = await asyncio.gather(*(stage.batcher.submit(rows) for rows in asked))
        for rows, found in zip(asked, answers, strict=True):
            np.testing.assert_array_equal(2 * rows.sum(axis=1), whole(found))
        assert max(stage.seen.batches) == 8
        assert sum(stage.seen.batches) == sum(len(rows) for rows in asked)
        assert len(stage.seen.waits) == 1000
        assert stage.seen.rows_answered == sum(len(rows) for rows in asked)

    run(scene, max_queue_rows=100_000)


def test_those_who_arrive_while_the_model_is_busy_are_the_next_batch() -> None:
    """Nobody waits for a timer: a lone caller is a batch of one, five who came meanwhile are one of five."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        others = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(5)]
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        await asyncio.gather(first, *others)
        assert [1, 5] == stage.seen.batches

    run(scene)


def test_a_large_request_lets_others_take_their_turn() -> None:
    """One window that arrives behind fifty rows is answered after the batch in hand, not after all of them."""

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


def test_a_large_request_whose_turn_has_come_is_finished() -> None:
    """However many small ones follow, a large request takes every second batch, and large ones go one by one."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        asked = (rows_of(*[1] * 24), rows_of(*[2] * 24), *(rows_of(*[3] * 8) for _ in range(20)))
        tasks = [asyncio.create_task(stage.batcher.submit(rows)) for rows in asked]
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
    """While the event loop is busy with other things, whatever waits in full batches is inferred."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        full = [asyncio.create_task(stage.batcher.submit(rows_of(*range(8)))) for _ in range(5)]
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        deadline = time.monotonic() + 10
        while len(stage.gate.batches) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)  # holds the loop
        assert [1, *[8] * 5] == [len(rows) for rows in stage.gate.batches]
        assert [] == stage.seen.batches
        await asyncio.gather(first, *full)
        assert [1, *[8] * 5] == stage.seen.batches

    run(scene)


def test_of_slow_batches_the_event_loop_hears_at_once() -> None:
    """However many batches of a large request are still to come, those that took long are known: others go by them."""

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


def test_whoever_would_wait_too_long_is_refused_at_once() -> None:
    """Once it is known how fast rows are answered, a request that would grow too old is not let in to begin with."""

    async def scene(stage: Stage) -> None:
        def slow(rows: Rows) -> Rows:
            time.sleep(0.04)  # 5 ms a row of a full batch
            return stage.gate(rows)

        stage.batcher.run = slow
        await asyncio.gather(*(stage.batcher.submit(rows_of(*range(8))) for _ in range(6)))
        first = await busy(stage)
        waiting = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(300)]
        await asyncio.sleep(0.01)
        refused = [task for task in waiting if task.done()]
        assert len(refused) >= 300 - 1.0 / 0.005
        assert all("inference queue is too long" in str(task.exception()) for task in refused)
        stage.batcher.check_capacity(20)  # large ones have a line of their own, and nobody is in it
        with pytest.raises(Overloaded, match=r"0 rows, 1\.1 s"):
            stage.batcher.check_capacity(20, other_delay=1.1)
        stage.gate.open.set()
        await asyncio.gather(first, *waiting, return_exceptions=True)

    run(scene, max_queue_rows=1000, max_queue_seconds=1.0)


def test_the_observer_hears_only_of_rows_that_count() -> None:
    """Rows that a caller brings along to compare with are answered and not counted."""

    async def scene(stage: Stage) -> None:
        found = await stage.batcher.submit(rows_of(*range(20)), counted=3)
        assert 20 == len(whole(found))
        assert 3 == stage.seen.rows_answered
        assert [8, 8, 4] == stage.seen.batches

    run(scene)


def test_who_comes_after_the_close_is_answered_still() -> None:
    """A request whose body was being read when the model was replaced is answered by the one that it began with."""

    async def scene(stage: Stage) -> None:
        for k in range(3):
            await stage.batcher.submit(rows_of(k))
            await stage.batcher.close()
        before = threading.active_count()
        found = await asyncio.wait_for(stage.batcher.submit(rows_of(7)), 10)
        np.testing.assert_array_equal([42], whole(found))
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert before >= threading.active_count()  # one that ended may have been counted before

    run(scene)


def test_beyond_its_bounds_the_queue_refuses() -> None:
    """Rows beyond the limit are refused at once, rows grown too old when their turn comes; both say when to retry."""

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


def test_a_request_larger_than_the_queue_is_served_when_nothing_waits() -> None:
    """What is allowed in one request is never refused for ever."""

    async def scene(stage: Stage) -> None:
        found = await stage.batcher.submit(rows_of(*range(500)))
        assert 500 == len(whole(found))

    run(scene)


def test_whoever_left_is_dropped_before_inference() -> None:
    """Rows of a caller that is gone, or gave up, never reach the model."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        left = asyncio.create_task(stage.batcher.submit(rows_of(5), lambda: True))
        gave_up = asyncio.create_task(stage.batcher.submit(rows_of(6)))
        stayed = asyncio.create_task(stage.batcher.submit(rows_of(7)))
        await asyncio.sleep(0.01)
        gave_up.cancel()
        stage.gate.open.set()
        await asyncio.gather(first, stayed)
        with pytest.raises(ClientDisconnected):
            await left
        np.testing.assert_array_equal(rows_of(1, 7), np.concatenate(stage.gate.batches))

    run(scene)


def test_a_failing_batch_fails_exactly_its_callers() -> None:
    """Callers of other batches, and of the next, are answered; a caller with a failed piece hears of the failure."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        poisoned = asyncio.create_task(stage.batcher.submit(rows_of(np.nan, *range(8))))
        beside = asyncio.create_task(stage.batcher.submit(rows_of(1)))
        await asyncio.sleep(0.01)
        stage.gate.open.set()
        for task in (poisoned, beside):
            with pytest.raises(ValueError, match="poisoned"):
                await task
        await first
        await stage.batcher.submit(rows_of(2))

    run(scene)


def test_close_returns_after_every_admitted_request() -> None:
    """When `close` returns, each request that was admitted before is answered."""

    async def scene(stage: Stage) -> None:
        first = await busy(stage)
        waiting = [asyncio.create_task(stage.batcher.submit(rows_of(k))) for k in range(30)]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.05, stage.gate.open.set)
        await stage.batcher.close()
        assert [True] * 31 == [task.done() for task in (first, *waiting)]
        await asyncio.gather(first, *waiting)

    run(scene)


def test_a_thread_whose_loop_ended_ends_in_silence() -> None:
    """What is still inferred when the event loop is gone is told to nobody, and raises nothing in its thread."""
    gate = Gate()
    gate.open.clear()

    async def scene() -> threading.Thread:
        batcher = Batcher[Rows](gate, Seen(), max_batch_rows=8, max_queue_rows=100, max_queue_seconds=60.0)
        asking = asyncio.create_task(batcher.submit(rows_of(*range(20))))
        assert await asyncio.to_thread(gate.entered.wait, 10)
        asking.cancel()
        assert batcher._thread is not None
        return batcher._thread

    thread = asyncio.run(scene())
    raised: list[object] = []
    before, threading.excepthook = threading.excepthook, raised.append
    gate.open.set()
    thread.join(0.5)  # it waits for more, which never comes
    threading.excepthook = before
    assert gate.batches
    assert not raised
