"""Predictions in the form in which the store accepts them: ids, and plain values per row."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from model.numerics import Floats
from model.windows import Readings
from service.inference.predictions import PredictionResult, Predictions
from service.inference.predictor import Predictor
from service.store.sql.predictions import ModelVersion, NewPrediction


class NamedRow(Protocol):
    """The engine and cycle of a row."""

    @property
    def engine_id(self) -> str | None:
        """Id of the engine, chosen by the client."""

    @property
    def cycle(self) -> int | None:
        """Number of flights since the engine was new."""


class _Values(NamedTuple):
    """Stored values of one prediction."""

    logits: bytes
    rul: float | None
    health: int
    risk: float


def new_predictions(
    predictor: Predictor,
    prediction: PredictionResult,
    rows: Sequence[NamedRow],
    telemetry: Readings,
    ids: Sequence[str],
    targets: Floats | None = None,
) -> list[NewPrediction]:
    """Return the predictions of rows that have an engine, with the label that arrived with each of them."""
    which, values = list[int](), list[_Values]()
    for i, named in enumerate(rows):
        if named.engine_id is not None:
            which.append(i)  # a comprehension is a frame of every request
    for piece in prediction.pieces:
        stored = piece.output.derived.get(_values)
        if stored is None:
            stored = piece.output.derived[_values] = _values(piece.output.answers)
        values += stored[piece.begin : piece.end]
    inputs = _inputs(predictor, telemetry, which)
    labelled = None if targets is None else ~np.isnan(targets[:, 0])
    predictions = []
    for i, bins in zip(which, inputs, strict=True):
        row, (logits, rul, health, risk) = rows[i], values[i]
        label = targets[i] if targets is not None and labelled is not None and labelled[i] else None
        assert row.engine_id is not None  # `which` has only such rows
        predictions.append(NewPrediction(ids[i], row.engine_id, row.cycle, logits, rul, health, risk, label, bins))
    return predictions


def model_version(predictor: Predictor) -> ModelVersion:
    """Return the model and temperature of a predictor, as stored with its predictions."""
    model = predictor.model
    return ModelVersion(model.digest, model.manifest, predictor.temperature, predictor.temperature_source)


def _values(answers: Predictions) -> list[_Values]:
    """Return the stored values of every row of a batch, computed once for all requests of the batch."""
    n, width = answers.logits.shape
    raw, size = answers.logits.tobytes(), width * answers.logits.itemsize
    rul = [None] * n if answers.rul is None else answers.rul.tolist()
    top, risk = answers.logits.argmax(axis=1).tolist(), answers.probabilities[:, -1].tolist()
    return [_Values(raw[i * size : (i + 1) * size], rul[i], top[i], risk[i]) for i in range(n)]


def _inputs(predictor: Predictor, telemetry: Readings, which: Sequence[int]) -> Sequence[bytes | None]:
    """Return the reference bins of the newest reading of some rows, one byte per channel."""
    bins = predictor.drift_bins
    if not bins.storable or not which:
        return [None] * len(which)
    newest = telemetry if telemetry.ndim == 2 else telemetry[:, -1]
    if len(which) == 1:
        return [bytes(bins.bins_of_one(newest[which[0]]))]
    return [row.tobytes() for row in bins.bins(newest[which])]
