"""Query parameters and small JSON bodies of the API, as msgspec types."""

from typing import Annotated

from msgspec import Meta, Struct

from service.codecs.requests import MAX_NAME_LENGTH, Cycle, EngineId, Temperature

MOST_ENGINES, MOST_TREND, MOST_PERIODS = 1000, 100, 200  # of one answer


class EnginesQuery(Struct, forbid_unknown_fields=True):
    """Which engines, from where."""

    health: Annotated[str | None, Meta(description="Only engines of this class.")] = None
    next: Annotated[str | None, Meta(description="As the page before said.")] = None
    limit: Annotated[int, Meta(ge=1, le=MOST_ENGINES, description="Engines of a page.")] = 100
    running: Annotated[bool, Meta(description="Only engines whose end is not known.")] = False
    since: Annotated[
        str | None,
        Meta(description="Only what changed: the latest answer or the end was told then or later (RFC 3339)."),
    ] = None
    trend: Annotated[
        int,
        Meta(ge=0, le=MOST_TREND, description="Also `trend`: the last class's probability over so many last cycles."),
    ] = 0


class HistoryQuery(Struct, forbid_unknown_fields=True):
    """What of a history."""

    superseded: Annotated[bool, Meta(description="Also predictions that a later one of the same cycle replaced.")] = (
        False
    )
    sensors: Annotated[
        bool, Meta(description="Also how far each sensor is from what is usual in its operating condition.")
    ] = False


class CalibrationQuery(Struct, forbid_unknown_fields=True):
    """Of which time."""

    window: Annotated[str | None, Meta(description="Only predictions made in that time, as 30d; all if absent.")] = None
    periods: Annotated[
        int, Meta(ge=0, le=MOST_PERIODS, description="Also `over_time`: the loss in so many equal parts of the time.")
    ] = 0


class NoQuery(Struct, forbid_unknown_fields=True):
    """Nothing can be asked for."""


class OutcomeRequest(Struct, forbid_unknown_fields=True):
    """The end of an engine: its last cycle, which labels all that was predicted of it."""

    engine_id: EngineId
    failed_at_cycle: Cycle
    revise: Annotated[bool, Meta(description="Replace another end that was given before; it is kept aside.")] = False


class FitRequest(Struct, forbid_unknown_fields=True):
    """A fit of the temperature on truths that have joined."""

    window: Annotated[str | None, Meta(description="Only predictions made in that time, as 30d; all if absent.")] = None


class TemperatureRequest(Struct, forbid_unknown_fields=True):
    """A temperature to put in force: that of a fit, another one, or the one before."""

    fit_id: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH, pattern="^[^\\x00]*$")] | None = None
    temperature: Temperature | None = None
    rollback: bool = False
