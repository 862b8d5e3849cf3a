"""Error responses: one table from error codes to HTTP status, one shape for all (RFC 9457)."""

import logging
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from service import errors
from service.metrics import Metrics
from service.server.responses import BytesResponse

Code = errors.Code
STATUS: dict[Code, int] = {
    Code.MALFORMED_HTTP: 400,
    Code.MALFORMED_JSON: 400,
    Code.MALFORMED_ARROW: 400,
    Code.CLIENT_DISCONNECTED: 400,
    Code.ORIGIN_NOT_ALLOWED: 400,
    Code.API_KEY_MISSING: 401,
    Code.API_KEY_UNKNOWN: 401,
    Code.NOT_ADMIN: 403,
    Code.ADMIN_DISABLED: 403,
    Code.PATH_NOT_FOUND: 404,
    Code.RECORD_NOT_FOUND: 404,
    Code.MODEL_NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.REQUEST_TIMEOUT: 408,
    Code.ARTEFACT_REJECTED: 409,
    Code.CONFLICT: 409,
    Code.BODY_TOO_LARGE: 413,
    Code.UNSUPPORTED_MEDIA_TYPE: 415,
    Code.INVALID_VALUE: 422,
    Code.OVERLOADED: 429,
    Code.HEADERS_TOO_LARGE: 431,
    Code.INTERNAL_ERROR: 500,
    Code.STORE_NOT_CONFIGURED: 501,
    Code.STORE_UNAVAILABLE: 503,
    Code.NOT_READY: 503,
    Code.DRAINING: 503,
}
HTTP_CODES = {  # of errors that the router or the HTTP parser raises, which have a status only
    400: Code.MALFORMED_HTTP,
    404: Code.PATH_NOT_FOUND,
    405: Code.METHOD_NOT_ALLOWED,
    408: Code.REQUEST_TIMEOUT,
    431: Code.HEADERS_TOO_LARGE,
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


class OriginRejected(HTTPException):
    """A CORS preflight request that the configured origins do not allow."""

    def __init__(self, detail: str) -> None:
        super().__init__(STATUS[Code.ORIGIN_NOT_ALLOWED], detail)


def problem(error: Exception, path: str, metrics: Metrics) -> BytesResponse:
    """Return the problem document of an error; below `/v2` the error document of the Open Inference Protocol."""
    headers: dict[str, str] = {}
    faults: tuple[errors.Fault, ...] = ()
    if isinstance(error, errors.ServiceError):
        code, detail, faults = error.code, error.detail, error.faults
        status = STATUS[code]
        if isinstance(error, errors.InputRejected):
            metrics.rejected.labels(error.reason).inc()
    elif isinstance(error, HTTPException):
        status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
        code = HTTP_CODES.get(status, Code.INTERNAL_ERROR)
        if isinstance(error, OriginRejected):
            code = Code.ORIGIN_NOT_ALLOWED
    else:
        log.error("unexpected error on %s", path, exc_info=error)
        status, code, detail = (
            500,
            Code.INTERNAL_ERROR,
            "internal error; the log has the stack trace under this request id",
        )
    protocol = path == "/v2" or path.startswith("/v2/")
    if protocol and status == 422:
        status = 400  # the protocol has one status for every wrong request
    headers |= _hints(error, status)
    document: dict[str, Any] = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status}
    document |= {"detail": detail, "code": code}
    if protocol:
        document = {"error": detail}
    elif faults:
        document["errors"] = [{"loc": fault.loc, "msg": fault.msg} for fault in faults]
    elif isinstance(error, errors.Conflict) and error.results is not None:
        document["results"] = error.results
    kind = "application/json" if protocol else "application/problem+json"
    response = BytesResponse(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), status, kind)
    response.raw_headers[:0] = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return response


def _hints(error: Exception, status: int) -> dict[str, str]:
    if isinstance(error, errors.Overloaded):
        return {"Retry-After": str(max(1, round(error.retry_after)))}
    return {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}.get(
        status, {}
    )
