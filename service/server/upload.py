"""A large body on its way, which the system writes straight to where it stays: no parser sees it, nobody copies it.

While it comes, this is the protocol of its connection. Knows no HTTP but that the length was announced.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from service.errors import ClientGone, ServiceError

STEP = 1 << 20  # bytes for which room is taken at most at a time, before they come
LEAST = 1 << 16  # and at least; between, as much as came already: who only announces holds no room of others
_SCRAP = memoryview(bytearray(LEAST))  # where bytes go that nobody reads


class Outer(Protocol):
    """The protocol whose connection it is."""

    def taken_in(self) -> None:
        """The last byte of the body is there; what follows is its own again."""

    def breathe(self) -> None:
        """Read no more of this connection before the event loop has come round."""

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio's."""

    def eof_received(self) -> bool | None:
        """As asyncio's."""

    def pause_writing(self) -> None:
        """As asyncio's."""

    def resume_writing(self) -> None:
        """As asyncio's."""


class Intake(asyncio.BufferedProtocol):
    """A body whose first bytes are there; `whole` is done when all are, or tells why they will never be."""

    def __init__(self, outer: Outer, first: bytes | bytearray, place: memoryview, take: Callable[[int], None]) -> None:
        """Begin.

        Args:
            outer: whose connection it is.
            first: what came with the headers.
            place: for the whole body, and as long.
            take: asked for room, so many bytes of it at a time; it may refuse.

        Raises:
            Overloaded: it refuses room for the first bytes.
        """
        take(len(first))
        place[: len(first)] = first
        self.whole: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()
        self._outer, self._take, self._view = outer, take, place
        self._at = self._taken = len(first)
        self._length, self._dropped = len(place), False
        if self._at == self._length:
            self._end(None)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # as asyncio has it
        """Where the next bytes go, once there is room for them; none is there for a byte that is not of this body."""
        if self._taken == self._at and not self._dropped:
            try:
                self._take(more := min(STEP, max(LEAST, self._at), self._length - self._at))
                self._taken += more
            except ServiceError as refusal:
                self._end(refusal)
                self.drop()
        return self._view[: self._length - self._at] if self._dropped else self._view[self._at : self._taken]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes came."""
        self._at += nbytes
        if self._at == self._length:
            self._end(None)
            self._outer.taken_in()
        elif self._at == self._taken:  # more is there perhaps: libuv would read on, up to 32 times
            self._outer.breathe()

    def drop(self) -> None:
        """The place is wanted back: whatever is still to come is read and thrown away."""
        self._dropped, self._view = True, _SCRAP

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._end(ClientGone("the client left before its body was whole"))
        self._outer.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._outer.eof_received()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        self._outer.pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._outer.resume_writing()

    def _end(self, error: ServiceError | None) -> None:
        if not self.whole.done():
            self.whole.set_result(error)
