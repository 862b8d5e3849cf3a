"""Receive a large body directly into its buffer: no parser reads it and nothing copies it.

During the upload a `BodyUpload` is the protocol of the connection. It needs the length from the headers, no other HTTP.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from service.errors import ClientDisconnected, ServiceError

MAX_STEP = 1 << 20  # bytes charged at most before they arrive
MIN_STEP = 1 << 16  # bytes charged at least; between, as many as have arrived: an announced length charges nothing
_DISCARDED = memoryview(bytearray(MIN_STEP))  # receives bytes that are not read


class ParentProtocol(Protocol):
    """The protocol that the connection has before and after the upload."""

    def upload_complete(self) -> None:
        """Take the connection back: the last byte of the body has arrived."""

    def yield_to_loop(self) -> None:
        """Pause reading for one turn of the event loop."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the event as an asyncio.Protocol does."""

    def eof_received(self) -> bool | None:
        """Handle the event as an asyncio.Protocol does."""

    def pause_writing(self) -> None:
        """Handle the event as an asyncio.Protocol does."""

    def resume_writing(self) -> None:
        """Handle the event as an asyncio.Protocol does."""


class BodyUpload(asyncio.BufferedProtocol):
    """The protocol of a connection during an upload. `complete` is the future of the error, None for success."""

    def __init__(
        self, parent: ParentProtocol, first: bytes | bytearray, buffer: memoryview, charge: Callable[[int], None]
    ) -> None:
        """Start with the bytes that have already arrived.

        Args:
            parent: the protocol of the connection.
            first: the bytes that arrived with the headers.
            buffer: memory for the whole body; its length is that of the body.
            charge: charges bytes to the budget before they arrive; may raise Overloaded.

        Raises:
            Overloaded: the budget has no memory for the first bytes.
        """
        charge(len(first))
        buffer[: len(first)] = first
        self.complete: asyncio.Future[ServiceError | None] = asyncio.get_running_loop().create_future()
        self._parent, self._charge, self._view = parent, charge, buffer
        self._received = self._charged = len(first)
        self._length, self._discarding = len(buffer), False
        if self._received == self._length:
            self._finish(None)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # part of asyncio.BufferedProtocol
        """Return memory for the next bytes, charged before. It never reaches beyond this body."""
        if self._charged == self._received and not self._discarding:
            try:
                step = min(MAX_STEP, max(MIN_STEP, self._received), self._length - self._received)
                self._charge(step)
                self._charged += step
            except ServiceError as refusal:
                self._finish(refusal)
                self.discard_rest()
        if self._discarding:
            return self._view[: self._length - self._received]
        return self._view[self._received : self._charged]

    def buffer_updated(self, nbytes: int) -> None:
        """Count bytes that have arrived."""
        self._received += nbytes
        if self._received == self._length:
            self._finish(None)
            self._parent.upload_complete()
        elif self._received == self._charged:  # more may be waiting: libuv would read up to 32 times in a row
            self._parent.yield_to_loop()

    def discard_rest(self) -> None:
        """Stop writing to the buffer; the rest of the body is read and discarded."""
        self._discarding, self._view = True, _DISCARDED

    def connection_lost(self, exc: Exception | None) -> None:
        """Finish with an error: the client disconnected."""
        self._finish(ClientDisconnected("the client disconnected before its body was complete"))
        self._parent.connection_lost(exc)

    def eof_received(self) -> bool | None:
        """Pass the event on: the client sends no more."""
        return self._parent.eof_received()

    def pause_writing(self) -> None:
        """Pass the event on: the client does not read fast enough."""
        self._parent.pause_writing()

    def resume_writing(self) -> None:
        """Pass the event on: the client has caught up."""
        self._parent.resume_writing()

    def _finish(self, error: ServiceError | None) -> None:
        if not self.complete.done():
            self.complete.set_result(error)
