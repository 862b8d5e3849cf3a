"""All Prometheus metrics of the service, on an injected registry. Independent of HTTP and of the model.

Calibration is exported as plain counters that add across workers, replicas and time: any window is an `increase`.
"""

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from model.numerics import RELIABILITY_BINS, Floats, Reliability
from service.errors import InputRejected

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.1, 1.6, 2.3, 3.0, 4.6, 6.9, 10.0)
LAGS = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 3 * 86400, 7 * 86400, 30 * 86400, 90 * 86400, 365 * 86400)
CONFIDENCE = tuple(round(k / 20, 2) for k in range(1, 21))
ENTROPY = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.5, 2.3, 4.6, 6.9)

Values = npt.NDArray[np.floating] | npt.NDArray[np.integer]


class Labelled(NamedTuple):
    """Losses of N labelled predictions, in nats."""

    loss: Floats
    expected_loss: Floats
    variance: Floats
    correct: Floats
    brier: Floats
    covered: Floats | None  # share of the label that the prediction set contains
    bins: Reliability


class Series(NamedTuple):
    """The series of one model: a counter per class, and one per channel and reference bin, `width` bins per channel."""

    classes: list[Counter]
    inputs: dict[int, Counter]
    width: int


def share_between_workers(folder: Path, slot: int) -> None:
    """Keep every value in files of `folder` named by this worker's slot, so that totals outlive the worker.

    The next worker of the slot continues them. Call it before any metric is created.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: slot)  # type: ignore[no-untyped-call]  # it has no types


class Metrics:
    """All metrics of one process, with the prefix `engine_health_`; docs/operations.md shows how to scrape them."""

    def __init__(self, registry: CollectorRegistry, shared: Path | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # no types; several workers have no such series, one has 258
        self._registry, self._shared = registry, shared is not None
        if shared is not None:
            self._registry = CollectorRegistry()
            self._registry.register(_Workers(shared))
        self._requests: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._info: tuple[str, ...] | None = None

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"engine_health_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, mode: Literal["livemin", "livemostrecent"], *labels: str) -> Gauge:
            return Gauge(f"engine_health_{name}", text, labels, registry=registry, multiprocess_mode=mode)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"engine_health_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self.http_requests = counter("http_requests_total", "Requests with a response.", "method", "route", "status")
        self.http_duration = histogram(
            "http_request_duration_seconds",
            "Time from the request headers to the end of the response.",
            SECONDS,
            "route",
        )
        self.queue_duration = histogram("queue_duration_seconds", "Time that a request waits for inference.", SECONDS)
        self.inference_duration = histogram(
            "inference_duration_seconds", "Duration of one call of ONNX Runtime.", SECONDS
        )
        self.batch_rows = histogram("batch_rows", "Rows of one inference batch.", ROWS)
        self.predictions = counter("predictions_total", "Predictions, by most probable class.", "health")
        self.rejected = counter("rejected_total", "Rejected requests, by reason.", "reason")
        self.ready = gauge("ready", "1 if every worker has a verified model, otherwise 0.", "livemin")
        self.temperature = gauge("temperature", "Active temperature.", "livemostrecent")
        self.model_info = gauge(
            "model_info", "The active model; its value is 1.", "livemostrecent", "name", "version", "digest"
        )
        self.loss = histogram("cross_entropy_loss", "Cross-entropy of labelled predictions in nats.", NATS)
        self.labelled = counter("labelled_total", "Labelled predictions.")
        self.correct = counter("correct_total", "Labelled predictions whose most probable class was correct.")
        self.loss_nats = counter("loss_nats_total", "Sum of the cross-entropy of labelled predictions in nats.")
        self.expected_loss_nats = counter(
            "expected_loss_nats_total",
            "Sum of the entropy of labelled predictions in nats, the loss that a calibrated model expects.",
        )
        self.loss_variance = counter(
            "loss_variance_nats2_total", "Sum of the variance of the loss of labelled predictions in nats squared."
        )
        self.brier = counter("brier_total", "Sum of Brier scores of labelled predictions.")
        self.with_set = counter("conformal_labelled_total", "Labelled predictions that have a prediction set.")
        self.covered = counter(
            "conformal_covered_total", "Labelled predictions whose prediction set contains the true class."
        )
        self.reliability_predictions = counter(
            "reliability_predictions_total", "Labelled predictions, by bin of the top probability.", "bin"
        )
        self.reliability_confidence = counter(
            "reliability_confidence_total", "Sum of the top probabilities of labelled predictions, by bin.", "bin"
        )
        self.reliability_correct = counter(
            "reliability_correct_total", "Labelled predictions whose most probable class was correct, by bin.", "bin"
        )
        self.label_lag = histogram("label_lag_seconds", "Time from a prediction to its label.", LAGS)
        self.store_up = gauge(
            "store_up", "1 if the database responds to every worker, otherwise 0; NaN if none is configured.", "livemin"
        )
        self.labellable = counter(
            "labellable_total",
            "Predictions that can get a label: stored with their engine, or labelled in the request.",
        )
        self.predictions_not_stored = counter(
            "predictions_not_stored_total", "Predictions that were returned but could not be stored."
        )
        self.confidence = histogram("confidence", "Top probability of every prediction.", CONFIDENCE)
        self.entropy = histogram("entropy_nats", "Entropy of every prediction.", ENTROPY)
        self.input_values = counter(
            "input_values_total",
            "Newest readings of each prediction, by reference bin of the channel.",
            "channel",
            "bin",
        )
        self.imputed_values = counter(
            "imputed_values_total", "Missing readings replaced by the last value of the channel.", "channel"
        )
        for reason in {InputRejected.reason, *(kind.reason for kind in InputRejected.__subclasses__())}:
            self.rejected.labels(reason)
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
    ) -> "Series":
        """Publish the model that serves from now on; `input_bins` is the number of reference bins by channel.

        Return its series. It continues to count there after another model has become active.
        """
        if self._info not in (None, (name, version, digest)):
            self.model_info.labels(*self._info).set(0)  # files of workers cannot remove a series: 0 means retired
            if not self._shared:
                self.model_info.remove(*self._info)
        self._info = (name, version, digest)
        self.model_info.labels(*self._info).set(1)
        self.temperature.set(temperature)
        self.ready.set(1)
        for channel in input_bins:
            self.imputed_values.labels(channel)
        width = max(input_bins.values(), default=0)
        inputs = {
            i * width + k: self.input_values.labels(channel, str(k))
            for i, (channel, bins) in enumerate(input_bins.items())
            for k in range(bins)
        }
        return Series([self.predictions.labels(health) for health in classes], inputs, width)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one response, and its duration in seconds."""
        key = (method, route, status)
        if key not in self._requests:  # finding a series costs as much as counting
            self._requests[key] = (
                self.http_requests.labels(method, route, str(status)),
                self.http_duration.labels(route),
            )
        count, duration = self._requests[key]
        count._value.inc(1)
        duration._buckets[bisect_left(duration._upper_bounds, seconds)].inc(1)
        duration._sum.inc(seconds)

    def batch(self, rows: int, seconds: float) -> None:
        """Record the rows and the duration in seconds of one inference."""
        observe(self.batch_rows, rows)
        observe(self.inference_duration, seconds)

    def answers(self, series: "Series", top: npt.NDArray[np.int64], confidence: Floats, entropy: Floats) -> None:
        """Record N predictions: index of the most probable class (N,), its probability (N,), entropy (N,) in nats."""
        if len(top) == 1:
            series.classes[int(top[0])]._value.inc(1)
            observe(self.confidence, float(confidence[0]))
            observe(self.entropy, float(entropy[0]))
            return
        for k, n in enumerate(np.bincount(top).tolist()):
            if n:
                series.classes[k]._value.inc(n)
        observe_all(self.confidence, confidence)
        observe_all(self.entropy, entropy)

    def inputs(self, series: "Series", bins: npt.NDArray[np.integer]) -> None:
        """Count the reference bins (N, channels) of newest readings."""
        counts = np.bincount((bins + series.width * np.arange(bins.shape[1])).ravel()).tolist()
        for k, n in enumerate(counts):
            if n:
                series.inputs[k]._value.inc(n)

    def input(self, series: "Series", bins: Sequence[int]) -> None:
        """Count the reference bin of each channel of one newest reading."""
        offset = 0
        for k in bins:
            series.inputs[offset + k]._value.inc(1)  # client_python's `Counter.inc` checks its arguments first
            offset += series.width

    def imputed(self, channels: Sequence[str], counts: npt.NDArray[np.int64]) -> None:
        """Count the missing values that were held, by channel."""
        for k in np.flatnonzero(counts).tolist():
            self.imputed_values.labels(channels[k]).inc(int(counts[k]))

    def labelled_answers(self, scores: Labelled) -> None:
        """Record the losses of labelled predictions."""
        observe_all(self.loss, scores.loss)
        self.labelled.inc(len(scores.loss))
        self.correct.inc(float(scores.correct.sum()))
        self.loss_nats.inc(float(scores.loss.sum()))
        self.expected_loss_nats.inc(max(0.0, float(scores.expected_loss.sum())))
        self.loss_variance.inc(float(scores.variance.sum()))
        self.brier.inc(float(scores.brier.sum()))
        if scores.covered is not None:  # the denominator of coverage, over all models
            self.with_set.inc(len(scores.covered))
            self.covered.inc(float(scores.covered.sum()))
        add_bins(self.reliability_predictions, scores.bins.count)
        add_bins(self.reliability_confidence, scores.bins.confidence)
        add_bins(self.reliability_correct, scores.bins.correct)

    def text(self) -> bytes:
        """Return the metrics of all workers, Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


class _Workers(Collector):
    """Collects the sums over all workers, without the series of retired models."""

    def __init__(self, folder: Path) -> None:
        self._all = MultiProcessCollector(None, path=str(folder))  # type: ignore[no-untyped-call]  # it has no types

    def collect(self) -> Iterable[Metric]:
        """Collect as client_python's collectors do."""
        for metric in self._all.collect():  # type: ignore[no-untyped-call]  # it has no types
            if metric.name == "engine_health_model_info":
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric


def observe(histogram: Histogram, value: float) -> None:
    """Observe one value. client_python's `observe` checks its state first, and searches the buckets linearly."""
    histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(1)
    histogram._sum.inc(value)


def observe_all(histogram: Histogram, observed: Values) -> None:
    """Observe every value of an array, each bucket once. client_python's `observe` takes one value at a time."""
    bounds = histogram._upper_bounds  # a value falls in the first bucket whose bound is not below it
    if len(observed) == 1:
        observe(histogram, float(observed[0]))
        return
    counts = np.bincount(np.searchsorted(bounds, observed)).tolist()
    for k, n in enumerate(counts):
        if n:
            histogram._buckets[k].inc(n)
    histogram._sum.inc(float(observed.sum()))


def add_bins(family: Counter, amounts: Values, *labels: str) -> None:
    """Add each positive amount to the series of its bin; `labels` come before the bin's."""
    for k in np.flatnonzero(amounts > 0).tolist():
        family.labels(*labels, str(k)).inc(float(amounts[k]))
