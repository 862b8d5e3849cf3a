"""The event loop: uvloop's, but that when it is busy it accepts more than one connection a turn. Knows no HTTP.

libuv accepts a single connection each time round, to leave some to other processes. A loop with much to do comes round
a few times a second, and whoever connects then, a probe say, would wait behind all who connected before, where no
queue and no limit sees them. So after a turn that took long, as many are accepted as might have come meanwhile.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import uvloop

SECONDS_EACH = 0.0002  # of a turn, for each connection more: an idle loop takes one, and the other workers get theirs
MOST_AT_ONCE = 2048  # as many as a listening socket holds for uvicorn
Factory = Callable[[], asyncio.BaseProtocol]


class Loop(uvloop.Loop):
    """uvloop's loop."""

    async def create_server(self, factory: Factory, *args: Any, **more: Any) -> asyncio.Server:  # type: ignore[override]  # all forms of it
        """As uvloop's; each connection that it accepts is followed by others that wait, if the loop is busy."""

        def accepted() -> asyncio.BaseProtocol:
            self.call_soon(self.call_soon, self._accept_others, server, factory, time.perf_counter())  # a turn later
            return factory()

        server: Any = await super().create_server(accepted, *args, **more)
        return server  # type: ignore[no-any-return]  # uvloop's own class, which has all that asyncio's has

    def _accept_others(self, server: Any, factory: Factory, since: float) -> None:
        others = min(MOST_AT_ONCE, int((time.perf_counter() - since) / SECONDS_EACH))
        if not others or not server.is_serving():
            return
        for listening in server.sockets:
            try:
                copy = os.dup(listening.fileno())
            except OSError:  # as many files are open as may be: nobody else can be accepted
                return
            with socket.socket(fileno=copy) as also:
                also.setblocking(False)
                for _ in range(others):
                    try:
                        connection, _ = also.accept()
                    except OSError:  # nobody waits; or a limit of the process is reached, of which libuv tells
                        break
                    connection.setblocking(False)
                    task = self.create_task(self.connect_accepted_socket(factory, connection))
                    task.add_done_callback(_heard)


def _heard(task: "asyncio.Task[Any]") -> None:
    """A connection that broke as it was accepted is nobody's fault."""
    if not task.cancelled():
        task.exception()
