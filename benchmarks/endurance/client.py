"""A fast HTTP/1.1 client in one thread, which can send ten times the capacity of the server.

A connection sends one request at a time. `offer` is an open loop: it sends each request when it is due, whatever the
server does, so that requests delayed by a stalled server are included.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np

HOST = "127.0.0.1"
MOST_CONNECTIONS = 8000  # per offer; a request beyond counts as not sent
PATIENCE = 120.0  # s; timeout of a response


class Answer(NamedTuple):
    """A response. `seconds`: from the due time that was passed to `ask`, or from the call of `ask`."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    seconds: float


class Connection(asyncio.Protocol):
    """A connection that is reused for further requests if the server keeps it open."""

    def __init__(self) -> None:
        self._received, self._size = bytearray(), 0
        self._answer: asyncio.Future[tuple[int, dict[bytes, bytes], bytes]] | None = None
        self._head: tuple[int, dict[bytes, bytes]] | None = None
        self.open = True

    @classmethod
    async def to(cls, port: int) -> "Connection":
        """Open a connection.

        Raises:
            OSError: the connection was refused, or was not accepted in time.
        """
        connecting = asyncio.get_running_loop().create_connection(cls, HOST, port)
        return (await asyncio.wait_for(connecting, PATIENCE))[1]

    async def ask(self, request: bytes, due: float | None = None) -> Answer:
        """Send a request and return its response.

        Raises:
            ConnectionError: the connection broke before the response was complete.
            TimeoutError: no response arrived within 2 min.
        """
        since = time.perf_counter() if due is None else due
        self._answer = asyncio.get_running_loop().create_future()
        if not self.open:
            raise ConnectionResetError("the connection was closed before the request")
        self._transport.write(request)
        timer = asyncio.get_running_loop().call_later(PATIENCE, self._time_out, self._answer)
        try:
            response = await self._answer
        finally:
            timer.cancel()
        return Answer(*response, time.perf_counter() - since)

    def send(self, data: bytes) -> None:
        """Write without waiting for a response."""
        self._transport.write(data)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport; called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the pending request; called by asyncio."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(f"the connection broke: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        """Parse received bytes and complete the pending request; called by asyncio."""
        self._received += data
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *lines = bytes(self._received[:end]).split(b"\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
            self._head, self._size = (int(first[9:12]), headers), end + 4 + int(headers.get(b"content-length", 0))
            self._start = end + 4
        if len(self._received) >= self._size and self._answer is not None and not self._answer.done():
            status, headers = self._head
            self.open = self.open and headers.get(b"connection", b"") != b"close"
            body = bytes(self._received[self._start : self._size])
            self._received, self._head = bytearray(), None
            self._answer.set_result((status, headers, body))

    def _time_out(self, answer: "asyncio.Future[tuple[int, dict[bytes, bytes], bytes]]") -> None:
        if not answer.done():
            answer.set_exception(TimeoutError(f"no response within {PATIENCE:g} s"))


@dataclass
class RequestOutcomes:
    """Outcomes of requests: the number due, status and seconds of each response, and failures.

    Seconds are measured from the start of a request and include the connection. `late` contains the delay of this
    client, which has only one core, against the due times.
    """

    due: int = 0
    late: list[float] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    broken: Counter[str] = field(default_factory=Counter)
    unhinted: int = 0  # 429 without Retry-After

    def add(self, answer: Answer) -> None:
        """Record one response."""
        self.seconds.setdefault(answer.status, []).append(answer.seconds)
        if answer.status == 429 and int(answer.headers.get(b"retry-after", 0)) < 1:
            self.unhinted += 1

    def count(self, status: int) -> int:
        """Return the number of responses with a status."""
        return len(self.seconds.get(status, ()))

    def percentile(self, status: int, q: float) -> float:
        """Return the percentile q (0..100) of the seconds of responses with a status; NaN without any."""
        seconds = self.seconds.get(status)
        return float(np.percentile(seconds, q)) if seconds else float("nan")


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """Return a request with Content-Length as bytes."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join((*lines, "", "")).encode() + body


async def ask_once(port: int, request_bytes: bytes) -> Answer:
    """Send one request on a new connection."""
    connection = await Connection.to(port)
    try:
        return await connection.ask(request_bytes)
    finally:
        connection.close()


async def offer(port: int, request_bytes: bytes, rate: float, seconds: float) -> RequestOutcomes:
    """Send a request `rate` times per second, each when it is due, on an idle or a new connection (open loop)."""
    outcomes, idle, tasks = RequestOutcomes(), list[Connection](), set[asyncio.Task[None]]()
    opened = 0

    async def send_when_due(due: float) -> None:
        nonlocal opened
        since = time.perf_counter()
        outcomes.late.append(since - due)
        try:
            while idle and not idle[-1].open:
                idle.pop()
            if idle:
                connection = idle.pop()
            else:
                opened += 1
                connection = await Connection.to(port)
            outcomes.add(await connection.ask(request_bytes, since))
            idle.append(connection)
        except (OSError, TimeoutError) as error:
            outcomes.broken[type(error).__name__] += 1

    start = time.perf_counter()
    for k in range(round(rate * seconds)):
        due = start + k / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        elif k % 32 == 0:
            await asyncio.sleep(0)  # late: process received responses
        outcomes.due += 1
        if len(tasks) >= MOST_CONNECTIONS:
            outcomes.broken["not sent"] += 1
            continue
        task = asyncio.create_task(send_when_due(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    while tasks:
        await asyncio.wait(tasks)
    for connection in idle:
        connection.close()
    return outcomes


async def in_turn(port: int, requests: Iterable[bytes], connections: int) -> RequestOutcomes:
    """Send all requests; each connection sends its next request after a response (closed loop)."""
    outcomes, remaining = RequestOutcomes(), iter(requests)

    async def send_remaining() -> None:
        connection = await Connection.to(port)
        for request_bytes in remaining:
            outcomes.due += 1
            try:
                if not connection.open:
                    connection = await Connection.to(port)
                outcomes.add(await connection.ask(request_bytes))
            except (OSError, TimeoutError) as error:
                outcomes.broken[type(error).__name__] += 1
        connection.close()

    await asyncio.gather(*(send_remaining() for _ in range(connections)))
    return outcomes
