"""Turn telemetry, and labels if known, into calibrated predictions and their loss. Independent of HTTP and JSON.

A predictor is one model at one temperature, and never changes. A reload or another temperature creates another
predictor. A request that holds a predictor is answered by one model throughout.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation.occlusion import ConditionBaselines, attribute_channels, occlude_channels
from model.numerics import Floats
from service.errors import Fault, InvalidInput
from service.inference.admission import Admission, Ticket
from service.inference.batcher import Batcher, Rows
from service.inference.drift_bins import DriftBins
from service.inference.label_scores import score_labelled_rows
from service.inference.observer import BatchObserver
from service.inference.onnx_model import Batch, Model
from service.inference.predictions import (
    BatchPredictions,
    Evaluation,
    PredictionResult,
    Predictions,
    PredictionSlices,
    as_slices,
    calibrate,
    calibrate_outputs,
    concatenate_slices,
    select_range,
)
from service.metrics import Labelled, Metrics
from service.settings import Settings

FLOAT32_MAX = float(np.finfo(np.float32).max)  # predictions are sent as float32; a loss may exceed it
MAX_LOOP_NUMBERS = 2**14  # probabilities of one call; above it they are processed outside of the event loop


class Predictor:
    """One model at one temperature behind its queue."""

    def __init__(
        self, model: Model, metrics: Metrics, settings: Settings, tempered: tuple[float, str] | None = None
    ) -> None:
        self.model = model
        self.temperature, self.temperature_source = tempered or (model.manifest.temperature, "artefact")
        self.drift_bins = DriftBins(model.manifest, model.input_shape)
        self._metrics = metrics
        conditions = model.manifest.conditions
        self._usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual) if conditions else None
        self._observer = BatchObserver(model, metrics, self.drift_bins)
        self._batcher = Batcher(
            self._run, self._observer, settings.max_batch_rows, settings.max_queue_rows, settings.max_queue_seconds
        )
        self._admission = Admission(self._batcher, settings.max_queue_seconds)
        self.admit: Callable[[int], Ticket] = self._admission.admit

    def serve(self) -> None:
        """Publish in the metrics that this predictor serves from now on."""
        self._observer.serve(self.temperature)

    async def close(self) -> None:
        """Answer every admitted request, then stop the inference thread."""
        await self._batcher.close()

    async def predict(
        self,
        telemetry: Batch,
        targets: Floats | None = None,
        temperature: float | None = None,
        imputed: npt.NDArray[np.int64] | None = None,
        gone: Callable[[], bool] = lambda: False,
        explain: bool = False,
        counted: bool = True,
    ) -> PredictionResult:
        """Return calibrated predictions for N instances. Labels are scored; `LabelAccounting` counts them.

        Args:
            telemetry: (N, *input_shape) float32, finite, windows already padded.
            targets: (N, C) distributions over the classes, a row of NaN where no label is known.
            temperature: replaces the active one for this call.
            imputed: (channels,) number of missing values that were held, for the metrics.
            gone: returns whether the client has disconnected; rows of such a client do not reach the model.
            explain: also attribute each prediction to channels, at the cost of one inference row per channel for each
                instance; only for a model whose manifest has `conditions`.
            counted: count the predictions in the metrics now; otherwise the caller calls `count` once they are stored.

        Raises:
            InvalidInput: an instance for which the output of the network is not finite.
            Overloaded: the queue is full, or these rows waited too long.
            ClientDisconnected: the client disconnected before its rows were taken.
        """
        n, rows = len(telemetry), await self._with_occluded(telemetry) if explain else telemetry
        pieces: PredictionSlices = await self._batcher.submit(
            rows, gone, self._admission.shedder.other_delay, n if counted else 0
        )
        for piece in pieces:
            if not piece.output.finite:
                _check_finite(pieces, n)
        if imputed is not None:
            self._metrics.imputed(self.model.manifest.channel_names, imputed)
        t = self.temperature if temperature is None else temperature
        if not explain and targets is None and t == self.temperature:
            return PredictionResult(t, pieces)
        predictions = concatenate_slices(pieces)
        own = select_range(predictions, 0, n)
        if own.logits.size > MAX_LOOP_NUMBERS:
            prediction = await asyncio.to_thread(self._scored, own, targets, t)
        else:
            prediction = self._scored(own, targets, t)
        return await asyncio.to_thread(_explain, predictions, prediction) if explain else prediction

    def count(self, newest: Rows, slices: PredictionSlices) -> None:
        """Count predictions in the metrics. `newest` (N, channels) has the newest readings of each."""
        self._observer.count([(newest, slices)])

    def _scored(self, answers: Predictions, targets: Floats | None, t: float) -> PredictionResult:
        """Return the result at temperature `t`, with losses. Labels are scored at the active temperature as well."""
        labelled = None if targets is None else score_labelled_rows(answers, targets, self.temperature)
        if t != self.temperature:
            answers = calibrate(self.model, answers.logits, answers.rul, answers.finite, t)
            answered = None if targets is None else score_labelled_rows(answers, targets, t)
        else:
            answered = labelled
        if targets is None or answered is None:
            return PredictionResult(t, as_slices(answers))
        loss = np.full(len(targets), np.nan)
        loss[~np.isnan(targets[:, 0])] = np.minimum(answered.loss, FLOAT32_MAX)
        return PredictionResult(t, as_slices(answers), loss, _evaluate(answered), labelled=labelled)

    async def _with_occluded(self, telemetry: Batch) -> Batch:
        """Return the instances, followed by each of them once per channel with that channel occluded."""
        usual = self._usual
        assert usual is not None  # decoding rejects the request if the model has no `conditions`
        rows = len(telemetry) * (1 + telemetry.shape[-1])
        self._batcher.check_capacity(rows, self._admission.shedder.other_delay)
        return await asyncio.to_thread(
            lambda: np.concatenate([telemetry, *(occlude_channels(window, usual) for window in telemetry)])
        )

    def _run(self, rows: Rows) -> BatchPredictions:
        if not rows.flags.aligned:  # a tensor that follows a header of any length
            rows = rows.copy()
        predictions = calibrate_outputs(self.model, self.model.run(rows), self.temperature)
        return BatchPredictions(predictions, bool(predictions.finite.all()))


def _evaluate(labelled: Labelled) -> Evaluation:
    return Evaluation(
        len(labelled.loss),
        min(float(labelled.loss.mean()), FLOAT32_MAX),
        float(labelled.expected_loss.mean()),
        float(labelled.correct.mean()),
        float(labelled.brier.mean()),
    )


def _explain(occluded: Predictions, prediction: PredictionResult) -> PredictionResult:
    """Attribute predictions to channels. `occluded` has the N rows, then those of each with one channel occluded."""
    answers, n = prediction.answers, len(prediction.answers.logits)
    channels, explanation = (len(occluded.logits) - n) // n, []
    for i in range(n):
        part = slice(n + i * channels, n + (i + 1) * channels)
        without = numerics.softmax(occluded.logits[part], prediction.temperature)
        rul = None if answers.rul is None else float(answers.rul[i])
        explanation.append(
            attribute_channels(
                answers.probabilities[i], rul, without, None if occluded.rul is None else occluded.rul[part]
            )
        )
    return replace(prediction, explanation=explanation)


def _check_finite(pieces: PredictionSlices, n: int) -> None:
    """Reject the first of N instances whose output is not finite. Rows after the first N are of occluded channels."""
    finite = np.concatenate([piece.output.answers.finite[piece.begin : piece.end] for piece in pieces])
    for bad in np.flatnonzero(~finite)[:1].tolist():  # none if that row belongs to another caller
        raise _not_finite(bad if bad < n else (bad - n) * n // (len(finite) - n))


def _not_finite(i: int) -> InvalidInput:
    """Return the error of an instance on which the network overflows."""
    message = "the model has no finite output for these readings"
    return InvalidInput(f"instances[{i}].telemetry: {message}", (Fault(("instances", i, "telemetry"), message),))
