"""What labelled predictions say of calibration, and unlabelled ones of drift: pure arithmetic, the clock passed in.

`calibration` is the answer of `GET /v1/calibration`. Its state may be looked at as often as one likes: a calibrated
model, its labels accumulating from a fixed beginning, ever alarms with probability 5 % at most. That is a theorem for
independent rows and simulated for engines (`sequential`, `benchmarks.monitor`). A moving window begins anew all
the time.
Knows no database, no HTTP, no metrics.
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
# 5 % of false alarms: most for the gap of the loss, because that is what a temperature mends.
ALPHA_GAP, ALPHA_CLASSES = 0.04, 0.01
# Engines that fail early are labelled first, and are the hard ones: with outcomes alone, NASA's test engines failing in
# their order, cross-entropy is 19 % too high with half of the predictions labelled, 6 % at this share, 3 % at 0.9.
REPRESENTATIVE_SHARE = 0.8
DAY = 86_400.0
AGES = (0.0, 1 * DAY, 7 * DAY, 30 * DAY, 90 * DAY)  # seconds; where each band of `by_age` begins
MAX_SCALED = 1e41  # no float32 logit over a temperature is larger, and no square of a sum of these overflows


@dataclass(frozen=True)
class CalibrationRows:
    """Every prediction of a window that counts, the latest of each engine and cycle.

    The order of rows matters for rounding alone, and the order of ids for resampled intervals: the same rows in the
    same order under the same ids give the same bits.
    """

    logits: npt.NDArray[np.floating]  # (N, C) as the network gave them
    temperature: Floats  # (N,) that answered
    label: Floats  # (N, C) distributions, a row of NaN without a label
    engine: npt.NDArray[np.integer]  # (N,) ids
    covered: Floats  # (N,) share of the truth that the prediction set held, NaN without a label or a rule
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
    """The answer of `GET /v1/calibration`: JSON-ready, every float finite or None.

    Args:
        rows: the window's predictions.
        classes: their names, C of them.
        now: seconds, on the clock of `made_at`.
        level: promised coverage of prediction sets, None without a rule.
        window: as it was asked for, echoed.

    Raises:
        ValueError: logits or temperatures out of range, or a label that is no distribution.
    """
    z = numerics.scaled_rows(np.asfortranarray(rows.logits), rows.temperature)  # as in calibration_report.measure_rows
    if z.shape[1] != len(classes) or not (abs(z) <= MAX_SCALED).all():
        raise ValueError(f"logits of shape {z.shape} are too many or too large for {len(classes)} classes")
    known: Mask = ~np.isnan(rows.label[:, 0])
    found = calibration_report.measure_rows(z[known], rows.label[known], rows.engine[known])
    gap, frequencies = evidences(found)
    body: Json = {"window": window, "n": len(found.z), "engines": found.engines.count}
    told = known & (rows.source != SOURCES.index("survival"))  # survivors alone tell of one class
    body["state"] = state(len(np.unique(rows.engine[told])), gap, frequencies)
    body["evidence"] = _evidence(gap, frequencies)
    body |= calibration_report.report_sections(found, classes)
    for section, one in zip(body["classes"], frequencies, strict=True):
        section["log10_e"] = one.log_e / np.log(10)
    body["conformal"] = None if level is None else _conformal(rows, known, level)
    body["labels"] = _labels(rows, known, now)
    body["label_free"] = _label_free(z, found)
    return {key: replace_non_finite(value) for key, value in body.items()}


def over_time(rows: CalibrationRows, periods: int) -> list[Json]:
    """The loss of labelled predictions by when they were made, in equal parts of the time between first and last.

    `noise` is the standard deviation that a calibrated model's mean loss has. Parts without a label have no figures.
    """
    known = ~np.isnan(rows.label[:, 0])
    if not known.any():
        return []
    made = rows.made_at[known]
    z = numerics.scaled_rows(rows.logits[known], rows.temperature[known])
    loss = numerics.cross_entropy(z, rows.label[known], reduction="none")
    edges = np.linspace(made.min(), made.max(), periods + 1)
    part = np.clip(np.searchsorted(edges, made, side="right") - 1, 0, periods - 1)
    columns = (np.ones(len(made)), loss, numerics.entropy(z), numerics.loss_variance(z))
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


def evidences(found: LabelledRows) -> tuple[Evidence, list[Evidence]]:
    """Evidence that the loss is not what the model expects, and that each class is not as frequent as it says."""
    losses = sequential.of_losses(found.z, found.loss, found.entropy, found.variance)
    classes = [sequential.of_class(p, q) for p, q in zip(found.p.T, found.q.T, strict=True)]
    return sequential.evidence(losses, found.engines), [sequential.evidence(one, found.engines) for one in classes]


def state(engines: int, gap: Evidence, frequencies: list[Evidence]) -> State:
    """The verdict. `drifting`: the loss is as expected, the frequency of a class is not; no temperature mends that."""
    if engines < MIN_ENGINES:
        return "insufficient_data"
    if gap.log_e >= -np.log(ALPHA_GAP):
        return "overconfident" if gap.total > 0 else "underconfident"
    return "drifting" if _together(frequencies) >= -np.log(ALPHA_CLASSES) else "calibrated"


def drift(
    reference: Reference,
    confidence_counts: npt.ArrayLike,
    entropy_counts: npt.ArrayLike,
    channel_counts: Mapping[str, npt.ArrayLike],
) -> Json:
    """PSI, its noise and Jensen-Shannon of confidence, entropy and each channel, against the manifest's reference.

    Counts are per bin of the reference (`drift.count_bins`). A histogram that the reference lacks is null.

    Raises:
        ValueError: counts that do not fit the bins, or a channel that the reference does not know.
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


def _together(frequencies: list[Evidence]) -> float:
    return float(sequential.mean_of_e(np.array([one.log_e for one in frequencies])))


def _evidence(gap: Evidence, frequencies: list[Evidence]) -> Json:
    """How near an alarm is: log10 of the e-values and where they alarm, the always-valid range of the mean loss gap."""
    return {
        "engines_needed": MIN_ENGINES,
        "gap": {
            "log10_e": gap.log_e / np.log(10),
            "alarm_at": -np.log10(ALPHA_GAP),
            "level": 1 - ALPHA_GAP,
            "interval": gap.mean_within(ALPHA_GAP) if gap.n else None,
        },
        "classes": {"log10_e": _together(frequencies) / np.log(10), "alarm_at": -np.log10(ALPHA_CLASSES)},
    }


def _conformal(rows: CalibrationRows, known: Mask, level: float) -> Json:
    covered, sizes = (column[known & ~np.isnan(column)] for column in (rows.covered, rows.set_size))
    return {"level": level, "coverage": mean_or_nan(covered), "mean_size": mean_or_nan(sizes)}


def _labels(rows: CalibrationRows, known: Mask, now: float) -> Json:
    """What share is labelled, after how long, by whom. A label that came before its prediction has no lag."""
    share = mean_or_nan(known)
    lag = np.maximum(rows.labelled_at[known] - rows.made_at[known], 0)
    p50, p90 = np.quantile(lag, [0.5, 0.9]) if len(lag) else (np.nan, np.nan)
    return {
        "share": share,
        "by_age": _by_age(np.maximum(now - rows.made_at, 0), known),
        "lag_seconds": {"p50": p50, "p90": p90},
        "sources": {name: int((rows.source[known] == k).sum()) for k, name in enumerate(SOURCES)},
        "selection_biased": not share >= REPRESENTATIVE_SHARE,  # also of no prediction: nothing speaks for the fleet
    }


def _by_age(age: Floats, known: Mask) -> list[Json]:
    band, ends = np.searchsorted(AGES, age, side="right") - 1, (*AGES[1:], None)
    held = [known[band == k] for k in range(len(AGES))]
    return [
        {"from_seconds": begins, "to_seconds": end, "n": len(within), "share": mean_or_nan(within)}
        for begins, end, within in zip(AGES, ends, held, strict=True)
    ]


def _label_free(z: Floats, found: LabelledRows) -> Json:
    """Accuracy and cross-entropy that all predictions expect; `error`: expected less realised of the labelled ones."""
    errors = {
        "accuracy": mean_or_nan(found.top) - mean_or_nan(found.correct),
        "cross_entropy": mean_or_nan(found.entropy) - mean_or_nan(found.loss),
    }
    return {
        "accuracy": mean_or_nan(numerics.softmax(z).max(axis=1)),
        "cross_entropy": mean_or_nan(numerics.entropy(z)),
        "error": errors if len(found.z) else None,
    }
