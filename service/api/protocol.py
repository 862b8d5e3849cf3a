"""uvicorn's HTTP protocol with what it lacks: a time limit for headers to arrive, and a size limit for them."""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
HEADER_BYTES = 64 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """A connection that must say what it wants in time, and in few words."""

    seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: Any) -> None:
        """A client came; it has a time to ask."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._arm(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; if they are still headers, there must not be too many."""
        super().data_received(data)
        if self._late is None:
            return
        self._head += len(data)
        if self._head > HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._disarm()
        self._arm(TOO_LATE)

    def on_headers_complete(self) -> None:
        """The body has its own limits."""
        self._disarm()
        super().on_headers_complete()

    def _arm(self, answer: bytes) -> None:
        self._head = 0
        self._late = self.loop.call_later(self.seconds, self._too_late, answer)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
