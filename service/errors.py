"""The tree of errors, each with a code for programs. service/api/problems.py maps codes to HTTP status."""

from enum import StrEnum
from typing import Any, NamedTuple


class Code(StrEnum):
    """The closed list of error codes, described in docs/api.md. Texts may change; a published code never does."""

    MALFORMED_HTTP = "malformed_http"
    MALFORMED_JSON = "malformed_json"
    MALFORMED_ARROW = "malformed_arrow"
    CLIENT_DISCONNECTED = "client_disconnected"
    ORIGIN_NOT_ALLOWED = "origin_not_allowed"
    API_KEY_MISSING = "api_key_missing"
    API_KEY_UNKNOWN = "api_key_unknown"
    NOT_ADMIN = "not_admin"
    ADMIN_DISABLED = "admin_disabled"
    PATH_NOT_FOUND = "path_not_found"
    RECORD_NOT_FOUND = "record_not_found"
    MODEL_NOT_FOUND = "model_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    ARTEFACT_REJECTED = "artefact_rejected"
    CONFLICT = "conflict"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_VALUE = "invalid_value"
    OVERLOADED = "overloaded"
    HEADERS_TOO_LARGE = "headers_too_large"
    INTERNAL_ERROR = "internal_error"
    STORE_NOT_CONFIGURED = "store_not_configured"
    STORE_UNAVAILABLE = "store_unavailable"
    NOT_READY = "not_ready"
    DRAINING = "draining"


class Fault(NamedTuple):
    """One wrong value: its place, as a path of field names and indices, and what is wrong."""

    loc: tuple[str | int, ...]
    msg: str


class ServiceError(Exception):
    """The root. `code` is for programs, `detail` is one sentence for a person, `faults` name the invalid fields."""

    code = Code.INTERNAL_ERROR

    def __init__(self, detail: str, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.faults = faults


class SettingsRejected(ServiceError):
    """A setting that cannot be used; the service does not start."""


class ArtefactRejected(ServiceError):
    """A file that is not a model, or whose outputs differ from those in its manifest."""

    code = Code.ARTEFACT_REJECTED


class InputRejected(ServiceError):
    """The root of errors that the caller can correct; `reason` labels them in the metrics."""

    code = Code.INVALID_VALUE
    reason = "invalid"


class InvalidInput(InputRejected):
    """A well-formed request with an invalid value."""


class MalformedJson(InputRejected):
    """A body that is not JSON."""

    code = Code.MALFORMED_JSON
    reason = "not_json"


class MalformedArrow(InputRejected):
    """A body that is not a valid Arrow stream."""

    code = Code.MALFORMED_ARROW
    reason = "not_arrow"


class UnsupportedMediaType(InputRejected):
    """A content type that the call does not support."""

    code = Code.UNSUPPORTED_MEDIA_TYPE
    reason = "unsupported_media_type"


class BodyTooLarge(InputRejected):
    """More bytes than the limit."""

    code = Code.BODY_TOO_LARGE
    reason = "too_large"


class ClientDisconnected(InputRejected):
    """The client disconnected before its body was complete; the response is not received."""

    code = Code.CLIENT_DISCONNECTED
    reason = "client_gone"


class Overloaded(InputRejected):
    """More work than the service can do in time."""

    code = Code.OVERLOADED
    reason = "overloaded"

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after  # seconds


class RequestTimeout(InputRejected):
    """The body did not arrive in time."""

    code = Code.REQUEST_TIMEOUT
    reason = "too_slow"


class Unauthorized(InputRejected):
    """The root of requests without a valid API key."""

    reason = "unauthorized"


class ApiKeyMissing(Unauthorized):
    """A request without an API key."""

    code = Code.API_KEY_MISSING


class ApiKeyUnknown(Unauthorized):
    """A request with an API key that is not configured."""

    code = Code.API_KEY_UNKNOWN


class Forbidden(InputRejected):
    """The root of rejected admin calls."""

    reason = "forbidden"


class NotAdmin(Forbidden):
    """An admin call with an API key that is valid for other calls only."""

    code = Code.NOT_ADMIN


class AdminDisabled(Forbidden):
    """An admin call to a service without admin keys."""

    code = Code.ADMIN_DISABLED


class UnknownModel(InputRejected):
    """A model or version that is not the one served."""

    code = Code.MODEL_NOT_FOUND
    reason = "unknown_model"


class StoreUnavailable(ServiceError):
    """The database cannot be reached, is locked or is full; nothing of the request is stored."""

    code = Code.STORE_UNAVAILABLE


class StoreNotConfigured(ServiceError):
    """The service is stateless: no database is configured."""

    code = Code.STORE_NOT_CONFIGURED


class SchemaRejected(StoreUnavailable):
    """A database with an unknown schema; the service does not start with it."""


class Conflict(InputRejected):
    """A request that contradicts stored data; `results` shows both, row by row."""

    code = Code.CONFLICT
    reason = "conflict"

    def __init__(self, detail: str, results: Any = None) -> None:
        super().__init__(detail)
        self.results = results


class NotFound(InputRejected):
    """A record that is not stored."""

    code = Code.RECORD_NOT_FOUND
    reason = "unknown"


class NotReady(ServiceError):
    """No model is verified yet."""

    code = Code.NOT_READY


class Draining(NotReady):
    """The process is shutting down and accepts no new work."""

    code = Code.DRAINING
