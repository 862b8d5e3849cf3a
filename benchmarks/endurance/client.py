"""HTTP/1.1 from one thread, cheaply enough to offer ten times what a server can take. Knows no service, no promise.

One connection carries one request at a time. `offer` keeps to its timetable whatever the server does (an open loop):
latency counts from when a request was due, so that a server that stalls is not spared the requests it kept away.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np

HOST = "127.0.0.1"
MOST_CONNECTIONS = 8000  # of one offer; beyond it a request counts as not sent
PATIENCE = 120.0  # seconds that any answer may take before it is called missing


class Answer(NamedTuple):
    """What came back; `seconds` from when the request was due."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    seconds: float


class Connection(asyncio.Protocol):
    """A connection that stays open between requests if the server lets it."""

    def __init__(self) -> None:
        self._received, self._size = bytearray(), 0
        self._answer: asyncio.Future[tuple[int, dict[bytes, bytes], bytes]] | None = None
        self._head: tuple[int, dict[bytes, bytes]] | None = None
        self.open = True

    @classmethod
    async def to(cls, port: int) -> "Connection":
        """Open a connection.

        Raises:
            OSError: no process listens, or the connection timed out.
        """
        connecting = asyncio.get_running_loop().create_connection(cls, HOST, port)
        return (await asyncio.wait_for(connecting, PATIENCE))[1]

    async def ask(self, request: bytes, due: float | None = None) -> Answer:
        """Send and hear.

        Raises:
            ConnectionError: it broke before the answer was whole.
            TimeoutError: nothing came for two minutes.
        """
        since = time.perf_counter() if due is None else due
        self._answer = asyncio.get_running_loop().create_future()
        if not self.open:
            raise ConnectionResetError("closed before it was asked")
        self._transport.write(request)
        timer = asyncio.get_running_loop().call_later(PATIENCE, self._time_out, self._answer)
        try:
            response = await self._answer
        finally:
            timer.cancel()
        return Answer(*response, time.perf_counter() - since)

    def send(self, data: bytes) -> None:
        """Write without waiting for an answer."""
        self._transport.write(data)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError(f"broken: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
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
            answer.set_exception(TimeoutError(f"no answer in {PATIENCE:g} s"))


@dataclass
class RequestOutcomes:
    """What became of requests: how many were due, each answer's status and seconds, and what broke.

    Seconds run from when a request was begun, its connection included; `late` says by how much this client, which has
    a core and no more, was behind its own times by then.
    """

    due: int = 0
    late: list[float] = field(default_factory=list)
    seconds: dict[int, list[float]] = field(default_factory=dict)
    broken: Counter[str] = field(default_factory=Counter)
    unhinted: int = 0  # 429 without Retry-After

    def add(self, answer: Answer) -> None:
        """One answer."""
        self.seconds.setdefault(answer.status, []).append(answer.seconds)
        if answer.status == 429 and int(answer.headers.get(b"retry-after", 0)) < 1:
            self.unhinted += 1

    def count(self, status: int) -> int:
        """Answers of a status."""
        return len(self.seconds.get(status, ()))

    def percentile(self, status: int, q: float) -> float:
        """Seconds within which that share (0..100) of a status was answered; NaN without any."""
        seconds = self.seconds.get(status)
        return float(np.percentile(seconds, q)) if seconds else float("nan")


def request(path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, method: str = "POST") -> bytes:
    """Return a request as bytes, with Content-Length."""
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
    """Send a request `rate` times a second, each when it is due, on an idle connection or a new one."""
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
            await asyncio.sleep(0)  # late: hear what came meanwhile
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
    """Send all of them, each connection its next when it is answered (a closed loop)."""
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
