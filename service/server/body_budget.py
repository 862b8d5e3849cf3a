"""A budget for the memory of all request bodies, and one large buffer that is reused.

Bodies that are being read, parsed or processed stay in memory, and there may be many. A large body has its own memory
mapping, whose pages the operating system clears before use. The last mapping is therefore reused.
"""

import mmap
import threading
from contextlib import suppress

from msgspec import Struct

from service.errors import Overloaded

MAX_SPARE_BYTES = 1 << 24  # of a mapping that is retained for the next large body
RETRY_SECONDS = 1.0


class Mapping:
    """Anonymous memory of the operating system, and the only view of it that callers receive.

    The view is released before the memory is resized or closed. Code that still reads it then gets an error, never the
    bytes of another request.
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

    def resize(self, length: int) -> bool:
        """Change the length and renew the view; False if the view is in use, or the system has no memory."""
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


class BodyBudget:
    """The bytes that all bodies of a process hold in memory together, and the mapping retained for reuse."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.lock = limit, 0, threading.Lock()
        self.spare: Mapping | None = None


class BodyReservation(Struct, eq=False):  # constructed in C
    """The bytes that one request holds of the budget, from their arrival until its response.

    Attributes:
        budget: the budget of the process.
        bytes: the bytes that are held.
        mapping: the buffer of a large body.
    """

    budget: BodyBudget
    bytes: int = 0
    mapping: Mapping | None = None

    def check(self, length: int) -> None:
        """Check that the budget has memory for more bytes. It always has while no other request holds any.

        Raises:
            Overloaded: it has not.
        """
        held = self.budget.bytes
        if held + length > self.budget.limit and held > self.bytes:
            raise Overloaded(
                f"{held} bytes of request bodies are in memory, the limit is {self.budget.limit}", RETRY_SECONDS
            )

    def take(self, length: int) -> None:
        """Hold more bytes. Any thread may call it.

        Raises:
            Overloaded: the budget has no memory for them.
        """
        budget = self.budget
        if budget.bytes + length > budget.limit:
            self.check(length)
        with budget.lock:
            budget.bytes += length
            self.bytes += length

    def allocate(self, length: int) -> memoryview:
        """Return memory for a body of `length` bytes, valid until `release`. Bytes are charged as they arrive."""
        mapping, self.budget.spare = self.budget.spare, None
        if mapping is None or not mapping.resize(length):
            mapping = Mapping(length, not self.budget.bytes)  # of many bodies, each would take 2 MiB immediately
        self.mapping = mapping
        return mapping.view

    def release(self) -> None:
        """Return all bytes to the budget."""
        with self.budget.lock:
            self.budget.bytes -= self.bytes
            self.bytes = 0
        mapping, self.mapping = self.mapping, None
        if mapping is None:
            return
        if len(mapping) <= MAX_SPARE_BYTES:
            mapping.release()
            mapping, self.budget.spare = self.budget.spare, mapping
        if mapping is not None:
            mapping.close()
