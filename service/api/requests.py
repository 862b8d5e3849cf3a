"""Query parameters and small JSON bodies of the API, as msgspec types."""

from typing import Annotated

from msgspec import Meta, Struct

from service.codecs.requests import MAX_NAME_LENGTH, Cycle, EngineId, Temperature

MAX_ENGINES, MAX_TREND_CYCLES, MAX_PERIODS = 1000, 100, 200  # of one response


class EnginesQuery(Struct, forbid_unknown_fields=True):
    """Parameters of a page of engines."""

    health: Annotated[str | None, Meta(description="Only engines of this class.")] = None
    next: Annotated[str | None, Meta(description="The value of `next` in the previous page.")] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_ENGINES, description="Engines of a page.")] = 100
    running: Annotated[bool, Meta(description="Only engines without a known failure.")] = False
    since: Annotated[
        str | None,
        Meta(description="Only engines whose latest prediction or failure was received then or later (RFC 3339)."),
    ] = None
    trend: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_TREND_CYCLES,
            description="Also `trend`: the last class's probability over this many last cycles.",
        ),
    ] = 0


class HistoryQuery(Struct, forbid_unknown_fields=True):
    """Parameters of a history."""

    superseded: Annotated[bool, Meta(description="Also predictions that a later one of the same cycle replaced.")] = (
        False
    )
    sensors: Annotated[
        bool, Meta(description="Also how far each sensor is from what is usual in its operating condition.")
    ] = False


class CalibrationQuery(Struct, forbid_unknown_fields=True):
    """The time to evaluate."""

    window: Annotated[str | None, Meta(description="Only predictions made in that time, as 30d; all if absent.")] = None
    periods: Annotated[
        int, Meta(ge=0, le=MAX_PERIODS, description="Also `over_time`: the loss in this many equal parts of the time.")
    ] = 0


class NoQuery(Struct, forbid_unknown_fields=True):
    """No parameters."""


class OutcomeRequest(Struct, forbid_unknown_fields=True):
    """The failure of an engine: its last cycle, which labels all predictions of it."""

    engine_id: EngineId
    failed_at_cycle: Cycle
    revise: Annotated[
        bool, Meta(description="Replace a different failure cycle that was given before; the old one is archived.")
    ] = False


class FitRequest(Struct, forbid_unknown_fields=True):
    """A fit of the temperature to joined labels."""

    window: Annotated[str | None, Meta(description="Only predictions made in that time, as 30d; all if absent.")] = None


class TemperatureRequest(Struct, forbid_unknown_fields=True):
    """A temperature to activate: that of a fit, a given one, or the previous one."""

    fit_id: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH, pattern="^[^\\x00]*$")] | None = None
    temperature: Temperature | None = None
    rollback: bool = False
