"""Calibration error of probabilities: equal-mass ECE, class-wise ECE, Brier decomposition, ECE intervals.

Takes probabilities, which `model.numerics` computes from logits, because each metric uses another part of them. numpy
only.
"""

from typing import NamedTuple

import numpy as np

from model.evaluation.cluster_bootstrap import TAIL_PROBABILITY, EngineGroups, resample_sums
from model.numerics import RELIABILITY_BINS, Floats, bin_of


def equal_mass_ece(confidence: Floats, correct: Floats, bins: int = RELIABILITY_BINS) -> float:
    """Return ECE over bins of about equal row counts (Nguyen and O'Connor 2015). Equal confidences share a bin.

    Args:
        confidence: (N,) top probabilities.
        correct: (N,) 0 or 1, or the probability that a soft label gives to the predicted class.
        bins: number of bins; at most N are filled.
    """
    n = len(confidence)
    if n == 0:
        return 0.0
    edges = np.sort(confidence)[np.arange(1, bins) * n // bins]
    return float(abs(np.bincount(np.searchsorted(edges, confidence, side="right"), confidence - correct)).sum() / n)


def class_ece(p: Floats, q: Floats, bins: int = RELIABILITY_BINS) -> float:
    """Return the class-wise ECE of one class (Kull et al. 2019) from probabilities p (N,) and labels q (N,)."""
    return float(abs(np.bincount(bin_of(p, bins), p - q, bins)).sum() / max(len(p), 1))


class BrierParts(NamedTuple):
    """Murphy's decomposition: Brier = reliability - resolution + uncertainty + residual."""

    reliability: float
    resolution: float
    uncertainty: float
    residual: float


def decompose_brier(p: Floats, q: Floats, bins: int = RELIABILITY_BINS) -> BrierParts:
    """Decompose Σ_k (p_k - q_k)², mean over rows (Murphy 1973); p, q: (N, C), N >= 1.

    Rows are grouped by predicted class and equal-width bin of its probability. The residual is zero if all rows of a
    group have equal probabilities. Otherwise it is the variance of probabilities within groups minus twice their
    covariance with the labels (Stephenson et al. 2008).
    """
    top = p.argmax(axis=1)
    _, group = np.unique(top * bins + bin_of(p.max(axis=1), bins), return_inverse=True)
    size = np.bincount(group).astype(np.float64)
    reliability = resolution = uncertainty = 0.0
    for predicted, label in zip(p.T, q.T, strict=True):
        observed, gap = np.bincount(group, label) / size, np.bincount(group, predicted - label) / size
        reliability += float(size @ gap**2)
        resolution += float(size @ (observed - label.mean()) ** 2)
        uncertainty += float(((label - label.mean()) ** 2).sum())
    residual = float(((p - q) ** 2).sum()) - (reliability - resolution + uncertainty)
    return BrierParts(*(part / len(p) for part in (reliability, resolution, uncertainty, residual)))


def ece_interval(
    confidence: Floats, correct: Floats, engines: EngineGroups, bins: int = RELIABILITY_BINS
) -> tuple[float, float]:
    """Return a 90 % interval of the ECE in the limit of many engines, from resampled engines.

    ECE includes noise, and resampling adds noise again. Percentiles of the resampled ECE therefore never contain a true
    ECE of zero. The upper end is the percentile. The lower end is 0 if noise alone explains the ECE (resampled
    deviations of bins from the observed ones), else the upper end mirrored about the ECE. Simulated coverage is 0.89 to
    0.97, for independent rows and dependent engines.
    """
    gaps = engines.sum_rows_by_bin(confidence - correct, bin_of(confidence, bins), bins)
    totals = resample_sums(np.column_stack([gaps, engines.sum_rows(np.ones_like(confidence))]))
    n, bin_gaps = len(confidence), totals[:, :-1] / totals[:, -1:]
    observed = gaps.sum(axis=0) / n
    value, noise, high = (
        abs(observed).sum(),
        abs(bin_gaps - observed).sum(axis=1),
        np.quantile(abs(bin_gaps).sum(axis=1), 1 - TAIL_PROBABILITY),
    )
    low = 0.0 if value <= np.quantile(noise, 1 - TAIL_PROBABILITY) else max(2 * value - high, 0.0)
    return float(low), float(max(high, value))
