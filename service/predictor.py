"""The use case: telemetry, and labels if known, to calibrated health, and its loss. Knows no HTTP and no JSON."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import conformal, numerics
from model.numerics import Floats
from model.occlusion import Shift, Usual, occluded, shifts
from service.errors import Fault, InvalidInput
from service.metrics import Metrics, add_bins, observe_all
from service.runtime import Batch, Model

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Evaluation:
    """Losses of the labelled rows, in nats, and their means."""

    count: int
    cross_entropy: float
    expected_cross_entropy: float
    accuracy: float
    brier: float


@dataclass(frozen=True)
class Prediction:
    """Answers for N rows. `loss` is NaN where no label was given; `sets` (N, C) says which classes the set holds."""

    temperature: float
    logits: Batch  # (N, C)
    rul: Batch | None  # (N,)
    probabilities: Floats  # (N, C)
    expected_loss: Floats  # (N,)
    loss: Floats  # (N,)
    sets: Mask | None  # (N, C)
    evaluation: Evaluation | None


class Predictor:
    """One model, its active temperature, and the metrics that it feeds."""

    def __init__(self, model: Model, metrics: Metrics) -> None:
        self.model = model
        self.temperature = model.manifest.temperature
        self._metrics = metrics
        manifest = model.manifest
        a_value_each = model.input_shape[-1:] == (len(manifest.channels),) and len(model.input_shape) <= 2
        reference = manifest.reference.channels if manifest.reference and a_value_each else {}
        self._edges = {name: np.array(reference[name].edges) for name in manifest.channel_names if name in reference}
        conditions = manifest.conditions
        self._usual = Usual.of(conditions.setting_scales, conditions.usual) if conditions else None
        bins = {name: len(edges) + 1 for name, edges in self._edges.items()}
        metrics.serving(manifest.name, manifest.version, model.digest, manifest.classes, self.temperature, bins)

    def predict(
        self,
        telemetry: Batch,
        targets: Floats | None = None,
        temperature: float | None = None,
        imputed: npt.NDArray[np.int64] | None = None,
    ) -> Prediction:
        """Calibrated health of N instances.

        Args:
            telemetry: (N, *input_shape) float32, finite, windows already padded.
            targets: (N, C) distributions over the classes, a row of NaN where no label is known.
            temperature: in place of the active one, for this call only.
            imputed: (channels,) how many missing values were held, for the metrics.

        Raises:
            InvalidInput: an instance for which the network's answer is not finite.
        """
        started = time.perf_counter()
        logits, rul = self.model.run(telemetry)
        self._metrics.inference_duration.observe(time.perf_counter() - started)
        self._metrics.batch_rows.observe(len(telemetry))
        _refuse_unanswerable(logits, rul)
        t = self.temperature if temperature is None else temperature
        prediction = self._calibrated(logits, rul, t, targets)
        # A what-if temperature is answered and not counted: the counters describe what the service says by itself.
        active = prediction if t == self.temperature else self._calibrated(logits, rul, self.temperature, targets)
        self._observe(active, telemetry, targets, imputed)
        return prediction

    def explain(self, telemetry: Batch, prediction: Prediction) -> list[list[Shift]]:
        """What each channel did to each answer, the strongest first: one batch of a row per channel for each instance.

        Raises:
            InvalidInput: the model does not say what is usual, so that no channel can be left out.
        """
        if self._usual is None:
            message = "this model does not say what is usual (`conditions`), so its answers cannot be explained"
            raise InvalidInput(message, (Fault(("explain",), message),))
        found = []
        for i, window in enumerate(telemetry):
            logits, rul = self.model.run(occluded(window, self._usual))
            without = numerics.softmax(logits, prediction.temperature)
            answered = None if prediction.rul is None else float(prediction.rul[i])
            found.append(shifts(prediction.probabilities[i], answered, without, rul))
        return found

    def _calibrated(self, logits: Batch, rul: Batch | None, t: float, targets: Floats | None) -> Prediction:
        known = np.zeros(len(logits), bool) if targets is None else ~np.isnan(targets[:, 0])
        loss, expected = np.full(len(logits), np.nan), numerics.entropy(logits, t)
        evaluation = None
        if targets is not None and known.any():
            loss[known] = numerics.cross_entropy(logits[known], targets[known], t, reduction="none")
            evaluation = Evaluation(
                int(known.sum()),
                float(loss[known].mean()),
                float(expected[known].mean()),
                float(numerics.correct(logits[known], targets[known]).mean()),
                float(numerics.brier(logits[known], targets[known], t).mean()),
            )
        probabilities = numerics.softmax(logits, t)
        return Prediction(t, logits, rul, probabilities, expected, loss, self._sets(logits), evaluation)

    def _sets(self, logits: Batch) -> Mask | None:
        """Prediction sets at the artefact's own temperature, whatever temperature was asked for.

        The threshold was found there, and its coverage holds nowhere else. Never empty: the most probable class
        always belongs.
        """
        rule = self.model.manifest.conformal
        if rule is None:
            return None
        return conformal.sets(logits, self.model.manifest.temperature, rule.threshold, rule.method)

    def _observe(
        self, prediction: Prediction, telemetry: Batch, targets: Floats | None, imputed: npt.NDArray[np.int64] | None
    ) -> None:
        m, classes = self._metrics, self.model.manifest.classes
        for k, n in enumerate(np.bincount(prediction.logits.argmax(axis=1), minlength=len(classes)).tolist()):
            if n:
                m.predictions.labels(classes[k]).inc(n)
        observe_all(m.confidence, prediction.probabilities.max(axis=1))
        observe_all(m.entropy, prediction.expected_loss)
        self._observe_inputs(telemetry, imputed)
        if targets is not None and prediction.evaluation is not None:
            self._observe_labelled(prediction, targets)

    def _observe_inputs(self, telemetry: Batch, imputed: npt.NDArray[np.int64] | None) -> None:
        """Only the newest row of a window is news: the others were counted when they were newest."""
        newest = telemetry if telemetry.ndim == 2 else telemetry[:, -1]
        for k, channel in enumerate(self.model.manifest.channel_names):
            if channel in self._edges:
                edges = self._edges[channel]
                bins = np.searchsorted(edges, newest[:, k].astype(np.float64))
                add_bins(self._metrics.input_values, np.bincount(bins, minlength=len(edges) + 1), channel)
            if imputed is not None and imputed[k]:
                self._metrics.imputed_values.labels(channel).inc(int(imputed[k]))

    def _observe_labelled(self, prediction: Prediction, targets: Floats) -> None:
        known = ~np.isnan(targets[:, 0])
        logits, q, t, m = prediction.logits[known], targets[known], prediction.temperature, self._metrics
        observe_all(m.loss, prediction.loss[known])
        m.labelled.inc(int(known.sum()))
        m.correct.inc(float(numerics.correct(logits, q).sum()))
        m.loss_nats.inc(float(prediction.loss[known].sum()))
        m.expected_loss_nats.inc(max(0.0, float(prediction.expected_loss[known].sum())))
        m.loss_variance.inc(float(numerics.loss_variance(logits, t).sum()))
        m.brier.inc(float(numerics.brier(logits, q, t).sum()))
        if prediction.sets is not None:
            m.covered.inc(float((q * prediction.sets[known]).sum()))
        bins = numerics.reliability(logits, q, t)
        add_bins(m.reliability_predictions, bins.count)
        add_bins(m.reliability_confidence, bins.confidence)
        add_bins(m.reliability_correct, bins.correct)


def _refuse_unanswerable(logits: Batch, rul: Batch | None) -> None:
    """A network may overflow on readings that no engine has; such an instance has no answer, and says so."""
    finite = np.isfinite(logits).all(axis=1) & (True if rul is None else np.isfinite(rul))
    if not finite.all():
        i, message = int(np.flatnonzero(~finite)[0]), "the model has no finite answer for these readings"
        raise InvalidInput(f"instances[{i}].telemetry: {message}", (Fault(("instances", i, "telemetry"), message),))
