"""Metrics of inference: what the batcher reports of each batch and request. Independent of HTTP and of the queue."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from service.inference.batcher import BatchSlice, Rows
from service.inference.drift_bins import DriftBins
from service.inference.onnx_model import Model
from service.inference.predictions import BatchPredictions, concatenate_slices, select_rows
from service.metrics import Metrics, observe, observe_all

CountedRows = Sequence[tuple[Rows, Sequence[BatchSlice[BatchPredictions]]]]


class BatchObserver:
    """Counts the batches and predictions of one model at one temperature, as `batcher.Observer` requires."""

    def __init__(self, model: Model, metrics: Metrics, bins: DriftBins) -> None:
        self._model, self._metrics, self._bins = model, metrics, bins

    def serve(self, temperature: float) -> None:
        """Publish in the metrics that this model serves from now on."""
        manifest = self._model.manifest
        self._series = self._metrics.serving(
            manifest.name, manifest.version, self._model.digest, manifest.classes, temperature, self._bins.widths
        )

    def batch(self, rows: int, seconds: float, waits: list[float], completed: CountedRows) -> None:
        """Record one inference, the queue times of the requests that start in it, and completed predictions."""
        if completed:
            self.count(completed)
        self._metrics.batch(rows, seconds)
        if len(waits) == 1:
            observe(self._metrics.queue_duration, waits[0])
        elif waits:
            observe_all(self._metrics.queue_duration, np.array(waits))

    def count(self, completed: CountedRows) -> None:
        """Count predictions. Only the newest row of a window is new: the others were counted before."""
        if len(completed) == 1 and len(completed[0][1]) == 1:
            (rows, (piece,)) = completed[0]
            predictions, finite = piece.output.answers, piece.output.finite
            if piece.end - piece.begin < len(predictions.logits):
                predictions = select_rows(predictions, slice(piece.begin, piece.end))
            newest = rows if rows.ndim == 2 else rows[:, -1]
        else:
            slices = [piece for _, some in completed for piece in some]
            predictions, finite = concatenate_slices(slices), all(piece.output.finite for piece in slices)
            newest = np.concatenate([rows if rows.ndim == 2 else rows[:, -1] for rows, _ in completed])
        if not finite:
            which = np.flatnonzero(predictions.finite)
            newest, predictions = newest[which], select_rows(predictions, which)
        single: list[int] = []
        if len(newest) == 1:  # binned and counted one by one, which is faster for one
            values = newest[0].tolist()
            for column, edges in self._bins.columns:
                single.append(bisect_left(edges, values[column]))
        confidence = predictions.probabilities.max(axis=1)
        self._metrics.answers(self._series, predictions.logits.argmax(axis=1), confidence, predictions.expected_loss)
        if single:
            self._metrics.input(self._series, single)
        elif self._bins.channels:
            self._metrics.inputs(self._series, self._bins.bins(newest))
