"""uvicorn's HTTP protocol with what it lacks: time limits for what a client sends, and a size limit for its headers."""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.body import GONE

TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
HEADER_BYTES = 64 * 1024


class BoundedProtocol(HttpToolsProtocol):
    """A connection that must say what it wants in time, and in few words.

    The rest of a body that was answered early, refused say, is read and thrown away, so that the client hears why and
    may ask again; that too has an end.
    """

    seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: Any) -> None:
        """A client came; it has a time to ask."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._head: int | None = None  # bytes of headers that have come; None between requests and within bodies
        self._arm(b"", self.seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left; whoever works for it may stop."""
        self._disarm()
        if self.cycle is not None:
            self.cycle.scope[GONE] = True  # type: ignore[literal-required]  # ours beside what ASGI names
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; if they are still headers, there must not be too many."""
        super().data_received(data)
        if self._head is None:
            return
        self._head += len(data)
        if self._head > HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._arm(TOO_LATE, self.seconds)
        self._head = 0

    def on_headers_complete(self) -> None:
        """The body has its own limits."""
        self._disarm()
        self._head = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """An answer is out; the rest of its request, if any, and the next one's first byte have a time to come."""
        super().on_response_complete()
        if self.cycle.response_complete and self._head is None and not self.transport.is_closing():
            self._arm(b"", self.seconds if self.cycle.more_body else self.timeout_keep_alive)

    def _arm(self, answer: bytes, seconds: float) -> None:
        self._disarm()
        self._late = self.loop.call_later(seconds, self._too_late, answer)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
