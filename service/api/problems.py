"""Errors as answers: one table from the tree of errors to status codes, one shape for all (RFC 9457)."""

import logging
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from service import errors
from service.api.exchange import Written
from service.metrics import Metrics

STATUS: dict[type, int] = {
    errors.NotJson: 400,
    errors.NotArrow: 400,
    errors.ClientGone: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.UnknownModel: 404,
    errors.Unknown: 404,
    errors.TooSlow: 408,
    errors.BodyTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.InvalidInput: 422,
    errors.ArtefactRejected: 409,
    errors.Conflict: 409,
    errors.Overloaded: 429,
    errors.NoMemory: 501,
    errors.MemoryUnavailable: 503,
    errors.NotReady: 503,
}
TITLES = {
    400: "Bad request",
    401: "Key needed",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Conflict",
    413: "Body too large",
    415: "Unsupported media type",
    422: "Invalid value",
    429: "Overloaded",
    431: "Headers too large",
    500: "Internal error",
    501: "No memory",
    503: "Not available",
}
log = logging.getLogger("engine_health")


def problem(error: Exception, path: str, metrics: Metrics) -> Written:
    """Any error as a problem document; on the paths of the Open Inference Protocol as that protocol has it."""
    headers: dict[str, str] = {}
    faults: tuple[errors.Fault, ...] = ()
    if isinstance(error, errors.ServiceError):
        status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
        detail, faults = error.detail, error.faults
        if isinstance(error, errors.InputRejected):
            metrics.rejected.labels(error.reason).inc()
    elif isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
    else:
        log.error("unexpected error on %s", path, exc_info=error)
        status, detail = 500, "this is a fault of the service; its log says more"
    protocol = path == "/v2" or path.startswith("/v2/")
    if protocol and status == 422:
        status = 400  # what the protocol has for every fault of a request
    headers |= _hints(error, status)
    document: dict[str, Any] = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status}
    document["detail"] = detail
    if protocol:
        document = {"error": detail}
    elif faults:
        document["errors"] = [{"loc": fault.loc, "msg": fault.msg} for fault in faults]
    elif isinstance(error, errors.Conflict) and error.results is not None:
        document["results"] = error.results
    kind = "application/json" if protocol else "application/problem+json"
    response = Written(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status, kind)
    response.raw_headers[:0] = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return response


def _hints(error: Exception, status: int) -> dict[str, str]:
    if isinstance(error, errors.Overloaded):
        return {"Retry-After": str(max(1, round(error.retry_after)))}
    return {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}.get(
        status, {}
    )
