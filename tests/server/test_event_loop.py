import asyncio
import os
import resource
import socket
import time
from typing import Any, cast

import pytest

from service.server.event_loop import MAX_ACCEPTED, BatchAcceptLoop

CLIENTS = 200


class Echo(asyncio.Protocol):
    """A protocol that returns what it receives; `accepted` has the loop turn of each accepted connection."""

    turn, accepted = 0, list[int]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.accepted.append(Echo.turn)
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def count_turns_until_accepted(seconds: float) -> int:
    """Return the number of loop turns of `seconds` each in which all clients are accepted."""
    Echo.accepted.clear()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=2 * CLIENTS)
    address = server.sockets[0].getsockname()
    clients = [socket.create_connection(address) for _ in range(CLIENTS)]  # the event loop is blocked during connects
    for Echo.turn in range(10_000):
        if len(Echo.accepted) == CLIENTS:
            break
        time.sleep(seconds)  # blocks the event loop on purpose, as work of one turn does
        await asyncio.sleep(0)
    for client in clients[0], clients[-1]:
        client.setblocking(False)
        await loop.sock_sendall(client, b"x")
        assert b"x" == await asyncio.wait_for(loop.sock_recv(client, 1), 30)
    for client in clients:
        client.close()
    server.close()
    await server.wait_closed()
    return Echo.accepted[-1] - Echo.accepted[0]


def test_waiting_connections_are_accepted_in_few_turns() -> None:
    """200 waiting connections are accepted in a few long turns, and each gets a response."""
    with asyncio.Runner(loop_factory=BatchAcceptLoop) as runner:
        assert CLIENTS / 10 > runner.run(count_turns_until_accepted(0.02))
    assert CLIENTS < MAX_ACCEPTED


def test_idle_loop_accepts_few_connections_per_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short turns accept one or two connections each, so that workers share simultaneous clients."""
    monkeypatch.setattr(
        "service.server.event_loop.SECONDS_PER_CONNECTION", 60.0
    )  # longer than any turn, even on a busy machine
    with asyncio.Runner(loop_factory=BatchAcceptLoop) as runner:
        assert CLIENTS / 10 < runner.run(count_turns_until_accepted(0))


def test_loop_without_free_descriptors_continues() -> None:
    """Without free file descriptors the loop raises nothing, and accepts connections once there are some."""

    async def scene() -> list[dict[str, Any]]:
        raised: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: raised.append(context))
        server = await loop.create_server(Echo, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        clients = [socket.create_connection(address) for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))  # one more descriptor may be opened
            for _ in range(20):
                time.sleep(0.005)
                await asyncio.sleep(0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        clients.append(socket.create_connection(address))
        clients[-1].setblocking(False)
        await loop.sock_sendall(clients[-1], b"x")
        assert b"x" == await asyncio.wait_for(loop.sock_recv(clients[-1], 1), 30)
        for client in clients:
            client.close()
        server.close()
        await server.wait_closed()
        return raised

    with asyncio.Runner(loop_factory=BatchAcceptLoop) as runner:
        assert [] == runner.run(scene())


def test_closed_server_accepts_no_connection() -> None:
    """A closed server refuses new connections from the next turn of the loop."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        server.close()
        await server.wait_closed()
        refused, deadline = False, time.monotonic() + 10
        while not refused and time.monotonic() < deadline:
            try:
                socket.create_connection(address, timeout=1).close()
                await asyncio.sleep(0.01)
            except ConnectionRefusedError:
                refused = True
        assert refused

    with asyncio.Runner(loop_factory=BatchAcceptLoop) as runner:
        runner.run(scene())
