"""What can go wrong, as one small tree without HTTP; `service.api.app` maps it to status codes in one table."""

from typing import Any, NamedTuple


class Fault(NamedTuple):
    """One wrong value: where it stands, as the path of field names and indices, and what is wrong with it."""

    loc: tuple[str | int, ...]
    msg: str


class ServiceError(Exception):
    """The root. `detail` is one sentence for a person, `faults` name the places at fault."""

    def __init__(self, detail: str, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.faults = faults


class SettingsRejected(ServiceError):
    """A setting that cannot be used; the service does not start."""


class ArtefactRejected(ServiceError):
    """A file that is not a model, or does not answer as it says it does."""


class InputRejected(ServiceError):
    """The root of everything that is the caller's to mend; `reason` labels it in the metrics."""

    reason = "invalid"


class InvalidInput(InputRejected):
    """Well-formed, but a value is wrong."""


class NotJson(InputRejected):
    """A body that no JSON parser accepts."""

    reason = "not_json"


class NotArrow(InputRejected):
    """A body that is no Arrow stream, or one with a trap in it."""

    reason = "not_arrow"


class UnsupportedMediaType(InputRejected):
    """A content type that this call does not read."""

    reason = "unsupported_media_type"


class BodyTooLarge(InputRejected):
    """More bytes than the limit."""

    reason = "too_large"


class ClientGone(InputRejected):
    """The client left before its body was whole; nobody hears the answer."""

    reason = "client_gone"


class Overloaded(InputRejected):
    """More is asked for than can be answered in time."""

    reason = "overloaded"

    def __init__(self, detail: str, retry_after: float) -> None:
        super().__init__(detail)
        self.retry_after = retry_after  # seconds


class TooSlow(InputRejected):
    """The body did not arrive in time."""

    reason = "too_slow"


class Unauthorized(InputRejected):
    """No key, or one that is not known."""

    reason = "unauthorized"


class Forbidden(InputRejected):
    """A key that is known, and does not open this door."""

    reason = "forbidden"


class UnknownModel(InputRejected):
    """A model or version that is not the one served."""

    reason = "unknown_model"


class MemoryUnavailable(ServiceError):
    """The database cannot be reached, is locked or is full; nothing of what was asked is kept."""


class NoMemory(ServiceError):
    """The service is stateless: no database is configured."""


class SchemaRejected(MemoryUnavailable):
    """A database that this code does not understand; a service that finds it at its start does not start."""


class Conflict(InputRejected):
    """What was said contradicts what is known; `results` shows both, row by row."""

    reason = "conflict"

    def __init__(self, detail: str, results: Any = None) -> None:
        super().__init__(detail)
        self.results = results


class Unknown(InputRejected):
    """Something that was never remembered."""

    reason = "unknown"


class NotReady(ServiceError):
    """No model has proved itself yet."""
