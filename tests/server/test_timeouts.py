import asyncio
from collections.abc import Callable
from math import inf
from typing import Any, cast

from service.server.timeouts import ReadDeadline, SlowReaderWatch


class Timer:
    """A scheduled call that can be cancelled."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback, self.cancelled = when, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """The part of an event loop that timeouts use; its time moves only in `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, callback))
        return self.timers[-1]

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay, callback)

    def pending(self) -> list[float]:
        """Return the seconds until each timer that is not cancelled."""
        return sorted(timer.when - self.now for timer in self.timers if not timer.cancelled)

    def advance(self, seconds: float) -> None:
        """Move the time and run the timers that are due, in order."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if not timer.cancelled and timer.when <= end]:
            timer = min(due, key=lambda candidate: candidate.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
        self.now = end


class Transport:
    """A transport with bytes that the client has not read."""

    def __init__(self) -> None:
        self.unread, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def abort(self) -> None:
        self.aborted = True


def deadline(seconds: float) -> tuple[Clock, ReadDeadline, list[float]]:
    """Return a clock, a deadline and the times at which it expires."""
    clock, expired = Clock(), list[float]()
    start = clock.now
    loop = cast(asyncio.AbstractEventLoop, clock)
    return clock, ReadDeadline(loop, lambda: expired.append(clock.now - start), seconds), expired


def watch(seconds: float) -> tuple[Clock, Transport, SlowReaderWatch]:
    """Return a clock, a transport and the watch of its client."""
    clock, transport = Clock(), Transport()
    return clock, transport, SlowReaderWatch(cast(Any, clock), cast(Any, transport), seconds)


def test_deadline_expires_once_when_it_is_due() -> None:
    """A deadline that is not moved expires once, at its time, and leaves no timer."""
    clock, moved, expired = deadline(5)
    clock.advance(4.9)
    assert [] == expired
    clock.advance(100)
    assert ([5], inf, []) == (expired, moved.due, clock.pending())


def test_deadline_moved_later_keeps_its_timer() -> None:
    """A deadline that is moved later keeps its timer, which is set again when it fires."""
    clock, moved, expired = deadline(5)
    for _ in range(10):
        clock.advance(0.5)
        moved.set(5)
        assert 1 == len(clock.timers)
    assert clock.now + 5 == moved.due
    clock.advance(4.75)
    assert ([], [0.25]) == (expired, clock.pending())
    clock.advance(0.25)
    assert [10] == expired


def test_deadline_moved_earlier_expires_earlier() -> None:
    """A deadline that is moved earlier cancels its timer and starts another."""
    clock, moved, expired = deadline(60)
    moved.set(2)
    assert [2] == clock.pending()
    clock.advance(1)
    moved.set(0.5)
    assert [0.5] == clock.pending()
    clock.advance(100)
    assert [1.5] == expired


def test_deadline_moved_to_the_same_time_keeps_its_timer() -> None:
    """A deadline that is set to the same time starts no timer."""
    clock, moved, _ = deadline(5)
    moved.set(5)
    assert 1 == len(clock.timers)


def test_deadline_can_be_set_again_after_it_expired() -> None:
    """An expired deadline can be set again, and expires again."""
    clock, moved, expired = deadline(5)
    clock.advance(5)
    moved.set(3)
    assert [3] == clock.pending()
    clock.advance(3)
    assert [5, 8] == expired


def test_deadline_without_due_time_starts_no_timer() -> None:
    """A timer that fires without a deadline expires nothing and starts no other timer."""
    clock, moved, expired = deadline(5)
    moved.due = inf
    clock.advance(100)
    assert ([], []) == (expired, clock.timers)
    moved.set(1)
    assert [1] == clock.pending()


def test_stopped_deadline_never_expires() -> None:
    """A stopped deadline has no timer, and may be stopped twice."""
    clock, moved, expired = deadline(5)
    for _ in range(2):
        moved.stop()
        assert ([], inf) == (clock.pending(), moved.due)
    clock.advance(100)
    assert [] == expired


def test_slow_reader_is_disconnected_after_one_period() -> None:
    """A client that reads less than half of its pending bytes within a period is disconnected."""
    clock, transport, slow = watch(5)
    transport.unread = 100
    slow.start()
    transport.unread = 51
    clock.advance(4.75)
    assert (False, [0.25]) == (transport.aborted, clock.pending())
    clock.advance(0.25)
    assert (True, []) == (transport.aborted, clock.pending())


def test_reader_of_half_gets_another_period_for_the_rest() -> None:
    """A client that reads exactly half gets another period for half of the rest."""
    clock, transport, slow = watch(5)
    transport.unread = 100
    slow.start()
    for unread in (50, 25, 12):
        transport.unread = unread
        clock.advance(5)
        assert (False, [5]) == (transport.aborted, clock.pending())
    transport.unread = 7
    clock.advance(5)
    assert transport.aborted


def test_reader_of_everything_is_not_watched() -> None:
    """Without pending bytes there is no timer, and the next response starts one again."""
    clock, transport, slow = watch(5)
    slow.start()
    assert [] == clock.pending()
    transport.unread = 1
    slow.start()
    transport.unread = 0
    clock.advance(5)
    assert (False, []) == (transport.aborted, clock.pending())
    transport.unread = 100
    slow.start()
    clock.advance(5)
    assert (True, []) == (transport.aborted, clock.pending())


def test_watch_started_twice_keeps_its_first_timer() -> None:
    """A second start within a period changes neither its end nor the bytes that must be read."""
    clock, transport, slow = watch(5)
    transport.unread = 100
    slow.start()
    clock.advance(1)
    transport.unread = 1000
    slow.start()
    assert [4] == clock.pending()
    transport.unread = 60
    clock.advance(4)
    assert transport.aborted


def test_stopped_watch_disconnects_no_client() -> None:
    """A stopped watch has no timer, may be stopped twice, and can be started again."""
    clock, transport, slow = watch(5)
    transport.unread = 100
    slow.start()
    for _ in range(2):
        slow.stop()
        assert [] == clock.pending()
    clock.advance(100)
    slow.start()
    assert (False, [5]) == (transport.aborted, clock.pending())
