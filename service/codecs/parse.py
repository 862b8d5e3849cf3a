"""Parse JSON bodies and query strings into request types, and locate the first fault."""

import re
from collections import Counter
from typing import TypeVar

import msgspec
from msgspec import Struct

from service.codecs.faults import invalid_input
from service.codecs.requests import MAX_NAME_LENGTH
from service.errors import Fault, InvalidInput, MalformedJson

Body = TypeVar("Body", bound=Struct)
_ERROR_PATH = re.compile(r"^(.*?)(?: - at `\$(.*)`)?$", re.DOTALL)
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
_UNKNOWN_FIELD = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)


def parse(body: bytes | memoryview, kind: type[Body]) -> Body:
    """Return a request body as its type.

    Raises:
        MalformedJson: the body is not JSON, or nested too deeply.
        InvalidInput: JSON of another shape, with the first place.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _check_json(body)  # the decoder stops at the first value of a wrong type
        raise _validation_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(f"the body is not JSON: {error}" if body else "the body is empty") from None
    except RecursionError:
        raise MalformedJson("the body is nested too deeply") from None


def parse_query(query: list[tuple[str, str]], kind: type[Body]) -> Body:
    """Return the parameters of a query as a type.

    Raises:
        InvalidInput: a parameter that is unknown, a duplicate, or has a value of another type.
    """
    duplicates = [name[:80] for name, n in Counter(name for name, _ in query).items() if n > 1]
    if duplicates:
        message = f"duplicate query parameter {duplicates[0]}"
        raise InvalidInput(message, (Fault((duplicates[0],), message),))
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _validation_error(error) from None


def _validation_error(error: msgspec.ValidationError) -> InvalidInput:
    match = _ERROR_PATH.match(str(error))
    message, path = match.groups() if match else (str(error), None)
    loc = tuple(name or int(index) for name, index in _PATH_STEP.findall(path or ""))
    unknown = _UNKNOWN_FIELD.match(message)
    if unknown:
        loc, message = (*loc, unknown[1][:MAX_NAME_LENGTH]), "unknown field"
    return invalid_input(loc, message)


def _check_json(body: bytes | memoryview) -> None:
    """Reject a body that is not JSON as a whole. No objects are created: many small ones take a gigabyte.

    Raises:
        MalformedJson: the body is not JSON, or nested too deeply.
    """
    try:
        str(body, "utf-8")  # `Raw` checks the syntax only, not the encoding; numbers of any size pass
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise MalformedJson("the body is nested too deeply") from None
