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


class Mapping:
    """Anonymous memory of the operating system, and the only view of it that is given away.

    The view is released before the memory is resized or closed: a reader that was not waited for gets an error, never
    the bytes of another request.
    """

    __slots__ = ("_memory", "view")

    def __init__(self, length: int, huge_pages: bool) -> None:
        self._memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)

    def __len__(self) -> int:
        return len(self._memory)

    def release(self) -> None:
        """Invalidate the view, unless an array or a parser still uses it."""
        with suppress(BufferError):
            self.view.release()

    def resized(self, length: int) -> bool:
        """Change the length and renew the view; False if it is still in use, or the system refuses."""
        try:
            self.view.release()
            self._memory.resize(length)
        except (BufferError, OSError, SystemError, ValueError):
            return False
        self.view = memoryview(self._memory)
        return True

    def close(self) -> None:
        """Return the memory; memory that is still in use is returned with its last user."""
        with suppress(BufferError):
            self.view.release()
            self._memory.close()


class Buffer:
    """The bytes that all bodies of a process hold in memory together, and the place that waits for one."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes, self.lock = most, 0, threading.Lock()
        self.spare: Mapping | None = None


class Held:
    """The bytes that one request holds of the buffer, from when they came until it is answered."""

    __slots__ = ("_buffer", "_mapping", "bytes")

    def __init__(self, buffer: Buffer) -> None:
        self._buffer, self.bytes = buffer, 0
        self._mapping: Mapping | None = None

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
        buffer = self._buffer
        if buffer.bytes + more > buffer.most:
            self.check(more)
        with buffer.lock:
            buffer.bytes += more
            self.bytes += more

    def place(self, length: int) -> memoryview:
        """Return memory for a body of `length` bytes, valid until `release`. Bytes are charged as they arrive."""
        mapping, self._buffer.spare = self._buffer.spare, None
        if mapping is None or not mapping.resized(length):
            mapping = Mapping(length, not self._buffer.bytes)  # of many bodies, each would take 2 MiB immediately
        self._mapping = mapping
        return mapping.view

    def release(self) -> None:
        """Hold nothing."""
        with self._buffer.lock:
            self._buffer.bytes -= self.bytes
            self.bytes = 0
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        if len(mapping) <= KEPT:
            mapping.release()
            mapping, self._buffer.spare = self._buffer.spare, mapping
        if mapping is not None:
            mapping.close()
