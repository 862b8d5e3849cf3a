"""Response bodies as msgspec types. Only the OpenAPI document is generated from them; codecs write the bytes."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from service.errors import Code


class ModelName(Struct):
    """The model of a response."""

    name: str
    version: str
    digest: str


class AttributionBody(Struct):
    """The effect of one channel on a prediction: without it, the distribution would be `shift` (0..1) away."""

    channel: str
    shift: float
    toward: str
    rul: float | msgspec.UnsetType = msgspec.UNSET


class PredictionBody(Struct):
    """The prediction of one instance. Losses are in nats, RUL in cycles."""

    prediction_id: Annotated[str | None, Meta(description="None if it could not be stored.")]
    engine_id: str | None
    cycle: int | None
    health: str
    probabilities: dict[str, float]
    logits: list[float]
    expected_loss: float
    loss: float | None
    rul: float | msgspec.UnsetType = msgspec.UNSET
    prediction_set: list[str] | msgspec.UnsetType = msgspec.UNSET
    explanation: list[AttributionBody] | msgspec.UnsetType = msgspec.UNSET


class RowResultBody(Struct):
    """The result of one row."""

    result: Literal["joined", "pending", "unchanged", "revised", "conflict", "unknown"]
    given: Any = msgspec.UNSET
    known: Any = msgspec.UNSET


class CyclesResponse(Struct):
    """One prediction for each flight, in their order; none for one that contradicts the stored flight of its cycle."""

    model: ModelName
    temperature: float
    temperature_source: Literal["artefact", "fit", "request"]
    predictions: list[PredictionBody | None]
    evaluation: None
    results: list[RowResultBody]


class LabelsResponse(Struct):
    """The result of each label, in their order."""

    results: list[RowResultBody]


class OutcomeResponse(Struct):
    """The result of an outcome, and the number of predictions that it labelled."""

    engine_id: str
    failed_at_cycle: int
    result: Literal["joined", "pending", "unchanged", "revised"]
    labelled: int


class EngineBody(Struct):
    """The latest health of an engine."""

    engine_id: str
    cycle: int | None
    health: str
    probabilities: dict[str, float]
    rul: float | None
    prediction_set: list[str] | None
    updated_at: str
    failed_at_cycle: Annotated[int | None, Meta(description="Its failure, if known.")]
    trend: Annotated[
        list[tuple[int, float]] | msgspec.UnsetType, Meta(description="Cycle and probability of the last class.")
    ] = msgspec.UNSET


class EnginesResponse(Struct):
    """A page of engines, worst first; `next` is the cursor of the next page, null on the last page."""

    engines: list[EngineBody]
    total: int
    next: str | None


class StoredPredictionBody(Struct):
    """A stored prediction, and its label if known."""

    prediction_id: str
    cycle: int | None
    made_at: str
    model: str
    temperature: float
    temperature_source: str
    is_latest: bool
    health: str
    probabilities: dict[str, float]
    logits: list[float]
    rul: float | None
    prediction_set: list[str] | None
    expected_loss: float
    label: str | dict[str, float] | None
    source: Literal["inspection", "outcome", "survival"] | None
    labelled_at: str | None
    loss: float | None


class SensorBody(Struct):
    """The deviation of one sensor from its baseline at the operating condition of each flight, in physical units.

    `shift` is the mean of the last flights, in standard deviations from flight to flight.
    """

    channel: str
    shift: float | None
    deviations: list[float]


class SensorsBody(Struct):
    """The newest stored flights: their cycles, rising, and each sensor, the largest shift first."""

    cycles: list[int]
    channels: list[SensorBody]


class HistoryResponse(Struct):
    """All predictions of an engine, oldest cycle first, and its failure if known."""

    engine_id: str
    failed_at_cycle: int | None
    history: list[StoredPredictionBody]
    sensors: Annotated[
        SensorsBody | msgspec.UnsetType | None, Meta(description="null if the manifest of the model has no baselines.")
    ] = msgspec.UNSET


class EvaluationBody(Struct):
    """Means over the labelled instances."""

    count: int
    cross_entropy: float
    expected_cross_entropy: float
    accuracy: float
    brier: float


class PredictResponse(Struct):
    """One prediction for each instance, in their order."""

    model: ModelName
    temperature: float
    temperature_source: Literal["artefact", "fit", "request"]
    predictions: list[PredictionBody]
    evaluation: EvaluationBody | None
    results: Annotated[
        list[RowResultBody | None] | msgspec.UnsetType,
        Meta(description="Only if a label contradicts an earlier one and was rejected: the result of each label."),
    ] = msgspec.UNSET


class WarningBody(Struct):
    """Rows that were evaluated, but are probably a mistake."""

    rows: list[int]
    msg: str


class EvaluateResponse(Struct):
    """Probabilities (N, C) and losses (N,) at the given temperature; means over all rows."""

    count: int
    temperature: float
    probabilities: list[list[float]]
    losses: list[float]
    cross_entropy: float
    accuracy: float
    brier: float
    ece: float
    warnings: list[WarningBody]


class FaultBody(Struct):
    """A location in the request, and what is wrong there."""

    loc: list[str | int]
    msg: str


class Problem(Struct):
    """RFC 9457 problem document."""

    type: str
    title: str
    status: int
    detail: str
    code: Code
    errors: list[FaultBody] | msgspec.UnsetType = msgspec.UNSET


class InferError(Struct):
    """An error of the Open Inference Protocol."""

    error: str
