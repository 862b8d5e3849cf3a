"""Counts labelled predictions in the metrics, each exactly once.

A label is counted when it arrives: with its prediction, or later, when it joins a stored prediction. `labellable_total`
counts every prediction that a label can reach: the stored ones of engines, and those that arrived with their label.
"""

from collections.abc import Sequence

import numpy as np

from model.evaluation import conformal
from model.numerics import Floats
from service.inference.label_scores import score_labelled_rows, score_labels
from service.inference.predictions import Mask, PredictionResult
from service.metrics import Metrics, observe_all
from service.store.records import JoinedLabel


class LabelAccounting:
    """The counter of labels in the metrics of one process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def count_submitted(
        self, prediction: PredictionResult, targets: Floats | None, temperature: float, excluded: Mask | None = None
    ) -> None:
        """Count the labels that arrived with a prediction, and these rows as labellable.

        A prediction at a temperature of the request is counted at the active one: the counters describe the service.

        Args:
            prediction: the result of `Predictor.predict` for these targets.
            targets: (N, C) distributions, a row of NaN without a label; None without any label.
            temperature: the active one.
            excluded: (N,) rows whose label is counted where it joins a stored prediction, or not at all.
        """
        labelled = prediction.labelled
        if labelled is not None and targets is not None and excluded is not None and excluded.any():
            targets = np.where(excluded[:, None], np.nan, targets)
            unlabelled = bool(np.isnan(targets[:, 0]).all())
            labelled = None if unlabelled else score_labelled_rows(prediction.answers, targets, temperature)
        if labelled is not None:
            self._metrics.labelled_answers(labelled)
            self._metrics.labellable.inc(len(labelled.loss))

    def count_stored(self, predictions: int) -> None:
        """Count stored predictions as labellable, without those that `count_submitted` counts."""
        self._metrics.labellable.inc(predictions)

    def count_joined(self, joined: Sequence[JoinedLabel]) -> None:
        """Count labels that have just joined stored predictions; those of one model and temperature together."""
        groups: dict[tuple[int, float], list[JoinedLabel]] = {}
        for row in joined:
            groups.setdefault((row.kind.id, row.temperature), []).append(row)
        for (_, temperature), group in groups.items():
            kind = group[0].kind
            logits = np.frombuffer(b"".join(row.logits for row in group), np.float32).reshape(len(group), -1)
            labels = np.frombuffer(b"".join(row.label for row in group)).reshape(len(group), -1)
            rule = kind.conformal
            sets = conformal.prediction_sets(logits, kind.temperature, rule.threshold, rule.method) if rule else None
            self._metrics.labelled_answers(score_labels(logits, labels, temperature, sets))
            observe_all(self._metrics.label_lag, np.array([row.labelled - row.created_at for row in group]))
