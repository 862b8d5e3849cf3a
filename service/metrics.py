"""The only Prometheus: every metric once, on an injected registry. Knows no HTTP and no model.

Calibration is exported as plain counters that add across workers, replicas and time: any window is an `increase`.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from model.numerics import RELIABILITY_BINS
from service.errors import BodyTooLarge, ClientGone, InvalidInput, NotJson, UnsupportedMediaType

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6, 2.3, 3.0, 4.6, 6.9, 10.0)
CONFIDENCE = tuple(round(k / 20, 2) for k in range(1, 21))
ENTROPY = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.5, 2.3, 4.6, 6.9)

Values = npt.NDArray[np.floating] | npt.NDArray[np.integer]


class Metrics:
    """All metrics of one process, named as in the design with the prefix `engine_health_`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"engine_health_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"engine_health_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"engine_health_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self.http_requests = counter("http_requests_total", "Requests answered.", "method", "route", "status")
        self.http_duration = histogram(
            "http_request_duration_seconds", "From the first byte read to the last sent.", SECONDS, "route"
        )
        self.queue_duration = histogram("queue_duration_seconds", "Waiting before inference.", SECONDS)
        self.inference_duration = histogram("inference_duration_seconds", "Inside ONNX Runtime, a call.", SECONDS)
        self.batch_rows = histogram("batch_rows", "Rows of one inference.", ROWS)
        self.predictions = counter("predictions_total", "Predictions by most probable class.", "health")
        self.rejected = counter("rejected_total", "Requests refused, by reason.", "reason")
        self.ready = gauge("ready", "1 once a model has proved itself.")
        self.temperature = gauge("temperature", "Active temperature.")
        self.model_info = gauge("model_info", "The model that answers; always 1.", "name", "version", "digest")
        self.loss = histogram("cross_entropy_loss", "Cross-entropy of labelled predictions, nats.", NATS)
        self.labelled = counter("labelled_total", "Labelled predictions.")
        self.correct = counter("correct_total", "Labelled predictions whose most probable class was right.")
        self.loss_nats = counter("loss_nats_total", "Sum of cross-entropy of labelled predictions.")
        self.expected_loss_nats = counter("expected_loss_nats_total", "Sum of entropy of labelled predictions.")
        self.loss_variance = counter("loss_variance_nats2_total", "Sum of the variance of one loss.")
        self.brier = counter("brier_total", "Sum of Brier scores of labelled predictions.")
        self.covered = counter("conformal_covered_total", "Labelled predictions whose set held the truth.")
        self.reliability_predictions = counter("reliability_predictions_total", "Labelled predictions.", "bin")
        self.reliability_confidence = counter("reliability_confidence_total", "Sum of top probabilities.", "bin")
        self.reliability_correct = counter("reliability_correct_total", "Sum of hits.", "bin")
        self.confidence = histogram("confidence", "Top probability of every prediction.", CONFIDENCE)
        self.entropy = histogram("entropy_nats", "Entropy of every prediction.", ENTROPY)
        self.input_values = counter("input_values_total", "Newest readings, by reference bin.", "channel", "bin")
        self.imputed_values = counter("imputed_values_total", "Missing values held.", "channel")
        for reason in (NotJson, BodyTooLarge, UnsupportedMediaType, InvalidInput, ClientGone):
            self.rejected.labels(reason.reason)
        for k in range(RELIABILITY_BINS):  # a series that starts at zero has an increase from its first event on
            for family in (self.reliability_predictions, self.reliability_confidence, self.reliability_correct):
                family.labels(str(k))

    def serving(
        self,
        name: str,
        version: str,
        digest: str,
        classes: Iterable[str],
        temperature: float,
        input_bins: Mapping[str, int],
    ) -> None:
        """Say which model answers from now on; `input_bins` counts the reference bins of each channel."""
        self.model_info.clear()
        self.model_info.labels(name, version, digest).set(1)
        self.temperature.set(temperature)
        self.ready.set(1)
        for health in classes:
            self.predictions.labels(health)
        for channel, bins in input_bins.items():
            self.imputed_values.labels(channel)
            for k in range(bins):
                self.input_values.labels(channel, str(k))

    def text(self) -> bytes:
        """The exposition, Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


def observe_all(histogram: Histogram, values: Values) -> None:
    """Observe every value of an array."""
    for value in values.tolist():
        histogram.observe(value)


def add_bins(family: Counter, amounts: Values, *labels: str) -> None:
    """Add each positive amount to the series of its bin; `labels` come before the bin's."""
    for k in np.flatnonzero(amounts > 0).tolist():
        family.labels(*labels, str(k)).inc(float(amounts[k]))
