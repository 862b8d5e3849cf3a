"""Time limits of a connection: for what the client sends, and for how fast it reads. Independent of HTTP."""

import asyncio
from collections.abc import Callable
from math import inf


class ReadDeadline:
    """A time by which the client must have sent something. Moving it rarely needs a new timer.

    Attributes:
        due: the time of the event loop at which it expires; `inf` while there is no deadline.
    """

    __slots__ = ("_expired", "_loop", "_timer", "_timer_at", "due")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None], seconds: float) -> None:
        """Set the first deadline; `expired` is called when a deadline is reached."""
        self._loop, self._expired = loop, expired
        self.due = self._timer_at = loop.time() + seconds
        self._timer: asyncio.TimerHandle | None = loop.call_at(self.due, self._check)

    def set(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now."""
        self.due = self._loop.time() + seconds
        if self.due < self._timer_at:
            self._start_timer()

    def stop(self) -> None:
        """Remove the deadline and its timer for ever."""
        self.due = self._timer_at = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self.due
        self._timer = self._loop.call_at(self._timer_at, self._check)

    def _check(self) -> None:
        self._timer, self._timer_at = None, inf
        if self.due <= self._loop.time():
            self.due = inf
            self._expired()
        elif self.due < inf:
            self._start_timer()


class SlowReaderWatch:
    """Disconnects a client that reads less than half of its pending response in each period of `seconds`."""

    __slots__ = ("_loop", "_pending", "_seconds", "_timer", "_transport")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, seconds: float) -> None:
        self._loop, self._transport, self._seconds = loop, transport, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._pending = 0

    def start(self) -> None:
        """Start if anything is pending."""
        if self._timer is None and (pending := self._transport.get_write_buffer_size()):
            self._pending = pending
            self._timer = self._loop.call_later(self._seconds, self._check)

    def stop(self) -> None:
        """Stop: the client has read enough, or has disconnected."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size() > self._pending / 2:
            self._transport.abort()
        else:
            self.start()
