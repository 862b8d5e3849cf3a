import asyncio
import socket
import time
from typing import cast

from service.loop import MOST_AT_ONCE, Loop

CLIENTS = 200


def test_all_who_connected_while_the_loop_was_busy_are_accepted_at_once() -> None:
    """Two hundred connections that wait are accepted in a few turns of the loop, and each of them is answered."""
    made: list[int] = []
    turns = 0

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(turns)
            self.transport = cast("asyncio.Transport", transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async def scene() -> None:
        nonlocal turns
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Echo, "127.0.0.1", 0, backlog=2 * CLIENTS)
        address = server.sockets[0].getsockname()
        clients = [socket.create_connection(address) for _ in range(CLIENTS)]  # the loop does not turn meanwhile
        while len(made) < CLIENTS:
            turns += 1
            await asyncio.sleep(0)
            assert turns < 10_000
        first, last = clients[0], clients[-1]
        for client in (first, last):
            client.setblocking(False)
            await loop.sock_sendall(client, b"x")
            assert b"x" == await asyncio.wait_for(loop.sock_recv(client, 1), 30)
        for client in clients:
            client.close()
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(scene())
    assert CLIENTS < MOST_AT_ONCE
    assert made[-1] - made[0] < CLIENTS / 10


def test_a_server_that_is_closed_accepts_nobody_more() -> None:
    """After closing, whoever connects is turned away as soon as the loop turns."""

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

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(scene())
