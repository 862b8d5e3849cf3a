"""Sections of the calibration report of labelled rows, shared by the live monitor and offline reports. numpy only.

Undefined values are NaN; `replace_non_finite` replaces them by null.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation import reliability
from model.evaluation.cluster_bootstrap import EngineGroups, central_interval, group_by_engine, resample_sums
from model.numerics import Floats, Reliability

MAX_BERNOULLI_ROWS = 20_000  # maximum for simulation of each row in the ECE noise band; beyond, sums are normal
Json = dict[str, Any]


@dataclass(frozen=True)
class LabelledRows:
    """Labelled rows and their measures. Losses are in nats."""

    z: Floats  # (N, C) logits, divided by their temperatures
    p: Floats  # (N, C) probabilities
    q: Floats  # (N, C) labels as distributions
    top: Floats  # (N,) largest probability
    correct: Floats  # (N,) probability of the predicted class in the label
    loss: Floats  # (N,)
    entropy: Floats  # (N,) expected loss according to the model
    variance: Floats  # (N,) nats², variance of the loss according to the model
    engines: EngineGroups


def measure_rows(z: Floats, q: npt.ArrayLike, engine: npt.ArrayLike) -> LabelledRows:
    """Measure rows: z (N, C) scaled logits, q (N,) class indices or (N, C) distributions, engine (N,) ids.

    Raises:
        ValueError: as `numerics.cross_entropy`.
    """
    z = np.asfortranarray(z)  # numpy sums long columns several times faster than short rows
    targets, p = np.asfortranarray(numerics.as_distributions(q, z.shape[1])), numerics.softmax(z)
    loss, correct = numerics.cross_entropy(z, targets, reduction="none"), numerics.correct(z, targets)
    expected, variance = numerics.entropy(z), numerics.loss_variance(z)
    return LabelledRows(z, p, targets, p.max(axis=1), correct, loss, expected, variance, group_by_engine(engine))


def report_sections(rows: LabelledRows, classes: tuple[str, ...]) -> Json:
    """Return every section that depends on labelled rows only, in the order of the report."""
    bins = numerics.reliability(rows.z, rows.q)
    return {
        "cross_entropy": cross_entropy_section(rows),
        "brier": mean_or_nan(((rows.p - rows.q) ** 2).sum(axis=1)),
        "brier_decomposition": reliability.decompose_brier(rows.p, rows.q)._asdict() if len(rows.p) else None,
        "accuracy": mean_or_nan(rows.correct),
        "ece": ece_section(rows, bins),
        "reliability": reliability_diagram(bins),
        "classes": [class_section(rows, k, name) for k, name in enumerate(classes)],
    }


def cross_entropy_section(rows: LabelledRows) -> Json:
    """Return realised and expected cross-entropy and their gap, with z by rows, z and 90 % interval by engines.

    `z_engines` is the limit of resampling engines: the gap divided by the cluster-robust standard error of a ratio. It
    does not depend on a seed.
    """
    gaps, n, count = rows.loss - rows.entropy, len(rows.loss), rows.engines.count
    sums, sizes = rows.engines.sum_rows(gaps), rows.engines.sum_rows(np.ones(n))
    spread = np.sqrt(((sums - sizes * mean_or_nan(gaps)) ** 2).sum() * count / (count - 1)) if count > 1 else np.nan
    totals = resample_sums(np.column_stack([sums, sizes])) if n else np.empty((0, 2))
    return {
        "realised": mean_or_nan(rows.loss),
        "expected": mean_or_nan(rows.entropy),
        "gap": mean_or_nan(gaps),
        "z": ratio_or_nan(gaps.sum(), np.sqrt(rows.variance.sum())),
        "z_engines": ratio_or_nan(gaps.sum(), spread),
        "interval": central_interval(totals[:, 0] / totals[:, 1]) if n else None,
    }


def ece_section(rows: LabelledRows, bins: Reliability) -> Json:
    """Return ECE of equal-width bins, its noise band for a calibrated model, equal-mass ECE, and an interval."""
    if len(rows.top) == 0:
        return {"value": None, "noise_band": None, "equal_mass": None, "interval": None}
    # sorting makes the simulated band independent of row order
    ordered = rows.z[np.argsort(rows.top)] if len(rows.z) <= MAX_BERNOULLI_ROWS else rows.z
    return {
        "value": bins.ece(),
        "noise_band": numerics.ece_noise_band(ordered, coins=MAX_BERNOULLI_ROWS),
        "equal_mass": reliability.equal_mass_ece(rows.top, rows.correct),
        "interval": reliability.ece_interval(rows.top, rows.correct, rows.engines),
    }


def reliability_diagram(bins: Reliability) -> list[Json]:
    """Return the reliability diagram. Each bin contains the confidences in (lower, upper]."""
    width = len(bins.count)
    return [
        {
            "lower": k / width,
            "upper": (k + 1) / width,
            "n": int(n),
            "confidence": ratio_or_nan(bins.confidence[k], n),
            "accuracy": ratio_or_nan(bins.correct[k], n),
        }
        for k, n in enumerate(bins.count)
    ]


def class_section(rows: LabelledRows, k: int, name: str) -> Json:
    """Return count, ECE, recall, precision, share predicted (mean p) and share observed (mean label) of one class."""
    predicted, observed = rows.p[:, k], rows.q[:, k]
    is_predicted = rows.z.argmax(axis=1) == k
    n, hits = float(observed.sum()), float(observed[is_predicted].sum())
    return {
        "class": name,
        "n": int(n) if n.is_integer() else n,  # soft labels count fractions of rows
        "ece": reliability.class_ece(predicted, observed) if len(predicted) else np.nan,
        "recall": ratio_or_nan(hits, n),
        "precision": ratio_or_nan(hits, is_predicted.sum()),
        "mean_predicted": mean_or_nan(predicted),
        "mean_observed": mean_or_nan(observed),
    }


def mean_or_nan(values: npt.NDArray[Any]) -> float:
    """Return the mean, or NaN for an empty array."""
    return float(values.mean()) if len(values) else np.nan


def ratio_or_nan(numerator: float, denominator: float) -> float:
    """Return the quotient, or NaN if the denominator is not positive."""
    return float(numerator / denominator) if denominator > 0 else np.nan


def replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity by None and numpy floats by Python floats, as JSON requires."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if np.isfinite(value) else None
    return value
