"""How far probabilities are from what happens, beyond one ECE: equal masses, classes, Brier's parts, intervals.

Takes probabilities, which `model.numerics` makes from logits: each figure wants another part of them. numpy only.
"""

from typing import NamedTuple

import numpy as np

from model.evaluation.cluster_bootstrap import TAIL, Engines, resampled
from model.numerics import RELIABILITY_BINS, Floats, bin_of


def equal_mass_ece(confidence: Floats, correct: Floats, bins: int = RELIABILITY_BINS) -> float:
    """ECE over bins of about equally many rows (Nguyen and O'Connor 2015); equal confidences share a bin.

    Args:
        confidence: (N,) top probabilities.
        correct: (N,) 0 or 1, or the probability that a soft label gives to the predicted class.
        bins: how many; no more than N are filled.
    """
    n = len(confidence)
    if n == 0:
        return 0.0
    edges = np.sort(confidence)[np.arange(1, bins) * n // bins]
    return float(abs(np.bincount(np.searchsorted(edges, confidence, side="right"), confidence - correct)).sum() / n)


def class_ece(p: Floats, q: Floats, bins: int = RELIABILITY_BINS) -> float:
    """Class-wise ECE of one class (Kull et al. 2019): bins of its probability p (N,) against the truth q (N,)."""
    return float(abs(np.bincount(bin_of(p, bins), p - q, bins)).sum() / max(len(p), 1))


class Murphy(NamedTuple):
    """Brier = reliability - resolution + uncertainty + residual."""

    reliability: float
    resolution: float
    uncertainty: float
    residual: float


def brier_parts(p: Floats, q: Floats, bins: int = RELIABILITY_BINS) -> Murphy:
    """Murphy's decomposition (1973) of Σ_k (p_k - q_k)², mean over rows; p, q: (N, C), N >= 1.

    Rows are grouped by predicted class and equal-width bin of its probability. It is exact, the residual zero, where
    all rows of a group have the same probabilities; otherwise the residual is their spread within groups less twice
    its covariance with the truth (Stephenson et al. 2008).
    """
    top = p.argmax(axis=1)
    _, group = np.unique(top * bins + bin_of(p.max(axis=1), bins), return_inverse=True)
    size = np.bincount(group).astype(np.float64)
    reliability = resolution = uncertainty = 0.0
    for said, true in zip(p.T, q.T, strict=True):
        seen, gap = np.bincount(group, true) / size, np.bincount(group, said - true) / size
        reliability += float(size @ gap**2)
        resolution += float(size @ (seen - true.mean()) ** 2)
        uncertainty += float(((true - true.mean()) ** 2).sum())
    residual = float(((p - q) ** 2).sum()) - (reliability - resolution + uncertainty)
    return Murphy(*(part / len(p) for part in (reliability, resolution, uncertainty, residual)))


def ece_interval(
    confidence: Floats, correct: Floats, engines: Engines, bins: int = RELIABILITY_BINS
) -> tuple[float, float]:
    """About where the ECE of ever more such engines would lie, 90 %, from resampled engines.

    ECE counts noise as error, and a resample adds the noise a second time; so the plain percentiles of resampled ECE
    exclude the truth always where it is zero. The lower end is 0 while noise of this size alone could have made the ECE
    (the resampled deviations of the bins from what was seen), and mirrored about the value beyond; the upper end is the
    plain percentile. Covers 0.89 to 0.97 of the time, simulated with rows and with dependent engines.
    """
    gaps = engines.sums_of_bins(confidence - correct, bin_of(confidence, bins), bins)
    drawn = resampled(np.column_stack([gaps, engines.sums(np.ones_like(confidence))]))
    n, each = len(confidence), drawn[:, :-1] / drawn[:, -1:]
    seen = gaps.sum(axis=0) / n
    value, noise, high = abs(seen).sum(), abs(each - seen).sum(axis=1), np.quantile(abs(each).sum(axis=1), 1 - TAIL)
    low = 0.0 if value <= np.quantile(noise, 1 - TAIL) else max(2 * value - high, 0.0)
    return float(low), float(max(high, value))
