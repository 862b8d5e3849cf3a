"""The event loop: uvloop's, but that it accepts every connection that waits and not one a turn. Knows no HTTP.

libuv accepts a single connection each time round, to be fair to other processes. A loop with much to do comes round
some times a second, and whoever connects then, a probe say, would wait behind all who connected before.
"""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import uvloop

MOST_AT_ONCE = 256  # connections accepted a turn: enough for a storm of them, and other workers get some too
Factory = Callable[[], asyncio.BaseProtocol]


class Loop(uvloop.Loop):
    """uvloop's loop."""

    def __init__(self) -> None:
        super().__init__()
        self._listening: set[socket.socket] = set()

    async def create_server(self, factory: Factory, *args: Any, **more: Any) -> asyncio.Server:  # type: ignore[override]  # all forms of it
        """As uvloop's; its sockets are looked at once more each turn."""
        server: Any = await super().create_server(factory, *args, **more)
        for listening in server.sockets:
            also = socket.socket(fileno=os.dup(listening.fileno()))
            also.setblocking(False)
            self._listening.add(also)
            self.add_reader(also, self._accept, also, server, factory)
        return server  # type: ignore[no-any-return]  # uvloop's own class, which has all that asyncio's has

    def close(self) -> None:
        """As uvloop's."""
        for listening in list(self._listening):
            self._forget(listening)
        super().close()

    def _forget(self, listening: socket.socket) -> None:
        self.remove_reader(listening)
        self._listening.discard(listening)
        listening.close()

    def _accept(self, listening: socket.socket, server: Any, factory: Factory) -> None:
        if not server.is_serving():
            self._forget(listening)
            return
        for _ in range(MOST_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except OSError:  # nobody waits; or a limit of the process is reached, of which libuv tells
                return
            connection.setblocking(False)
            task = self.create_task(self.connect_accepted_socket(factory, connection))
            task.add_done_callback(_heard)


def _heard(task: "asyncio.Task[Any]") -> None:
    """A connection that broke as it was accepted is nobody's fault."""
    if not task.cancelled():
        task.exception()
