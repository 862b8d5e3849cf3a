import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.errors import Overloaded
from service.inference.admission import MIN_SHARE, RECENT_REQUESTS, Admission, LoadShedder, RowCountEstimator
from tests.support.clock import Clock

TURN_SECONDS = 0.1  # a turn may take an eighth of the longest wait


def play(scene: Callable[[LoadShedder], Coroutine[Any, Any, None]]) -> None:
    """Run a scene in an event loop with a new load shedder."""

    async def run() -> None:
        await scene(LoadShedder(8 * TURN_SECONDS))

    asyncio.run(run())


async def admit_in_turn(shedder: LoadShedder, requests: int, seconds: float) -> int:
    """Send requests that take `seconds` each in one loop turn. Return the number of admitted ones."""
    admitted = 0
    for _ in range(requests):
        try:
            shedder.admit()
        except Overloaded:
            continue
        admitted += 1
        time.sleep(seconds)  # blocks the event loop as processing a request does
    await asyncio.sleep(0)
    return admitted


def test_shedder_after_long_turns_admits_fewer_but_some() -> None:
    """After long turns fewer requests are admitted, but at least one; short turns restore the number."""

    async def scene(shedder: LoadShedder) -> None:
        first = await admit_in_turn(shedder, 100, TURN_SECONDS / 2)
        assert 1 < first < 10
        for _ in range(6):
            least = await admit_in_turn(shedder, 100, TURN_SECONDS / 2)
            time.sleep(TURN_SECONDS)  # blocks the event loop
        assert 1 <= least < first
        assert 0 < shedder.other_delay <= 4 * TURN_SECONDS
        for _ in range(8):
            assert 1 == await admit_in_turn(shedder, 1, 0)
        assert least <= await admit_in_turn(shedder, 100, TURN_SECONDS / 2)

    play(scene)
    assert 0 < MIN_SHARE < 1


def test_shedder_admits_all_cheap_requests() -> None:
    """A thousand cheap requests per turn are all admitted, since a rejection would cost as much."""

    async def scene(shedder: LoadShedder) -> None:
        for _ in range(5):
            assert 1000 == await admit_in_turn(shedder, 1000, 0)

    play(scene)


def test_shedder_after_idle_time_admits_the_first_request() -> None:
    """The first request after an idle time is admitted, however long the last turn was."""

    async def scene(shedder: LoadShedder) -> None:
        assert 1 == await admit_in_turn(shedder, 1, 5 * TURN_SECONDS)
        await asyncio.sleep(0)
        assert 1 == await admit_in_turn(shedder, 1, 0)

    play(scene)


def test_shedder_counts_the_bytes_that_a_turn_will_read() -> None:
    """A large body uses up the share of its turn before it is read."""

    async def scene(shedder: LoadShedder) -> None:
        shedder.admit(2**30)
        with pytest.raises(Overloaded, match="event-loop lag"):
            shedder.admit()

    play(scene)


SECOND = 10**9  # bytes read in 1 s


async def share(shedder: LoadShedder, clock: Clock, seconds: float) -> float:
    """Return the share of a turn in seconds, in steps of 0.01 s, and let the turn take `seconds`."""
    admitted = 0
    while True:
        try:
            shedder.admit(SECOND // 100)
        except Overloaded:
            break
        admitted += 1
    clock.now += seconds
    await asyncio.sleep(0)
    return admitted / 100


def test_share_halves_after_long_turns_and_grows_again(clock: Clock) -> None:
    """Longer turns halve the share down to an eighth; shorter turns increase it by half up to a whole turn."""

    async def scene() -> None:
        shedder = LoadShedder(16.0)  # a turn may take 2 s
        expected = [2, 1, 0.5, 0.25, 0.25]
        shares = [await share(shedder, clock, 2.5) for _ in expected]
        assert expected == pytest.approx(shares, abs=0.015)
        assert (2.5, 7.5) == (shedder.turn_seconds, shedder.other_delay)
        expected = [0.25, 0.375, 0.5625, 0.84375, 1.265625, 1.8984375, 2, 2]
        shares = [await share(shedder, clock, 2.0) for _ in expected]
        assert expected == pytest.approx(shares, abs=0.015)
        assert (2, 6) == (shedder.turn_seconds, shedder.other_delay)
        await share(shedder, clock, 3.0)
        assert (3, 8) == (shedder.turn_seconds, shedder.other_delay)

    asyncio.run(scene())


def test_share_used_up_exactly_admits_until_time_passes(clock: Clock) -> None:
    """Requests are rejected once bytes and elapsed time together exceed the share."""

    async def scene() -> None:
        shedder = LoadShedder(16.0)
        shedder.admit(2 * SECOND)
        for _ in range(3):
            shedder.admit()
        clock.now += 0.5
        for _ in range(3):
            with pytest.raises(Overloaded, match=r"event-loop lag 0\.00 s") as refusal:
                shedder.admit()
            assert 16 == refusal.value.retry_after

    asyncio.run(scene())


@pytest.mark.parametrize("max_wait", [0.02, 0.1])
def test_other_delay_never_exceeds_half_of_the_longest_wait(max_wait: float) -> None:
    """The delay outside of the queue is three turns, but at most half of the longest wait."""

    async def scene() -> None:
        shedder = LoadShedder(max_wait)
        assert 0 == shedder.other_delay
        await admit_in_turn(shedder, 1, max_wait)
        assert max_wait / 2 == shedder.other_delay

    asyncio.run(scene())


def test_estimate_without_similar_requests_is_one_row() -> None:
    """Without a recorded request of similar length, the estimate is one row."""
    estimator = RowCountEstimator()
    estimator.record(1000, 64)
    assert 1 == estimator.estimate(0)
    assert 1 == estimator.estimate(17_000_000)


def test_estimate_depends_on_requests_of_that_length_only() -> None:
    """The estimate depends only on requests of a similar length."""
    estimator = RowCountEstimator()
    estimator.record(17_000_000, 1000)
    for _ in range(100):
        estimator.record(300, 1)
        assert 1000 == estimator.estimate(17_000_000)
        assert 1 == estimator.estimate(300)


def test_estimate_uses_minimum_of_recent_requests() -> None:
    """The estimate is the smallest number of rows among the recent requests of a similar length."""
    estimator = RowCountEstimator()
    estimator.record(16_000, 1)
    for _ in range(RECENT_REQUESTS - 1):
        estimator.record(16_000, 64)
        assert 1 == estimator.estimate(16_000)
    estimator.record(16_000, 64)
    assert 64 == estimator.estimate(16_000)


class Queue:
    """A queue with capacity for some rows."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.other_delays: list[float] = []

    def check_capacity(self, rows: int, other_delay: float = 0.0) -> None:
        """Reject more rows than the capacity."""
        self.other_delays.append(other_delay)
        if rows > self.room:
            raise Overloaded("full", 1.0)


def test_admission_rejects_estimated_rows_beyond_capacity() -> None:
    """A request whose estimated rows exceed the capacity of the queue is rejected before its body is read."""

    async def scene() -> None:
        admission = Admission(Queue(room=10), 2.0)
        admission.admit(4000).rows(11)
        with pytest.raises(Overloaded, match="full"):
            admission.admit(4000)
        admission.admit(40).rows(1)

    asyncio.run(scene())


def test_admission_passes_other_delay_to_the_queue() -> None:
    """The check of the queue receives the expected delay of reading the request and writing its response."""

    async def scene() -> None:
        queue = Queue(room=1)
        admission = Admission(queue, 2.0)
        for other_delay in (0.0, 0.75):
            admission.shedder.other_delay = other_delay
            admission.admit(10)
        assert [0.0, 0.75] == queue.other_delays

    asyncio.run(scene())


def test_ticket_without_content_length_records_nothing() -> None:
    """A request of unknown length does not change the estimate of others."""

    async def scene() -> None:
        admission = Admission(Queue(room=1), 2.0)
        admission.admit(0).rows(1000)
        admission.admit(0)

    asyncio.run(scene())
