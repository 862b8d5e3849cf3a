"""Values that callers pass to the store and receive from it. Contains no SQL statement."""

from typing import Any, Literal, NamedTuple

from sqlalchemy import Row

from model.contract import Conformal, Manifest
from model.numerics import Floats

LabelResultKind = Literal["joined", "pending", "unchanged", "revised", "conflict", "unknown"]
PAGE = 100
StoredChange = Row[Any]  # of the table of temperatures


class StoredModel(NamedTuple):
    """The fields of a model that are needed to read the logits of its stored predictions and to label them."""

    id: int
    digest: str
    classes: tuple[str, ...]
    thresholds: tuple[float, ...] | None
    conformal: Conformal | None
    temperature: float  # at which the prediction sets hold


class JoinedLabel(NamedTuple):
    """A prediction that has just received its label. Times are in seconds since 1970."""

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
    """The result of each label of a request, with the stored label after a conflict, and newly labelled predictions."""

    results: list[tuple[LabelResultKind, Floats | None]]
    joined: list[JoinedLabel]


class OutcomeResult(NamedTuple):
    """The result of a submitted failure. `failed_at` is the stored failure cycle, also after a conflict."""

    result: LabelResultKind
    failed_at: int
    labelled: int
    joined: list[JoinedLabel]


class EngineQuery(NamedTuple):
    """Filter, page and details of a list of engines."""

    health: int | None = None  # only engines of this class
    after: tuple[float, str] | None = None  # risk and engine_id of the last engine of the page before
    limit: int = PAGE
    since: float | None = None  # only engines with a prediction or failure of this time or later, seconds since 1970
    running: bool = False  # only engines without a known failure
    trend: int = 0  # number of newest cycles whose predictions are included


class EnginePage(NamedTuple):
    """One page of engines, the number of all engines, and whether more follow."""

    rows: list[Row[Any]]
    kinds: dict[int, StoredModel]
    total: int
    has_more: bool
    trend: list[Row[Any]] | None  # engine, cycle, model, temperature and logits, by engine and cycle


class EngineHistory(NamedTuple):
    """Predictions of one engine, oldest cycle first, and its failure cycle if that is known."""

    rows: list[Row[Any]]
    kinds: dict[int, StoredModel]
    failed_at: int | None


class CountedPredictions(NamedTuple):
    """The predictions that statistics use, in order of engine and cycle.

    Statistics therefore do not depend on the order of arrival. Labels are (N, C), rows of NaN without a label. Engines
    are numbered in the order of their names.
    """

    logits: Floats
    temperature: Floats
    label: Floats
    engine: Any
    created_at: Floats
    labelled: Floats
    source: Any
    feature_bins: bytes  # concatenated reference bins of all predictions that have them


class StoredFit(NamedTuple):
    """A stored fit. `result` is the response of the call, `created_at` is in seconds since 1970."""

    id: str
    digest: str
    manifest: Manifest
    created_at: float
    temperature: float
    result: dict[str, Any]


class TemperatureChange(NamedTuple):
    """A requested change: to the temperature of a fit, to a given temperature, or with neither to the previous one."""

    digest: str
    manifest: Manifest
    fit: str | None
    temperature: float | None
    actor: str
    changed: float


class ActiveTemperature(NamedTuple):
    """The active temperature, its source, and the number of the change that activated it."""

    change: int
    temperature: float
    source: str
