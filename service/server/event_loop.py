"""An event loop that accepts more than one connection per turn while it is busy. Independent of HTTP.

libuv accepts a single connection per turn, to leave some to other processes. A busy loop makes a few turns per second.
A new connection, of a probe for example, would wait behind all earlier ones, where no queue and no limit sees them.
After a long turn this loop therefore accepts as many connections as may have arrived meanwhile.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import uvloop

SECONDS_PER_CONNECTION = 0.0002  # of a turn: an idle loop accepts one, so that the other workers get theirs
MAX_ACCEPTED = 2048  # per turn: the backlog of uvicorn's listening socket
Factory = Callable[[], asyncio.BaseProtocol]


class BatchAcceptLoop(uvloop.Loop):
    """uvloop's event loop with batched accept."""

    async def create_server(self, factory: Factory, *args: Any, **options: Any) -> asyncio.Server:  # type: ignore[override]  # all forms of it
        """Create a server as uvloop does. Each accepted connection is followed by waiting ones if the loop is busy."""

        def accepted() -> asyncio.BaseProtocol:
            self.call_soon(self.call_soon, self._accept_waiting, server, factory, time.perf_counter())  # a turn later
            return factory()

        server: Any = await super().create_server(accepted, *args, **options)
        return server  # type: ignore[no-any-return]  # uvloop's own class, which has all that asyncio's has

    def _accept_waiting(self, server: Any, factory: Factory, since: float) -> None:
        waiting = min(MAX_ACCEPTED, int((time.perf_counter() - since) / SECONDS_PER_CONNECTION))
        if not waiting or not server.is_serving():
            return
        for listening in server.sockets:
            try:
                descriptor = os.dup(listening.fileno())
            except OSError:  # the limit of open files is reached: nothing else can be accepted
                return
            with socket.socket(fileno=descriptor) as copy:
                copy.setblocking(False)
                for _ in range(waiting):
                    try:
                        connection, _ = copy.accept()
                    except OSError:  # none is waiting; or a limit of the process is reached, which libuv reports
                        break
                    connection.setblocking(False)
                    task = self.create_task(self.connect_accepted_socket(factory, connection))
                    task.add_done_callback(_ignore_error)


def _ignore_error(task: "asyncio.Task[Any]") -> None:
    """Ignore the error of a connection that broke while it was accepted."""
    if not task.cancelled():
        task.exception()
