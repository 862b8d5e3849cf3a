"""Request bodies as types; the OpenAPI document is generated from them.

Numbers of telemetry and logits stay raw JSON here (`msgspec.Raw`) and are decoded straight into arrays by `instances`.
"""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from model.contract import CHANNELS
from model.numerics import MAX_TEMPERATURE, MIN_TEMPERATURE

_READINGS = {"type": "array", "items": {"type": "number"}}
EXAMPLE_ROW = [
    0.0,
    0.0,
    100.0,
    642.3,
    1587.0,
    1400.0,
    553.9,
    2388.1,
    9055.0,
    47.4,
    521.9,
    2388.0,
    8132.0,
    8.42,
    392.0,
    39.0,
    23.4,
]
Telemetry = Annotated[
    Raw,
    Meta(
        description="Rows, oldest first, with one value per channel in the order of the manifest; or an object with a "
        "list of values per channel. Fewer rows than the window are padded with the oldest. Of more rows, the newest "
        "are used.",
        extra_json_schema={
            "anyOf": [
                {"type": "array", "minItems": 1, "items": {"type": "array", "items": {"type": ["number", "null"]}}},
                {"type": "object", "additionalProperties": {"type": "array", "items": {"type": ["number", "null"]}}},
            ],
            "examples": [[EXAMPLE_ROW], {name: [value] for name, value in zip(CHANNELS, EXAMPLE_ROW, strict=True)}],
        },
    ),
]
MAX_NAME_LENGTH = 200  # characters of an engine's id
MAX_CYCLE = 2**53  # beyond it JSON numbers are not exact
Label = str | int | list[float]
Temperature = Annotated[float, Meta(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="Divides the logits.")]
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")  # rejected in engine ids: no URL path can contain them
_PRINTED = "^[^\\x00-\\x1f\\x7f]*$(?!\\n)"  # `(?!\n)`: in Python `$` also matches before a final newline
EngineId = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH, pattern=_PRINTED)]
Cycle = Annotated[int, Meta(ge=0, le=MAX_CYCLE)]


class Instance(Struct, forbid_unknown_fields=True):
    """The history of one engine up to one cycle."""

    telemetry: Telemetry
    engine_id: EngineId | None = None
    cycle: Cycle | None = None
    label: Annotated[Label | None, Meta(description="Class name, class index, or a probability for each class.")] = None


class PredictOptions(Struct, forbid_unknown_fields=True):
    """Options of a prediction, for all its instances; in the query if the body is a table."""

    temperature: Annotated[Temperature | None, Meta(description="In place of the active one, for this call.")] = None
    missing: Annotated[
        Literal["reject", "hold"], Meta(description="Treatment of null readings: reject them, or hold the last value.")
    ] = "reject"
    explain: Annotated[
        bool, Meta(description="Also rank the channels by their effect on each prediction; takes one more batch.")
    ] = False


class PredictRequest(PredictOptions, kw_only=True, forbid_unknown_fields=True):
    """Telemetry to predict from; with labels the response has the loss."""

    instances: Annotated[list[Instance], Meta(min_length=1)]


class EvaluateRequest(Struct, forbid_unknown_fields=True):
    """Logits and labels to evaluate; nothing is stored or counted.

    Labels by name are those of the model that answers, if it has as many classes as a row has logits.
    """

    logits: Annotated[
        Raw, Meta(extra_json_schema={"type": "array", "minItems": 1, "items": {**_READINGS, "minItems": 1}})
    ]
    labels: Annotated[list[Label], Meta(min_length=1)]
    temperature: Annotated[Temperature | None, Meta(description="1.0 if not given.")] = None
    class_weights: Annotated[list[float] | None, Meta(description="As torch's cross_entropy(weight=...).")] = None


class Flight(Struct, forbid_unknown_fields=True):
    """The readings of one engine at one cycle."""

    engine_id: EngineId
    cycle: Cycle
    telemetry: Annotated[
        Raw,
        Meta(
            description="One value a channel in the manifest's order; or an object of channel name to value.",
            extra_json_schema={"anyOf": [_READINGS, {"type": "object", "additionalProperties": {"type": "number"}}]},
        ),
    ]


class CyclesRequest(Struct, forbid_unknown_fields=True):
    """Flights of a data collector, one row each."""

    cycles: Annotated[list[Flight], Meta(min_length=1)]


class LabelRow(Struct, forbid_unknown_fields=True):
    """The label of one prediction, identified by its id or by engine and cycle."""

    label: Annotated[Label, Meta(description="Class name, class index, or a probability for each class.")]
    prediction_id: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_LENGTH, pattern="^[^\\x00]*$")] | None = None
    engine_id: EngineId | None = None
    cycle: Cycle | None = None
    revise: Annotated[bool, Meta(description="Replace a different stored label; the old one is archived.")] = False


class LabelsRequest(Struct, forbid_unknown_fields=True):
    """Labels that arrive after their predictions."""

    labels: Annotated[list[LabelRow], Meta(min_length=1)]
    revise: Annotated[bool, Meta(description="Applies to every row.")] = False


class Tensor(Struct):
    """An input: a shape, and its numbers as JSON or, with `binary_data_size`, as binary data after the JSON."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Annotated[Raw, Meta(extra_json_schema={"type": "array"})] | msgspec.UnsetType = msgspec.UNSET


class RequestedOutput(Struct):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(Struct):
    """The JSON of an inference request."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: dict[str, Any] = {}
    outputs: list[RequestedOutput] | None = None
