"""Wording and raising of faults in requests: channels, readings, engines and cycles. Independent of the format.

`model/data/telemetry.py` has its own texts: it is below the service, and names a line and a value in one sentence.
"""

from collections.abc import Collection, Sequence

from service.errors import Fault, InvalidInput

Loc = tuple[str | int, ...]
UNKNOWN_CHANNEL = "unknown channel"
MISSING_CHANNEL = "channel is missing"
MISSING = "missing"
TOO_LARGE = "too large for a 32-bit float"
CONTROL_CHARACTERS = "a name may not have control characters"
MAX_FAULTS = 20  # of one request; more would not help to correct it


def missing_reading(option: str) -> str:
    """Return the fault of a reading without a value, where `option` would hold the last one."""
    return f"{MISSING}; {option} would repeat the last seen value"


def wrong_channels(names: Collection[str], channels: Sequence[str], loc: Loc) -> list[Fault]:
    """Return the faults of readings by name: names that are no channels, then channels without a name."""
    unknown = [Fault((*loc, name), UNKNOWN_CHANNEL) for name in names if name not in channels]
    return unknown + [Fault((*loc, name), MISSING_CHANNEL) for name in channels if name not in names]


def unknown_class(name: str, classes: Sequence[str]) -> str:
    """Return the fault of a class name that the model does not have."""
    return f"unknown class {name[:50]!r}; classes are {', '.join(classes[:20])}"


def wrong_length(max_length: int, got: object) -> str:
    """Return the fault of a name that is empty or too long."""
    return f"expected 1 to {max_length} characters, got {got}"


def wrong_count(expected: str, got: str) -> str:
    """Return the fault of something other than a list of the expected numbers."""
    return f"expected {expected}, got {got}"


def refuse(faults: list[Fault]) -> None:
    """Raise if there are faults; the detail is the first of them.

    Raises:
        InvalidInput: there is at least one fault.
    """
    if faults:
        raise InvalidInput(f"{describe(faults[0].loc)}: {faults[0].msg}", tuple(faults[:MAX_FAULTS]))


def invalid_input(loc: Loc, message: str) -> InvalidInput:
    """Return the error of one fault."""
    return InvalidInput(f"{describe(loc)}: {message}", (Fault(loc, message),))


def check_row_count(field: str, rows: int, max_rows: int) -> None:
    """Reject more rows than the limit of one call.

    Raises:
        InvalidInput: more than `max_rows` rows.
    """
    if rows > max_rows:
        raise invalid_input((field,), f"{rows} rows, at most {max_rows} are taken in one call")


def describe(loc: Loc) -> str:
    """Return a location in readable form: `instances[0].telemetry[3].sensor_4`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".") or "body"
