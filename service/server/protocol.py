"""uvicorn's HTTP protocol with what it lacks: limits for what a client sends, and for how slowly it sends and reads.

Knows no routes; the application says what a refusal looks like.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.direct import Exchange
from service.server.limits import HEADER_BYTES
from service.server.scope import CONTEXT, RequestContext, context_of, hooks_of
from service.server.timeouts import Deadline, Reader


class _Nowhere(list[tuple[bytes, bytes]]):
    """Where trailers go: nobody reads them."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        """Forget it."""


class Joining:
    """Where one answer is written: its head waits for its body, so that both leave in one call of the system."""

    __slots__ = ("_head", "_loop", "_sent", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._head, self._sent = b"", False

    def write(self, data: bytes) -> None:
        """The first piece waits for the second, but no longer than the event loop takes to come round."""
        if self._sent:
            self._transport.write(self._head + data if self._head else data)
            self._head = b""
        else:
            self._head, self._sent = data, True
            self._loop.call_soon(self._flush)

    def writelines(self, data: Iterable[bytes]) -> None:
        """A whole answer, at once, behind whatever waits: a `100 Continue`."""
        self._transport.write(b"".join((self._head, *data)))
        self._head, self._sent = b"", True

    def close(self) -> None:
        """Nothing more comes."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """As a transport's."""
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class BoundedProtocol(HttpToolsProtocol):
    """A connection that must say what it wants in time and in few words, and must hear the answer.

    The rest of a body that was answered early, refused say, is read and thrown away, so that the client hears why and
    may ask again; that too has an end. Offers of other protocols (`Upgrade: h2c`, websockets) are not taken up.
    """

    seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: Any) -> None:
        """A client came; it has a time to ask."""
        super().connection_made(transport)
        self._words = 0  # bytes that came since the last that were of a body: headers, trailers, empty lines
        self._asking = False  # between a request's first byte and the end of its headers
        self._deaf = False  # once refused; what comes then is not read
        self._deadline = Deadline(self.loop, self._too_late)
        self._reader = Reader(self.loop, transport, self.seconds)
        self._deadline.set(self.seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left; whoever works for it may stop."""
        self._deadline.stop()
        self._reader.stop()
        if self.cycle is not None:
            context_of(self.cycle.scope).disconnected = True
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.body = bytearray()  # read by nobody now, and the cycle would keep it until a collection

    def data_received(self, data: bytes) -> None:
        """Bytes came; of those that are of no body there must not be too many."""
        if self._deaf:
            return
        self._words += len(data)  # whatever of a body is among them makes it 0 again
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                data = self._declined(data[offer.args[0] :])
            except httptools.HttpParserError:
                self._refuse(400, "this is no HTTP request")
                break
        if self._words > HEADER_BYTES:
            self._refuse(431, f"more than {HEADER_BYTES} bytes of headers")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._asking = True
        self._deadline.set(self.seconds)

    def on_headers_complete(self) -> None:
        """The body has its own limits."""
        if self._words > HEADER_BYTES and self._head_bytes() > HEADER_BYTES:
            self._refuse(431, f"more than {HEADER_BYTES} bytes of headers")
            raise ValueError("refused")  # so that the parser stops
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return  # the parser would skip the body, and what comes next
        self._deadline.clear()
        self._asking, self._words = False, 0
        super().on_headers_complete()
        self.cycle.scope[CONTEXT] = RequestContext(Exchange(self, self.cycle))  # type: ignore[literal-required]  # ours
        self.cycle.transport = Joining(self.transport, self.loop)  # type: ignore[assignment]  # all that it uses of one
        self.headers = _NOWHERE

    def on_body(self, body: bytes) -> None:
        """A piece of a body; nobody waits for that of a request that is answered."""
        self._words = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body = _joined(cycle.body, body) if cycle.body else body  # type: ignore[assignment]  # bytes serve too
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def taken_in(self) -> None:
        """A body is whole of which the parser never heard; another one reads what comes next."""
        self.parser = httptools.HttpRequestParser(self)
        self.transport.set_protocol(self)
        self.on_message_complete()

    def breathe(self) -> None:
        """Read on when the event loop has come round: others wait for it while a fast client sends."""
        self.flow.pause_reading()
        self.loop.call_soon(self._read_on)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if not self._asking:  # else it makes an offer, and is read again
            self._words = 0
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """An answer is out; the rest of its request, if any, and the next one's first byte have a time to come."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._reader.watch()
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._asking:
            self._deadline.set(self.seconds if self.cycle.more_body else self.timeout_keep_alive)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._reader.watch()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if not self.transport.is_closing():
            self._reader.stop()

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _declined(self, rest: bytes) -> bytes:
        """A request to be read again as if it had offered no other protocol: its parser has given up by now."""
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        again = b"".join((*head, b"\r\n", rest))
        self._words = len(again)
        return again

    def _too_late(self) -> None:
        if self._asking:
            self._refuse(408, f"the headers did not arrive in {self.seconds:g} s")
        else:
            self._close()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what is no request, once, and hang up; who asked before on this connection is answered first."""
        if self._deaf:
            return
        self._deaf, cycle = True, self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering and (self.pipeline or cycle.response_started or not cycle.more_body):
            cycle.keep_alive = False
            return
        hooks = hooks_of(self.app_state)
        if hooks and (cycle is None or cycle.response_complete != cycle.more_body):  # the rest of a body is no request
            path = self.url.decode("latin-1").partition("?")[0] if self._asking or answering else ""
            response = hooks.protocol_error_response(status, detail, path)
            self.transport.write(response.wire((*self.server_state.default_headers, *response.raw_headers)))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._reader.watch()


def _joined(held: bytes | bytearray, more: bytes) -> bytes | bytearray:
    """Return what came behind what came before; the first piece, which often is the only one, was not copied."""
    if isinstance(held, bytes):
        held = bytearray(held)
    held += more
    return held


_NOWHERE = _Nowhere()
