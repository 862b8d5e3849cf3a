"""The outermost room: every request gets an id, shows its key, is counted, timed and logged, whatever becomes of it.

Paths that are asked very often go straight to their endpoint; everything else through FastAPI's router.
"""

import os
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.body import HELD, Buffer, Held
from service.api.keys import Keys, RawHeaders
from service.api.problems import problem
from service.api.routes import Endpoint
from service.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})  # other words are one label
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")  # W3C, level 1


class Lane(NamedTuple):
    """An endpoint that is reached without routing, and the template of its path."""

    path: str
    endpoint: Endpoint


class Edge:
    """The ASGI application around the whole application."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, keys: Keys, lane: Callable[[str], Lane | None], buffer: Buffer
    ) -> None:
        self._app, self._metrics, self._keys, self._lane, self._buffer = app, metrics, keys, lane, buffer
        self._log = structlog.get_logger().bind()  # bound once: logs are configured by now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything but HTTP passes unseen."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, begun, ended = time.perf_counter(), 500, False, False
        method, path, headers = scope["method"], scope["path"], dict(scope["headers"])  # the last of a name counts
        request_id = _request_id(headers)
        held = scope[HELD] = Held(self._buffer)
        lane = self._lane(path) if method == "POST" and not _CONTROL.search(path) else None

        def count() -> None:
            route = getattr(scope.get("route"), "path", "unmatched")
            known = method if method in METHODS else "other"
            self._metrics.request(known, route, status, time.perf_counter() - started)

        async def watched(message: Message) -> None:
            nonlocal status, begun, ended
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif not message.get("more_body"):
                ended = True
                count()  # before it leaves: a process that is killed has counted whatever it answered
            await send(message)

        if lane:
            scope["route"] = lane  # as a router would
        try:
            if _CONTROL.search(path):  # some patterns match before a last newline, and others do not
                raise HTTPException(404, "no path has control characters")
            self._keys.check(method, path, headers)
            if lane is None:
                await self._app(scope, receive, watched)
            else:
                response = await lane.endpoint(Request(scope, receive))
                await response(scope, receive, watched)
        except Exception as error:  # the last room: nothing leaves it unanswered
            if not begun:
                await problem(error, path, self._metrics)(scope, receive, watched)
            elif not ended:  # Starlette raises again what it has answered; half an answer is another matter
                raise
        finally:
            held.release()
            if not ended:
                count()
            self._say(method, path, status, time.perf_counter() - started, request_id, headers)

    def _say(self, method: str, path: str, status: int, seconds: float, request_id: str, headers: RawHeaders) -> None:
        """One line a request. No query, no header but the trace: keys never reach a log."""
        more = {}
        trace = _TRACE.fullmatch(headers.get(b"traceparent", b""))
        if trace:
            more = {"trace_id": trace[1].decode(), "span_id": trace[2].decode()}
        ms = round(seconds * 1e3, 3)
        self._log.info(
            "request", method=method[:20], path=path[:200], status=status, ms=ms, request_id=request_id, **more
        )


def _request_id(headers: RawHeaders) -> str:
    given = headers.get(b"x-request-id")
    return given.decode() if given and _ID.fullmatch(given) else os.urandom(8).hex()
