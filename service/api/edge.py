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

from service.api.exchange import Written
from service.api.held import Buffer, Held
from service.api.keys import Keys, RawHeaders
from service.api.problems import OriginRejected, problem
from service.api.routes import Endpoint
from service.api.paths import Paths
from service.api.problems import problem
from service.api.schemas import CONTROL
from service.api.scope import CONTEXT, RequestContext, install_hooks
from service.chance import Names
from service.errors import Draining
from service.errors import NotReady
from service.ids import request_id
from service.logs import Lines
from service.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})  # other words are one label
PREFLIGHT = {b"origin", b"access-control-request-method"}  # the headers that make OPTIONS one
ID = b"x-request-id"
_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}")  # W3C, level 1


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
        started, status, begun, ended = time.perf_counter(), 500, False, False
        method, path, headers = scope["method"], scope["path"], dict(scope["headers"])  # the last of a name counts
        name = _request_id(headers)
        context: RequestContext | None = scope.get(CONTEXT)
        if context is None:  # another server
            context = scope[CONTEXT] = RequestContext()
        context.headers, context.reservation = headers, Held(self._buffer)
        odd = CONTROL.search(path)
        route = None if odd else self._paths.fast_route(scope)
        if method == "HEAD":  # as GET; the server, whose scope is another one, sends no body
            scope = {**scope, "method": "GET"}

        def count() -> None:
            template = getattr(scope.get("route"), "path", None) or self._paths.template(path) or "unmatched"
            known = method if method in METHODS else "other"
            self._metrics.request(known, template, status, time.perf_counter() - started)

        async def watched(message: Message) -> None:
            nonlocal status, begun, ended
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", ()), (ID, name.encode())]
            elif not message.get("more_body"):
                ended = True
                count()  # before it leaves: a process that is killed has counted whatever it answered
            await send(message)

        async def answer(response: Response) -> None:
            nonlocal status, begun, ended
            exchange = context.exchange
            if route and isinstance(response, Written) and exchange and tell is watched and exchange.hears(send):
                status, begun, ended = response.status_code, True, True
                count()
                exchange.answer(response, (ID, name.encode()))
            else:
                await response(scope, receive, tell)

        tell: Send = watched
        if self._origins:  # whose headers errors have too
            tell = partial(self._origins.send, send=watched, request_headers=Headers(scope=scope))
        try:
            if odd:  # some patterns match before a last newline, and others do not
                raise HTTPException(404, "no path has control characters")
            if self._origins and method == "OPTIONS" and headers.keys() >= PREFLIGHT:  # browsers show no key here
                await _preflight(self._origins, scope)(scope, receive, watched)
                return
            self._keys.check(method, path, headers)
            if route is None:
                await self._app(scope, receive, tell)
            else:
                await answer(await route.endpoint(Request(scope, receive)))
        except asyncio.CancelledError:  # the process closes, and can wait no longer for what is not whole yet
            if begun:
                raise
            late = Draining("this process closes before the request was answered")
            await answer(problem(late, path, self._metrics))
        except Exception as error:  # the last room: nothing leaves it unanswered
            if not begun:
                await answer(problem(error, path, self._metrics))
            elif not ended:  # Starlette raises again what it has answered; half an answer is another matter
                raise
        finally:
            context.reservation.release()
            if not ended:
                count()
            self._say(method, path, status, time.perf_counter() - started, name, headers)

    def protocol_error_response(self, status: int, detail: str, path: str) -> Written:
        """Return the response to bytes that are no request; it is counted and logged as one, without a duration."""
        name = request_id()
        self._metrics.http_requests.labels("other", "unmatched", str(status)).inc()
        self._lines.add({"method": "", "path": path[:200], "status": status, "request_id": name})
        response = problem(HTTPException(status, detail, {"Connection": "close"}), path, self._metrics)
        response.raw_headers.append((ID, name.encode()))
        return response

    def _say(self, method: str, path: str, status: int, seconds: float, name: str, headers: RawHeaders) -> None:
        """One line a request. No query, no header but the trace: keys never reach a log."""
        line = {"method": method[:20], "path": path[:200], "status": status, "ms": round(seconds * 1e3, 3)}
        line["request_id"] = name
        given = headers.get(b"traceparent")
        if given and (trace := _TRACE.fullmatch(given.strip())):
            line |= {"trace_id": trace[1].decode(), "span_id": trace[2].decode()}
        self._lines.add(line)


def _request_id(headers: RawHeaders) -> str:
    given = headers.get(ID, b"").strip()
    return given.decode() if given and _ID.fullmatch(given) else request_id()


def _preflight(origins: CORSMiddleware, scope: Scope) -> Response:
    response = origins.preflight_response(Headers(scope=scope))
    if response.status_code != 200:
        raise OriginRejected(bytes(response.body).decode())
    return response
