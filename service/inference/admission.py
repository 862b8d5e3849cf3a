"""Admission of requests before their bodies are read: load shedding by event-loop lag, and a bound on queued rows.

A request waits in its socket until the event loop reaches it, where no queue counts it. Under overload each turn of the
loop takes longer than the one before. Therefore the work for admitted requests has a share of each turn. The share is
halved after a turn that was too long, and grows by half after others. Once the share of a turn is used up, further
requests of that turn are refused, which costs less than to answer them. Independent of HTTP and of the model.
"""

import asyncio
import time
from collections import defaultdict, deque
from typing import Protocol

import msgspec

from service.errors import Overloaded

MAX_TURN_FRACTION = 1 / 8  # of the longest wait: one turn to read, one to respond, the rest for the queue
MAX_SHARE, MIN_SHARE = 1, 1 / 8  # in turns of exactly the longest accepted length
SHARE_GROWTH = 1.5
CHEAP_SECONDS = 0.0005  # a request that costs less is answered as fast as it is rejected
BYTE_SECONDS = 1e-9  # to read one byte of a body
RECENT_REQUESTS = 8  # of about the same length, whose rows are known


class RowQueue(Protocol):
    """The queue of rows that admitted requests will join."""

    def check_capacity(self, rows: int, other_delay: float = 0.0) -> None:
        """Raise `Overloaded` if `rows` more rows would not be answered in time; `other_delay` in seconds."""


class LoadShedder:
    """Load shedding by the lag of the running event loop.

    `turn_seconds` is the length of the last turn. `other_delay` is the time in seconds that a request waits outside of
    the queue, to be read and to be answered; it never exceeds half of the longest wait.
    """

    def __init__(self, max_wait_seconds: float) -> None:
        self.turn_seconds = self.other_delay = 0.0
        self._max_wait, self._max_turn = max_wait_seconds, MAX_TURN_FRACTION * max_wait_seconds
        self._share = MAX_SHARE * self._max_turn
        self._spent = 0.0  # seconds of this turn's share
        self._last_admitted: float | None = None  # None before the first request of a turn

    def admit(self, size: int = 0) -> None:
        """Admit a request with a body of `size` bytes.

        Raises:
            Overloaded: the share of this turn is used up.
        """
        now = time.perf_counter()
        if self._last_admitted is None:
            self._spent = 0.0
            asyncio.get_running_loop().call_soon(self._end_turn, now)
        elif self._spent <= self._share:
            self._spent += max(0.0, now - self._last_admitted - CHEAP_SECONDS)
        if self._spent > self._share:
            raise Overloaded(f"overloaded: event-loop lag {self.turn_seconds:.2f} s", self._max_wait)
        self._last_admitted = now
        self._spent += size * BYTE_SECONDS

    def _end_turn(self, started: float) -> None:
        self._last_admitted, self.turn_seconds = None, time.perf_counter() - started
        self.other_delay = min(3 * self.turn_seconds, self._max_wait / 2)
        share = self._share / 2 if self.turn_seconds > self._max_turn else self._share * SHARE_GROWTH
        self._share = min(MAX_SHARE * self._max_turn, max(MIN_SHARE * self._max_turn, share))


class RowCountEstimator:
    """Estimates the rows of a request from its Content-Length, from recent requests of that length within a factor 2.

    The estimate is the minimum of recent requests: overestimating would refuse a request that fits.
    """

    def __init__(self) -> None:
        self._bytes_per_row: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_REQUESTS))

    def estimate(self, size: int) -> int:
        """Return the rows of a request of `size` bytes, at least one."""
        recent = self._bytes_per_row.get(size.bit_length())
        return max(1, int(size / max(recent))) if recent else 1

    def record(self, size: int, rows: int) -> None:
        """Record that a request of `size` bytes had `rows` rows."""
        self._bytes_per_row[size.bit_length()].append(size / rows)


class Ticket(msgspec.Struct):
    """An admitted request, whose rows become known once its body is decoded."""

    _estimator: RowCountEstimator
    _size: int

    def rows(self, count: int) -> None:
        """Record the number of rows of the request; the next request of this length is estimated from it."""
        if self._size:
            self._estimator.record(self._size, count)


class Admission:
    """Admits requests to one queue of rows."""

    def __init__(self, queue: RowQueue, max_wait_seconds: float) -> None:
        self._queue, self._estimator = queue, RowCountEstimator()
        self.shedder = LoadShedder(max_wait_seconds)

    def admit(self, size: int) -> Ticket:
        """Admit a request with a body of `size` bytes before the body is read, so that a refusal costs little.

        Raises:
            Overloaded: the event loop lags, or the estimated rows would not be answered in time.
        """
        self.shedder.admit(size)
        self._queue.check_capacity(self._estimator.estimate(size), self.shedder.other_delay)
        return Ticket(self._estimator, size)
