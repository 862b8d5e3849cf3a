"""A request and its answer as the server has them, for who can do with less than ASGI: whole at once, either way.

ASGI hands a body over in messages and takes an answer in two, and looks at each header for what no answer here has.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol
from weakref import ref

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.errors import ClientGone
from service.server.upload import Intake, Outer

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLOSE = (b"connection", b"close")


class Connection(Outer, Protocol):
    """The protocol of the connection that the request came on."""

    transport: asyncio.Transport


class Written(Response):
    """Bytes that are there as a whole, with the headers that they need and no search for others."""

    def __init__(self, body: bytes, status: int, media_type: str) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})

    def wire(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """As HTTP/1.1 has it, with these headers, all of them; no name or value of any is looked at."""
        parts = [STATUS_LINE[self.status_code]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        return b"".join((*parts, b"\r\n", self.body))


class Exchange:
    """One request on a connection, and what is to be its answer."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = (
            connection,
            ref(cycle),
        )  # whose scope has this: else both waited for a collection

    def whole(self) -> bytes | None:
        """The body, if all of it is there and nobody has heard of any."""
        cycle = self._cycle()
        if cycle is None or cycle.more_body or cycle.disconnected or cycle.response_complete:
            return None
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    def gather(self, place: memoryview, take: Callable[[int], None]) -> Intake:
        """Let the body go to a place of its announced length, instead of being received in pieces.

        Raises:
            ClientGone: nothing more will come.
            Overloaded: as `take` does.
        """
        cycle, transport = self._cycle(), self._connection.transport
        if cycle is None or cycle.disconnected:
            raise ClientGone("the client left before its body was whole")
        intake = Intake(self._connection, cycle.body, place, take)
        cycle.body = bytearray()
        if cycle.more_body:
            if cycle.waiting_for_100_continue:
                transport.write(CONTINUE)
                cycle.waiting_for_100_continue = False
            transport.set_protocol(intake)
            cycle.flow.resume_reading()
        return intake

    def hears(self, send: Send) -> bool:
        """Whether what is sent there comes here unchanged, and could be written now."""
        cycle = self._cycle()
        return cycle is not None and send == cycle.send and not (cycle.response_started or cycle.flow.write_paused)

    def answer(self, written: Written, more: tuple[bytes, bytes]) -> None:
        """Write a whole answer, not to HEAD, and one header more; of all that is looked at is `connection: close`."""
        cycle = self._cycle()
        if cycle is None:
            return
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if cycle.disconnected:
            return
        headers = [*cycle.default_headers, *written.raw_headers, more]
        if CLOSE in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(CLOSE)
        cycle.transport.writelines([written.wire(headers)])
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
