"""The outermost room: every request gets an id, shows its key, is counted, timed and logged, whatever becomes of it.

Paths that are asked very often go straight to their endpoint; everything else through FastAPI's router.
"""

import asyncio
import re
import time
from functools import partial

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import Keys
from service.api.problems import OriginRejected, problem
from service.api.route_index import FastRoute, Paths
from service.codecs.requests import CONTROL
from service.errors import Draining
from service.ids import request_id
from service.logs import Lines
from service.metrics import Metrics
from service.server.body_budget import Buffer, Held
from service.server.direct import Written
from service.server.scope import CONTEXT, RequestContext, install_hooks

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})  # other words are one label
PREFLIGHT = {b"origin", b"access-control-request-method"}  # the headers that make OPTIONS one
ID = b"x-request-id"
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")  # W3C, level 1


class _Handling:
    """The state of one request in the middleware."""

    __slots__ = (
        "begun",
        "context",
        "ended",
        "headers",
        "method",
        "name",
        "route",
        "scope",
        "send",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, send: Send, buffer: Buffer) -> None:
        self.started, self.status, self.begun, self.ended = time.perf_counter(), 500, False, False
        self.scope, self.send, self.method = scope, send, scope["method"]
        self.route: FastRoute | None = None
        headers = self.headers = dict(scope["headers"])  # the last of a name counts
        given = headers.get(ID, b"").strip()
        self.name = given.decode() if given and _ID.fullmatch(given) else request_id()
        context: RequestContext | None = scope.get(CONTEXT)
        if context is None:  # another server
            context = scope[CONTEXT] = RequestContext()
        context.headers, context.reservation = headers, Held(buffer)
        self.context = context
        if self.method == "HEAD":  # as GET; the server, whose scope is another one, sends no body
            self.scope = {**scope, "method": "GET"}


class Edge:
    """The ASGI application around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: Keys,
        paths: Paths,
        buffer: Buffer,
        origins: CORSMiddleware | None,
    ) -> None:
        self._app, self._metrics, self._keys, self._paths, self._buffer = app, metrics, keys, paths, buffer
        self._origins, self._lines = origins, Lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything but HTTP passes unchanged, but that the lifespan gets the hooks."""
        if scope["type"] != "http":
            if "state" in scope:
                install_hooks(scope["state"], self)
            await self._app(scope, receive, send)
            return
        handling = _Handling(scope, send, self._buffer)
        try:
            if CONTROL.search(scope["path"]):  # some patterns match before a last newline, and others do not
                raise HTTPException(404, "no path has control characters")
            handling.route = route = self._paths.fast_route(scope)
            if route is None:
                await self._call_router(handling, receive)
            else:
                self._keys.check(handling.method, scope["path"], handling.headers)
                await self._respond(handling, receive, await route.endpoint(Request(scope, receive)))
        except asyncio.CancelledError:  # the process closes, and can wait no longer for what is not whole yet
            if handling.begun:
                raise
            await self._refuse(handling, receive, Draining("this process closes before the request was answered"))
        except Exception as error:  # nothing leaves it unanswered
            if not handling.begun:
                await self._refuse(handling, receive, error)
            elif not handling.ended:  # Starlette raises again what it has answered; half an answer is another matter
                raise
        finally:
            handling.context.reservation.release()
            if not handling.ended:
                self._count(handling)
            self._log(handling)

    def protocol_error_response(self, status: int, detail: str, path: str) -> Written:
        """Return the response to bytes that are no request; it is counted and logged as one, without a duration."""
        name = request_id()
        self._metrics.http_requests.labels("other", "unmatched", str(status)).inc()
        self._lines.add({"method": "", "path": path[:200], "status": status, "request_id": name})
        response = problem(HTTPException(status, detail, {"Connection": "close"}), path, self._metrics)
        response.raw_headers.append((ID, name.encode()))
        return response

    async def _call_router(self, handling: _Handling, receive: Receive) -> None:
        scope, origins = handling.scope, self._origins
        if origins and handling.method == "OPTIONS" and handling.headers.keys() >= PREFLIGHT:  # browsers show no key
            await _preflight(origins, scope)(scope, receive, partial(self._forward, handling))
            return
        self._keys.check(handling.method, scope["path"], handling.headers)
        await self._app(scope, receive, self._sender(handling))

    async def _refuse(self, handling: _Handling, receive: Receive, error: Exception) -> None:
        await self._respond(handling, receive, problem(error, handling.scope["path"], self._metrics))

    async def _respond(self, handling: _Handling, receive: Receive, response: Response) -> None:
        """Send a whole response; that of a fast route without ASGI messages if the server takes it so."""
        exchange = handling.context.exchange
        direct = exchange is not None and handling.route is not None and self._origins is None
        if direct and exchange and isinstance(response, Written) and exchange.hears(handling.send):
            handling.status, handling.begun, handling.ended = response.status_code, True, True
            self._count(handling)
            exchange.answer(response, (ID, handling.name.encode()))
        else:
            await response(handling.scope, receive, self._sender(handling))

    def _sender(self, handling: _Handling) -> Send:
        """Return the `send` of a request, which adds the headers that pages of other origins need, in errors too."""
        send = partial(self._forward, handling)
        if self._origins:
            return partial(self._origins.send, send=send, request_headers=Headers(scope=handling.scope))
        return send

    async def _forward(self, handling: _Handling, message: Message) -> None:
        """Send one message on to the server, with the request id in its headers."""
        if message["type"] == "http.response.start":
            handling.status, handling.begun = message["status"], True
            message["headers"] = [*message.get("headers", ()), (ID, handling.name.encode())]
        elif not message.get("more_body"):
            handling.ended = True
            self._count(handling)  # before it leaves: a process that is killed has counted whatever it answered
        await handling.send(message)

    def _count(self, handling: _Handling) -> None:
        scope = handling.scope
        template = getattr(scope.get("route"), "path", None) or self._paths.template(scope["path"]) or "unmatched"
        method = handling.method if handling.method in METHODS else "other"
        self._metrics.request(method, template, handling.status, time.perf_counter() - handling.started)

    def _log(self, handling: _Handling) -> None:
        """Log one line. No query, no header but the trace: keys never reach a log."""
        line = {"method": handling.method[:20], "path": handling.scope["path"][:200], "status": handling.status}
        line |= {"ms": round((time.perf_counter() - handling.started) * 1e3, 3), "request_id": handling.name}
        given = handling.headers.get(b"traceparent")
        if given and (trace := _TRACE.fullmatch(given.strip())):
            line |= {"trace_id": trace[1].decode(), "span_id": trace[2].decode()}
        self._lines.add(line)


def _preflight(origins: CORSMiddleware, scope: Scope) -> Response:
    response = origins.preflight_response(Headers(scope=scope))
    if response.status_code != 200:
        raise OriginRejected(bytes(response.body).decode())
    return response
