"""Statistics of calibration from labelled predictions, and of drift from all predictions. The caller passes the time.

`calibration` returns the response of `GET /v1/calibration`. Its state may be read any number of times: with labels
that accumulate from a fixed start, a calibrated model ever raises an alarm with probability 5 % at most. This is a
theorem for independent rows and simulated for engines (`sequential`, `benchmarks.monitor`). It does not hold for a
moving window, which restarts continuously. Independent of the database, HTTP and metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from model import numerics
from model.contract import Reference
from model.evaluation import calibration_report, sequential
from model.evaluation import drift as distance
from model.evaluation.calibration_report import Json, LabelledRows, mean_or_nan, replace_non_finite
from model.evaluation.cluster_bootstrap import MIN_ENGINES
from model.evaluation.sequential import Evidence
from model.numerics import Floats

State = Literal["calibrated", "overconfident", "underconfident", "drifting", "insufficient_data"]
Mask = npt.NDArray[np.bool_]

SOURCES = ("inspection", "outcome", "survival")  # of labels; a row's source is its index here, -1 without a label
# 5 % of false alarms. The loss gap gets the larger part, because a temperature corrects it.
ALPHA_GAP, ALPHA_CLASSES = 0.04, 0.01
# Engines that fail early are labelled first, and are the hard ones: with outcomes alone, NASA's test engines failing in
# their order, cross-entropy is 19 % too high with half of the predictions labelled, 6 % at this share, 3 % at 0.9.
REPRESENTATIVE_SHARE = 0.8
DAY = 86_400.0
AGES = (0.0, 1 * DAY, 7 * DAY, 30 * DAY, 90 * DAY)  # seconds; where each band of `by_age` begins
MAX_SCALED = 1e41  # no float32 logit over a temperature is larger, and no square of a sum of these overflows


@dataclass(frozen=True)
class CalibrationRows:
    """The predictions of a window that statistics use: the latest of each engine and cycle.

    The order of rows matters for rounding alone, and the order of ids for resampled intervals: the same rows in the
    same order under the same ids give the same bits.
    """

    logits: npt.NDArray[np.floating]  # (N, C) as the network gave them
    temperature: Floats  # (N,) of the prediction
    label: Floats  # (N, C) distributions, a row of NaN without a label
    engine: npt.NDArray[np.integer]  # (N,) ids
    covered: Floats  # (N,) share of the label that is in the prediction set, NaN without a label or a rule
    set_size: Floats  # (N,) classes in the prediction set, NaN without a rule
    made_at: Floats  # (N,) seconds
    labelled_at: Floats  # (N,) seconds, NaN without a label
    source: npt.NDArray[np.integer]  # (N,) index into SOURCES, -1 without a label

    def __post_init__(self) -> None:
        shape = np.shape(self.logits)
        for name, column in vars(self).items():
            if np.shape(column) != (shape if name in ("logits", "label") else shape[:1]) or len(shape) != 2:
                raise ValueError(f"{name} of shape {np.shape(column)} does not fit logits of shape {shape}")


def calibration(
    rows: CalibrationRows, classes: tuple[str, ...], now: float, level: float | None = None, window: str | None = None
) -> Json:
    """Return the response of `GET /v1/calibration`: JSON-ready, every float finite or None.

    Args:
        rows: the window's predictions.
        classes: names of the C classes.
        now: seconds, on the clock of `made_at`.
        level: promised coverage of prediction sets, None without a rule.
        window: text of the window in the request, copied to the response.

    Raises:
        ValueError: logits or temperatures out of range, or a label that is no distribution.
    """
    z = numerics.scaled_rows(np.asfortranarray(rows.logits), rows.temperature)  # as in calibration_report.measure_rows
    if z.shape[1] != len(classes) or not (abs(z) <= MAX_SCALED).all():
        raise ValueError(f"logits of shape {z.shape} are too many or too large for {len(classes)} classes")
    labelled: Mask = ~np.isnan(rows.label[:, 0])
    measured = calibration_report.measure_rows(z[labelled], rows.label[labelled], rows.engine[labelled])
    gap, frequencies = evidences(measured)
    body: Json = {"window": window, "n": len(measured.z), "engines": measured.engines.count}
    informative = labelled & (rows.source != SOURCES.index("survival"))  # survivors are all of one class
    body["state"] = state(len(np.unique(rows.engine[informative])), gap, frequencies)
    body["evidence"] = _evidence(gap, frequencies)
    body |= calibration_report.report_sections(measured, classes)
    for section, frequency in zip(body["classes"], frequencies, strict=True):
        section["log10_e"] = frequency.log_e / np.log(10)
    body["conformal"] = None if level is None else _conformal(rows, labelled, level)
    body["labels"] = _labels(rows, labelled, now)
    body["label_free"] = _label_free(z, measured)
    return {key: replace_non_finite(value) for key, value in body.items()}


def over_time(rows: CalibrationRows, periods: int) -> list[Json]:
    """Return the loss of labelled predictions in equal parts of the time between the first and the last.

    `noise` is the standard deviation of the mean loss of a calibrated model. Parts without a label have null figures.
    """
    labelled = ~np.isnan(rows.label[:, 0])
    if not labelled.any():
        return []
    created_at = rows.made_at[labelled]
    z = numerics.scaled_rows(rows.logits[labelled], rows.temperature[labelled])
    loss = numerics.cross_entropy(z, rows.label[labelled], reduction="none")
    edges = np.linspace(created_at.min(), created_at.max(), periods + 1)
    part = np.clip(np.searchsorted(edges, created_at, side="right") - 1, 0, periods - 1)
    columns = (np.ones(len(created_at)), loss, numerics.entropy(z), numerics.loss_variance(z))
    n, realised, expected, variance = (np.bincount(part, column, periods) for column in columns)
    return [
        {
            "from": float(edges[k]),
            "to": float(edges[k + 1]),
            "n": int(n[k]),
            "realised": replace_non_finite(calibration_report.ratio_or_nan(realised[k], n[k])),
            "expected": replace_non_finite(calibration_report.ratio_or_nan(expected[k], n[k])),
            "noise": replace_non_finite(calibration_report.ratio_or_nan(float(np.sqrt(variance[k])), n[k])),
        }
        for k in range(periods)
    ]


def evidences(measured: LabelledRows) -> tuple[Evidence, list[Evidence]]:
    """Return the evidence that the loss differs from its expectation, and the frequency of each class from its own."""
    losses = sequential.of_losses(measured.z, measured.loss, measured.entropy, measured.variance)
    classes = [sequential.of_class(p, q) for p, q in zip(measured.p.T, measured.q.T, strict=True)]
    return sequential.evidence(losses, measured.engines), [
        sequential.evidence(deviations, measured.engines) for deviations in classes
    ]


def state(engines: int, gap: Evidence, frequencies: list[Evidence]) -> State:
    """Return the state. `drifting`: the loss is as expected, but not the frequency of a class.

    A temperature does not correct that.
    """
    if engines < MIN_ENGINES:
        return "insufficient_data"
    if gap.log_e >= -np.log(ALPHA_GAP):
        return "overconfident" if gap.total > 0 else "underconfident"
    return "drifting" if _combined_log_e(frequencies) >= -np.log(ALPHA_CLASSES) else "calibrated"


def drift(
    reference: Reference,
    confidence_counts: npt.ArrayLike,
    entropy_counts: npt.ArrayLike,
    channel_counts: Mapping[str, npt.ArrayLike],
) -> Json:
    """Return PSI, its noise and Jensen-Shannon of confidence, entropy and each channel, against the reference.

    Counts are per bin of the reference (`drift.count_bins`). A histogram that the reference lacks is null.

    Raises:
        ValueError: counts that do not fit the bins, or a channel without a reference.
    """
    unknown = sorted(set(channel_counts) - set(reference.channels))
    if unknown:
        raise ValueError(f"channel {unknown[0]!r} has no reference")
    confidence, entropy = reference.confidence, reference.entropy_nats
    return {
        "confidence": confidence and distance.distances(confidence, confidence_counts, "confidence"),
        "entropy": entropy and distance.distances(entropy, entropy_counts, "entropy"),
        "channels": {n: distance.distances(reference.channels[n], c, n) for n, c in channel_counts.items()},
    }


def _combined_log_e(frequencies: list[Evidence]) -> float:
    return float(sequential.mean_of_e(np.array([frequency.log_e for frequency in frequencies])))


def _evidence(gap: Evidence, frequencies: list[Evidence]) -> Json:
    """Return log10 of the e-values, their alarm thresholds, and the always-valid interval of the mean loss gap."""
    return {
        "engines_needed": MIN_ENGINES,
        "gap": {
            "log10_e": gap.log_e / np.log(10),
            "alarm_at": -np.log10(ALPHA_GAP),
            "level": 1 - ALPHA_GAP,
            "interval": gap.mean_within(ALPHA_GAP) if gap.n else None,
        },
        "classes": {"log10_e": _combined_log_e(frequencies) / np.log(10), "alarm_at": -np.log10(ALPHA_CLASSES)},
    }


def _conformal(rows: CalibrationRows, labelled: Mask, level: float) -> Json:
    covered, sizes = (column[labelled & ~np.isnan(column)] for column in (rows.covered, rows.set_size))
    return {"level": level, "coverage": mean_or_nan(covered), "mean_size": mean_or_nan(sizes)}


def _labels(rows: CalibrationRows, labelled: Mask, now: float) -> Json:
    """Return share, lag and sources of labels. A label that arrived before its prediction has lag 0."""
    share = mean_or_nan(labelled)
    lag = np.maximum(rows.labelled_at[labelled] - rows.made_at[labelled], 0)
    p50, p90 = np.quantile(lag, [0.5, 0.9]) if len(lag) else (np.nan, np.nan)
    return {
        "share": share,
        "by_age": _by_age(np.maximum(now - rows.made_at, 0), labelled),
        "lag_seconds": {"p50": p50, "p90": p90},
        "sources": {name: int((rows.source[labelled] == k).sum()) for k, name in enumerate(SOURCES)},
        "selection_biased": not share >= REPRESENTATIVE_SHARE,  # also without predictions, where it is NaN
    }


def _by_age(age: Floats, labelled: Mask) -> list[Json]:
    band, ends = np.searchsorted(AGES, age, side="right") - 1, (*AGES[1:], None)
    by_band = [labelled[band == k] for k in range(len(AGES))]
    return [
        {"from_seconds": begin, "to_seconds": end, "n": len(members), "share": mean_or_nan(members)}
        for begin, end, members in zip(AGES, ends, by_band, strict=True)
    ]


def _label_free(z: Floats, measured: LabelledRows) -> Json:
    """Return accuracy and cross-entropy expected of all predictions; `error`: expected - realised of labelled ones."""
    errors = {
        "accuracy": mean_or_nan(measured.top) - mean_or_nan(measured.correct),
        "cross_entropy": mean_or_nan(measured.entropy) - mean_or_nan(measured.loss),
    }
    return {
        "accuracy": mean_or_nan(numerics.softmax(z).max(axis=1)),
        "cross_entropy": mean_or_nan(numerics.entropy(z)),
        "error": errors if len(measured.z) else None,
    }
