"""The outermost middleware: request id, authentication, metrics and access log of every request.

It calls the endpoint of a fast route directly. All other requests pass through FastAPI's router.
"""

import asyncio
import os
import re
import time
from functools import partial

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import ApiKeys
from service.api.problems import OriginRejected, problem
from service.api.route_index import FastRoute, RouteIndex
from service.codecs.requests import CONTROL_CHARACTER
from service.errors import Draining
from service.ids import REQUEST_ID_BYTES, request_id
from service.logs import RequestLog
from service.metrics import Metrics
from service.server.body_budget import BodyBudget, BodyReservation
from service.server.responses import BytesResponse
from service.server.scope import CONTEXT, RequestContext, install_hooks

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})  # others share one label
PREFLIGHT = {b"origin", b"access-control-request-method"}  # headers of an OPTIONS request that is a CORS preflight
REQUEST_ID = b"x-request-id"
_REQUEST_ID_FORM = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")  # W3C, level 1


class _Handling:
    """The state of one request in the middleware.

    Attributes:
        begun: whether the response has started.
        ended: whether the response is complete, and counted.
        started: `time.perf_counter()` at the start.
        status: the status code of the response; 500 until it has started.
    """

    __slots__ = (
        "begun",
        "context",
        "ended",
        "headers",
        "method",
        "request_id",
        "route",
        "scope",
        "send",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, send: Send, budget: BodyBudget) -> None:
        self.started, self.status, self.begun, self.ended = time.perf_counter(), 500, False, False
        self.scope, self.send, self.method = scope, send, scope["method"]
        self.route: FastRoute | None = None
        headers = self.headers = dict(scope["headers"])  # the last of a name counts
        sent_id = headers.get(REQUEST_ID, b"").strip()
        valid = sent_id and _REQUEST_ID_FORM.fullmatch(sent_id)
        self.request_id = sent_id.decode() if valid else os.urandom(REQUEST_ID_BYTES).hex()
        context: RequestContext | None = scope.get(CONTEXT)
        if context is None:  # another server
            context = scope[CONTEXT] = RequestContext()
        length = headers.get(b"content-length", b"").strip()
        context.headers, context.content_length = headers, int(length) if length.isdigit() else 0
        context.reservation = BodyReservation(budget)
        self.context = context
        if self.method == "HEAD":  # handled as GET; the server, which has another scope, sends no body
            self.scope = {**scope, "method": "GET"}


class RequestMiddleware:
    """The ASGI application around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: ApiKeys,
        index: RouteIndex,
        budget: BodyBudget,
        cors: CORSMiddleware | None,
    ) -> None:
        self._app, self._metrics, self._keys, self._index, self._budget = app, metrics, keys, index, budget
        self._cors, self._log = cors, RequestLog()
        self._fast_routes = index.fixed
        self._check_fast_routes = any(keys.needed_for(method, path) for method, path in index.fast_routes())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. All other scopes pass unchanged; the state of the lifespan gets the hooks."""
        if scope["type"] != "http":
            if "state" in scope:
                install_hooks(scope["state"], self)
            await self._app(scope, receive, send)
            return
        handling = _Handling(scope, send, self._budget)
        try:
            path = scope["path"]
            if CONTROL_CHARACTER.search(path):  # some patterns match before a last newline, and others do not
                raise HTTPException(404, "the path contains control characters")
            route = self._fast_routes.get((scope["method"], path)) or self._index.fast_route(scope)
            if route is None:
                await self._call_router(handling, receive)
            else:
                scope["route"] = handling.route = route
                if self._check_fast_routes:
                    self._keys.check(handling.method, path, handling.headers)
                await self._respond(handling, receive, await route.endpoint(Request(scope, receive)))
        except asyncio.CancelledError:  # the process closes, and stops waiting for incomplete requests
            if handling.begun:
                raise
            await self._refuse(
                handling, receive, Draining("this process shuts down before the request was answered; send it again")
            )
        except Exception as error:  # every request gets a response
            if not handling.begun:
                await self._refuse(handling, receive, error)
            elif not handling.ended:  # Starlette raises again after it has sent an error response
                raise
        finally:
            handling.context.reservation.release()
            if not handling.ended:
                self._count(handling)
            self._write_log(handling)

    def protocol_error_response(self, status: int, detail: str, path: str) -> BytesResponse:
        """Return the response to bytes that are no request; it is counted and logged as one, without a duration."""
        identifier = request_id()
        self._metrics.http_requests.labels("other", "unmatched", str(status)).inc()
        self._log.add({"method": "", "path": path[:200], "status": status, "request_id": identifier})
        response = problem(HTTPException(status, detail, {"Connection": "close"}), path, self._metrics)
        response.raw_headers.append((REQUEST_ID, identifier.encode()))
        return response

    async def _call_router(self, handling: _Handling, receive: Receive) -> None:
        scope, cors = handling.scope, self._cors
        if cors and handling.method == "OPTIONS" and handling.headers.keys() >= PREFLIGHT:  # browsers send no key
            await _preflight(cors, scope)(scope, receive, partial(self._forward, handling))
            return
        self._keys.check(handling.method, scope["path"], handling.headers)
        await self._app(scope, receive, self._sender(handling))

    async def _refuse(self, handling: _Handling, receive: Receive, error: Exception) -> None:
        await self._respond(handling, receive, problem(error, handling.scope["path"], self._metrics))

    async def _respond(self, handling: _Handling, receive: Receive, response: Response) -> None:
        """Send a complete response; that of a fast route without ASGI messages if the server supports it."""
        exchange = handling.context.exchange
        direct = exchange is not None and handling.route is not None and self._cors is None
        if direct and exchange and isinstance(response, BytesResponse) and exchange.can_write_directly(handling.send):
            handling.status, handling.begun, handling.ended = response.status_code, True, True
            self._count(handling)
            exchange.write_response(response, (REQUEST_ID, handling.request_id.encode()))
        else:
            await response(handling.scope, receive, self._sender(handling))

    def _sender(self, handling: _Handling) -> Send:
        """Return the `send` of a request. It adds the CORS headers, also to errors."""
        send = partial(self._forward, handling)
        if self._cors:
            return partial(self._cors.send, send=send, request_headers=Headers(scope=handling.scope))
        return send

    async def _forward(self, handling: _Handling, message: Message) -> None:
        """Send one message to the server, with the request id in its headers."""
        if message["type"] == "http.response.start":
            handling.status, handling.begun = message["status"], True
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, handling.request_id.encode())]
        elif not message.get("more_body"):
            handling.ended = True
            self._count(handling)  # before it is sent: a killed process has counted every response
        await handling.send(message)

    def _count(self, handling: _Handling) -> None:
        scope = handling.scope
        template = getattr(scope.get("route"), "path", None) or self._index.template(scope["path"]) or "unmatched"
        method = handling.method if handling.method in METHODS else "other"
        self._metrics.request(method, template, handling.status, time.perf_counter() - handling.started)

    def _write_log(self, handling: _Handling) -> None:
        """Log one line. It has no query and no header but the trace: keys never reach a log."""
        line = {"method": handling.method[:20], "path": handling.scope["path"][:200], "status": handling.status}
        line |= {"ms": round((time.perf_counter() - handling.started) * 1e3, 3), "request_id": handling.request_id}
        parent = handling.headers.get(b"traceparent")
        if parent and (trace := _TRACE.fullmatch(parent.strip())):
            line |= {"trace_id": trace[1].decode(), "span_id": trace[2].decode()}
        self._log.add(line)


def _preflight(cors: CORSMiddleware, scope: Scope) -> Response:
    response = cors.preflight_response(Headers(scope=scope))
    if response.status_code != 200:
        raise OriginRejected(bytes(response.body).decode())
    return response
