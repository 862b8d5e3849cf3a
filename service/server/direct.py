"""Direct access to a request and its response in the server, without ASGI messages.

ASGI delivers a body in messages, takes a response in two, and searches its headers for what no response here has.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import ReferenceType

from msgspec import Struct
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.errors import ClientDisconnected
from service.server.responses import BytesResponse
from service.server.upload import BodyUpload, ParentProtocol

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLOSE = (b"connection", b"close")


class Connection(ParentProtocol, Protocol):
    """The protocol of the connection that the request arrived on."""

    transport: asyncio.Transport


class DirectExchange(Struct, eq=False):  # constructed in C
    """One request on a connection, and its response.

    Attributes:
        connection: the connection.
        cycle: uvicorn's state of the request. Its scope refers to this object, so the reference is weak: otherwise
            both would live until a garbage collection.
    """

    connection: Connection
    cycle: ReferenceType[RequestResponseCycle]

    def complete_body(self) -> bytes | None:
        """Return the body if all of it has arrived and no ASGI message has delivered any of it; otherwise None."""
        cycle = self.cycle()
        if cycle is None or cycle.more_body or cycle.disconnected or cycle.response_complete:
            return None
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    def start_upload(self, buffer: memoryview, charge: Callable[[int], None]) -> BodyUpload:
        """Receive the body directly into a buffer of its announced length.

        Raises:
            ClientDisconnected: the client has disconnected.
            Overloaded: raised by `charge`.
        """
        cycle, transport = self.cycle(), self.connection.transport
        if cycle is None or cycle.disconnected:
            raise ClientDisconnected("the client disconnected before its body was complete")
        upload = BodyUpload(self.connection, cycle.body, buffer, charge)
        cycle.body = bytearray()
        if cycle.more_body:
            if cycle.waiting_for_100_continue:
                transport.write(CONTINUE)
                cycle.waiting_for_100_continue = False
            transport.set_protocol(upload)
            cycle.flow.resume_reading()
        return upload

    def can_write_directly(self, send: Send) -> bool:
        """Return whether `send` is the server's own, and a response can be written now."""
        cycle = self.cycle()
        return cycle is not None and send == cycle.send and not (cycle.response_started or cycle.flow.write_paused)

    def write_response(self, response: BytesResponse, extra_header: tuple[bytes, bytes]) -> None:
        """Write a complete response with one more header; not to HEAD. Honours the header `connection: close`."""
        cycle = self.cycle()
        if cycle is None:
            return
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if cycle.disconnected:
            return
        headers = [*cycle.default_headers, *response.raw_headers, extra_header]
        if CLOSE in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(CLOSE)
        cycle.transport.write(encode_http1(response, headers))
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


def encode_http1(response: BytesResponse, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encode a response as HTTP/1.1 with exactly these headers, which are not checked."""
    parts = [STATUS_LINE[response.status_code]]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    return b"".join((*parts, b"\r\n", response.body))
