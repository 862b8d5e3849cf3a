"""The memory that the bodies of requests hold: counted together and bounded, and one large place kept for the next.

Bodies that are being read, parsed or answered stay in memory, and there may be many. A large one lies in a mapping of
its own, of which the system clears every page before it is filled; so the last one is used again.
"""

import mmap
import threading
from contextlib import suppress

from service.errors import Overloaded

KEPT = 1 << 24  # bytes of a place that stays for the next large body
RETRY_SECONDS = 1.0


class Buffer:
    """The bytes that all bodies of a process hold in memory together, and the place that waits for one."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.lock = most, 0, threading.Lock()
        self.spare: mmap.mmap | None = None


class Held:
    """The bytes that one request holds of the buffer, from when they came until it is answered."""

    __slots__ = ("_buffer", "_place", "bytes")

    def __init__(self, buffer: Buffer) -> None:
        self._buffer, self.bytes = buffer, 0
        self._place: mmap.mmap | None = None

    def check(self, more: int) -> None:
        """Whether there is room for more. What one request may hold is never refused while no other holds anything.

        Raises:
            Overloaded: there is none.
        """
        held = self._buffer.bytes
        if held + more > self._buffer.most and held > self.bytes:
            raise Overloaded(f"{held} bytes of bodies are held, at most {self._buffer.most} may", RETRY_SECONDS)

    def take(self, more: int) -> None:
        """Hold more; also from other threads.

        Raises:
            Overloaded: no room for it.
        """
        self.check(more)
        with self._buffer.lock:
            self._buffer.bytes += more
            self.bytes += more

    def place(self, length: int) -> mmap.mmap:
        """Memory for a body of this length, which counts as it is filled; another's once this one is answered."""
        spare, self._buffer.spare = self._buffer.spare, None
        if spare is None or not _resized(spare, length):
            spare = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if not self._buffer.bytes and hasattr(mmap, "MADV_HUGEPAGE"):  # of many, each would take 2 MiB at once
                spare.madvise(mmap.MADV_HUGEPAGE)
        self._place = spare
        return spare

    def release(self) -> None:
        """Hold nothing."""
        with self._buffer.lock:
            self._buffer.bytes -= self.bytes
            self.bytes = 0
        place, self._place = self._place, None
        if place is None:
            return
        if len(place) <= KEPT:
            place, self._buffer.spare = self._buffer.spare, place
        if place is not None:
            with suppress(BufferError):  # whoever looks at it still has the last of it
                place.close()  # an error that was raised may hold it until a collection


def _resized(place: mmap.mmap, length: int) -> bool:
    """Make it so long, unless somebody still looks at it: who was not waited for, an inference say; or it cannot be."""
    try:
        place.resize(length)
    except (BufferError, OSError, SystemError, ValueError):
        return False
    return True
