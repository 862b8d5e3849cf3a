"""uvicorn's HTTP protocol with the limits that it lacks: header size, and how slowly a client may send and read.

Independent of routes; the application defines the responses to malformed requests.
"""

from math import inf
from typing import Any, ClassVar
from weakref import ref

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.server.direct import DirectExchange, encode_http1
from service.server.limits import HEADER_BYTES
from service.server.scope import CONTEXT, RequestContext, context_of, hooks_of
from service.server.timeouts import ReadDeadline, SlowReaderWatch


class _DiscardTrailers(list[tuple[bytes, bytes]]):
    """The list of trailers, which is always empty."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        """Discard a trailer."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection with limits on size and duration of a request head, and on how slowly a response is read.

    The rest of a body whose response was sent early, a refusal for example, is read and discarded within a time limit,
    so that the client receives the response. Upgrades (`Upgrade: h2c`, websockets) are ignored.
    """

    seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: Any) -> None:
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._non_body_bytes = 0  # received since the last byte of a body: headers, trailers, empty lines
        self._reading_head = False  # between the first byte of a request and the end of its headers
        self._input_closed = False  # after a protocol error; input is ignored
        self._deadline = ReadDeadline(self.loop, self._time_out, self.seconds)
        self._slow_reader: SlowReaderWatch | None = None  # while a response is not read

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers and mark the request as disconnected."""
        self._deadline.stop()
        if self._slow_reader is not None:
            self._slow_reader.stop()
        if self.cycle is not None:
            context_of(self.cycle.scope).disconnected = True
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.body = bytearray()  # the cycle would retain it until a garbage collection

    def data_received(self, data: bytes) -> None:
        """Parse bytes; reject too many bytes outside of bodies."""
        if self._input_closed:
            return
        self._non_body_bytes += len(data)  # on_body resets it
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._rebuild_without_upgrade(data[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._refuse(400, "the bytes received are not an HTTP/1.1 request")
                break
        if self._non_body_bytes > HEADER_BYTES:
            self._refuse(431, f"more than {HEADER_BYTES} bytes of headers")

    def on_message_begin(self) -> None:
        """Start the deadline of the request head."""
        super().on_message_begin()
        self._reading_head = True
        self._deadline.set(self.seconds)

    def on_headers_complete(self) -> None:
        """Clear the deadline: the body has its own limits. Add the context to the scope."""
        if self._non_body_bytes > HEADER_BYTES and self._head_bytes() > HEADER_BYTES:
            self._refuse(431, f"more than {HEADER_BYTES} bytes of headers")
            raise ValueError("refused")  # so that the parser stops
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return  # the parser would skip the body and the next request
        self._deadline.due = inf
        self._reading_head, self._non_body_bytes = False, 0
        super().on_headers_complete()
        self.cycle.scope[CONTEXT] = RequestContext(DirectExchange(self, ref(self.cycle)))  # type: ignore[literal-required]  # our own key
        self.headers = _NO_TRAILERS

    def on_body(self, body: bytes) -> None:
        """Buffer a piece of a body; discard it if the response is complete."""
        self._non_body_bytes = 0
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body = _joined(cycle.body, body) if cycle.body else body  # type: ignore[assignment]  # bytes serve too
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def upload_complete(self) -> None:
        """Continue with a new parser: the old one has not seen the body."""
        self.parser = httptools.HttpRequestParser(self)
        self.transport.set_protocol(self)
        self.on_message_complete()

    def yield_to_loop(self) -> None:
        """Pause reading for one turn of the event loop: other connections wait while a fast client sends."""
        self.flow.pause_reading()
        self.loop.call_soon(self._resume_reading)

    def on_message_complete(self) -> None:
        """Mark the body as complete."""
        if not self._reading_head:  # otherwise the request has an Upgrade header, and is parsed again
            self._non_body_bytes = 0
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Start the next request, or the deadline for the rest of this one or the first byte of the next."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._watch_reader()
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif not self._reading_head:
            self._deadline.set(self.seconds if self.cycle.more_body else self.timeout_keep_alive)

    def pause_writing(self) -> None:
        """Watch a client that does not read fast enough."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """Stop watching: the client has caught up."""
        super().resume_writing()
        if not self.transport.is_closing() and self._slow_reader is not None:
            self._slow_reader.stop()

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _rebuild_without_upgrade(self, rest: bytes) -> bytes:
        """Return the request without its upgrade, to be parsed by a new parser: the old one has stopped."""
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        request = b"".join((*head, b"\r\n", rest))
        self._non_body_bytes = len(request)
        return request

    def _time_out(self) -> None:
        if self._reading_head:
            self._refuse(408, f"the headers did not arrive in {self.seconds:g} s")
        else:
            self._close()

    def _refuse(self, status: int, detail: str) -> None:
        """Respond to a protocol error once, and close. Earlier requests of the connection get their response first."""
        if self._input_closed:
            return
        self._input_closed, cycle = True, self.cycle
        responding = cycle is not None and not cycle.response_complete
        if responding and (self.pipeline or cycle.response_started or not cycle.more_body):
            cycle.keep_alive = False
            return
        hooks = hooks_of(self.app_state)
        if hooks and (cycle is None or cycle.response_complete != cycle.more_body):  # not for the rest of a body
            path = self.url.decode("latin-1").partition("?")[0] if self._reading_head or responding else ""
            response = hooks.protocol_error_response(status, detail, path)
            self.transport.write(encode_http1(response, (*self.server_state.default_headers, *response.raw_headers)))
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch_reader()

    def _watch_reader(self) -> None:
        if self._slow_reader is None:
            self._slow_reader = SlowReaderWatch(self.loop, self.transport, self.seconds)
        self._slow_reader.start()


def _joined(body: bytes | bytearray, piece: bytes) -> bytes | bytearray:
    """Return a body with a further piece. The first piece, often the only one, is not copied."""
    if isinstance(body, bytes):
        body = bytearray(body)
    body += piece
    return body


_NO_TRAILERS = _DiscardTrailers()
