"""Limits of time for a connection: for what it is to send, and for what it is to read. Knows no HTTP."""

import asyncio
from collections.abc import Callable
from math import inf


class Deadline:
    """A moment by which something must have happened; moved with every request, it rarely needs a new timer."""

    __slots__ = ("_due", "_loop", "_passed", "_rings", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, passed: Callable[[], None]) -> None:
        self._loop, self._passed = loop, passed
        self._due = self._rings = inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """From now on it is so many seconds away."""
        self._due = self._loop.time() + seconds
        if self._due < self._rings:
            self._ring()

    def clear(self) -> None:
        """There is none; a timer that rings finds nothing to do."""
        self._due = inf

    def stop(self) -> None:
        """There will be none."""
        self._due = self._rings = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings = self._due
        self._timer = self._loop.call_at(self._rings, self._rang)

    def _rang(self) -> None:
        self._timer, self._rings = None, inf
        if self._due <= self._loop.time():
            self._due = inf
            self._passed()
        elif self._due < inf:
            self._ring()


class Reader:
    """Whether a client reads what waits for it: half of it in every so many seconds, or it is cut off."""

    __slots__ = ("_left", "_loop", "_seconds", "_timer", "_transport")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, seconds: float) -> None:
        self._loop, self._transport, self._seconds = loop, transport, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._left = 0

    def watch(self) -> None:
        """Begin, if anything waits."""
        if self._timer is None and (left := self._transport.get_write_buffer_size()):
            self._left = left
            self._timer = self._loop.call_later(self._seconds, self._look)

    def stop(self) -> None:
        """It has read enough, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size() > self._left / 2:
            self._transport.abort()
        else:
            self.watch()
