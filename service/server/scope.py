"""The interface between server and application: the objects that they share through ASGI scopes, typed.

The server puts a `RequestContext` into the scope of each request. The application puts its `ServerHooks` into the state
of the lifespan. Every other server runs the same application without either of them.
"""

from collections.abc import Callable, Mapping, MutableMapping
from operator import itemgetter
from typing import Any, Protocol

from msgspec import Struct

from service.server.body_budget import BodyReservation
from service.server.direct import DirectExchange
from service.server.responses import BytesResponse

CONTEXT = "engine_health.context"  # the key in the scope of a request
HOOKS = "engine_health.hooks"  # the key in the state of the lifespan


class RequestContext(Struct, eq=False):  # constructed in C
    """The state of one request that ASGI has no place for. Copies of a scope share it.

    Attributes:
        exchange: direct access to the request and its response; None under another server.
        disconnected: whether the client has disconnected; may be read in any thread. Only our server sets it.
        headers: the last value of each header name; set by the middleware.
        content_length: bytes of the body according to its header, 0 without one; set by the middleware.
        reservation: the memory that the body holds; set by the middleware.
    """

    exchange: DirectExchange | None = None
    disconnected: bool = False
    headers: Mapping[bytes, bytes] = {}
    content_length: int = 0
    reservation: BodyReservation = None  # type: ignore[assignment]  # set by the middleware before any use


class ServerHooks(Protocol):
    """The calls that our server makes to the application outside of requests."""

    def protocol_error_response(self, status: int, detail: str, path: str) -> BytesResponse:
        """Return the response to bytes that are no request, and count and log it.

        Args:
            status: the status code.
            detail: what is wrong.
            path: the path of the request, without its query; empty if it is unknown.
        """


context_of: Callable[[Mapping[str, Any]], RequestContext] = itemgetter(CONTEXT)  # in C: hot paths enter no frame for it


def install_hooks(state: MutableMapping[str, Any], hooks: ServerHooks) -> None:
    """Put the hooks of the application into the state of the lifespan."""
    state[HOOKS] = hooks


def hooks_of(state: Mapping[str, Any]) -> ServerHooks | None:
    """Return the hooks of the application; None if it has none."""
    hooks: ServerHooks | None = state.get(HOOKS)
    return hooks
