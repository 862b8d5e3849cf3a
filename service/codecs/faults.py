"""The wording of faults that several readers find: channels, readings, engines and cycles. Knows no format.

`model/data/telemetry.py` has its own texts: it is below the service, and names a line and a value in the same sentence.
"""

from collections.abc import Collection, Sequence

from service.errors import Fault

Loc = tuple[str | int, ...]
UNKNOWN_CHANNEL = "unknown channel"
MISSING_CHANNEL = "channel is missing"
MISSING = "missing"
TOO_LARGE = "too large for a 32-bit float"
CONTROL_CHARACTERS = "a name may not have control characters"


def missing_reading(option: str) -> str:
    """Return the fault of a reading without a value, where `option` would hold the last one."""
    return f"{MISSING}; {option} would repeat the last seen value"


def wrong_channels(names: Collection[str], channels: Sequence[str], loc: Loc) -> list[Fault]:
    """Return the faults of readings by name: names that are no channels, then channels without a name."""
    unknown = [Fault((*loc, name), UNKNOWN_CHANNEL) for name in names if name not in channels]
    return unknown + [Fault((*loc, name), MISSING_CHANNEL) for name in channels if name not in names]


def wrong_length(most: int, got: object) -> str:
    """Return the fault of a name that is empty or too long."""
    return f"expected 1 to {most} characters, got {got}"


def wrong_count(what: str, got: str) -> str:
    """Return the fault of something other than a list of the expected numbers."""
    return f"expected {what}, got {got}"
