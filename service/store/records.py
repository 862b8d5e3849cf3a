"""Values that callers give to the store and receive from it. Knows no SQL statement."""

from typing import Any, Literal, NamedTuple

from sqlalchemy import Row

from model.contract import Conformal, Manifest
from model.numerics import Floats

LabelResultKind = Literal["joined", "pending", "unchanged", "revised", "conflict", "unknown"]
PAGE = 100
StoredChange = Row[Any]  # of the table of temperatures


class StoredModel(NamedTuple):
    """A model as its stored predictions need it: to read their logits and to know their truth."""

    id: int
    digest: str
    classes: tuple[str, ...]
    thresholds: tuple[float, ...] | None
    conformal: Conformal | None
    temperature: float  # at which the prediction sets hold


class JoinedLabel(NamedTuple):
    """A prediction whose truth has just become known. Times in seconds since 1970."""

    kind: StoredModel
    logits: bytes
    temperature: float
    label: bytes
    created_at: float
    labelled: float


class LabelSubmission(NamedTuple):
    """One label, of a prediction by its id, or of an engine and a cycle."""

    prediction_id: str | None
    engine_id: str | None
    cycle: int | None
    label: Floats
    revise: bool


class LabelResults(NamedTuple):
    """What became of each label of a request, with the label that stands where it was not applied."""

    results: list[tuple[LabelResultKind, Floats | None]]
    joined: list[JoinedLabel]


class OutcomeResult(NamedTuple):
    """What became of an end; `known` is the one that stands."""

    result: LabelResultKind
    known: int
    labelled: int
    joined: list[JoinedLabel]


class EngineQuery(NamedTuple):
    """Which engines are asked for."""

    health: int | None = None  # only engines of this class
    after: tuple[float, str] | None = None  # risk and engine_id of the last engine of the page before
    limit: int = PAGE
    since: float | None = (
        None  # only engines of which a prediction or the end was told then or later, seconds since 1970
    )
    running: bool = False  # only engines whose end is not known
    trend: int = 0  # also what was predicted of the last so many cycles


class EnginePage(NamedTuple):
    """Some engines, how many there are in all, and whether more follow."""

    rows: list[Row[Any]]
    kinds: dict[int, StoredModel]
    total: int
    more: bool
    trend: list[Row[Any]] | None  # engine, cycle, model, temperature and logits, by engine and cycle


class EngineHistory(NamedTuple):
    """Predictions of one engine, oldest cycle first, and the cycle of its end if that is known."""

    rows: list[Row[Any]]
    kinds: dict[int, StoredModel]
    failed_at: int | None


class CountedPredictions(NamedTuple):
    """Predictions that count, by engine and cycle, so that the order of telling changes no bit of any figure.

    Labels (N, C), NaN where none is. Engines are numbered in the order of their names.
    """

    logits: Floats
    temperature: Floats
    label: Floats
    engine: Any
    created_at: Floats
    labelled: Floats
    source: Any
    feature_bins: bytes  # the reference bins of all predictions that have them, one behind another


class StoredFit(NamedTuple):
    """A fit that is kept; `result` is what was answered, `created_at` in seconds since 1970."""

    id: str
    digest: str
    manifest: Manifest
    created_at: float
    temperature: float
    result: dict[str, Any]


class TemperatureChange(NamedTuple):
    """A change that is asked for: to the temperature of a fit, to another one, or, with neither, back."""

    digest: str
    manifest: Manifest
    fit: str | None
    temperature: float | None
    actor: str
    changed: float


class ActiveTemperature(NamedTuple):
    """The temperature in force, where it comes from, and the number of the change that made it so."""

    change: int
    temperature: float
    source: str
