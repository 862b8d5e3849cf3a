"""How long the event loop takes to come round, and how many callers it takes in each time. Knows no HTTP.

What a client sent waits in its socket until the loop comes round to it, which no queue sees. When the loop has more to
do than it can, each turn takes longer than the one before. So the work for callers that are taken in has a share of a
turn, which is halved after a turn that was too long and grows again after others; when the share is used up, whoever
comes in the same turn is refused, which costs less than to answer.
"""

import asyncio
import time

from service.errors import Overloaded

LONG = 1 / 8  # of the time that anybody may wait: a turn to be read, one to be told, the rest is the queue's
MOST, LEAST = 1, 1 / 8  # shares, in turns that are just not too long
GROWTH = 1.5
CHEAP_SECONDS = 0.0005  # a caller that costs no more is as soon answered as refused
BYTE_SECONDS = 1e-9  # to read one byte of a body


class Turns:
    """The turns of the running event loop."""

    def __init__(self, max_wait_seconds: float) -> None:
        self.seconds = 0.0  # that the last turn took
        self.crowded = False  # whether it refused anybody
        self._refused = False
        self._wait, self._long = max_wait_seconds, LONG * max_wait_seconds
        self._share = MOST * self._long
        self._spent = 0.0  # seconds of this turn's share
        self._last: float | None = None  # when the last caller was taken in; None before the first of a turn

    def check(self, size: int = 0) -> None:
        """Take a caller in, or not.

        Args:
            size: bytes that it will send.

        Raises:
            Overloaded: the share of this turn is used up.
        """
        now = time.perf_counter()
        if self._last is None:
            self._spent = 0.0
            asyncio.get_running_loop().call_soon(self._over, now)
        elif self._spent <= self._share:
            self._spent += max(0.0, now - self._last - CHEAP_SECONDS)
        if self._spent > self._share:
            self.refused()
            raise Overloaded(f"more comes than can be read: the last turn took {self.seconds:.2f} s", self._wait)
        self._last = now
        self._spent += size * BYTE_SECONDS

    def refused(self) -> None:
        """A caller of this turn was refused, here or elsewhere."""
        self._refused = True

    def besides(self) -> float:
        """Seconds beside the queue, at most half of what anybody may wait: to be read, to be told, to spare."""
        return min(3 * self.seconds, self._wait / 2)

    def _over(self, began: float) -> None:
        self._last, self.seconds = None, time.perf_counter() - began
        self.crowded, self._refused = self._refused, False
        share = self._share / 2 if self.seconds > self._long else self._share * GROWTH
        self._share = min(MOST * self._long, max(LEAST * self._long, share))
