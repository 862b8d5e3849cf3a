"""Anytime-valid evidence: e-values of sums whose mean is zero for a calibrated model.

Each row has a number x whose mean is zero if the probabilities are right, and whose variance they determine:
loss - entropy, or q_k - p_k. From their total T and a variance process V, Robbins' normal mixture gives

    E = mean over r of √(r / (V + r)) exp(T² / (2 (V + r))),

which ever reaches 1/α with probability α at most, at any number of looks (Ville's inequality). V is the largest of

* Σ (x² + 2 var x) / 3 over rows: exact, at every n, if each label follows its row's probabilities, given all before
  (Delyon 2009; Bercu and Touati 2019);
* Σ S² over engines, S an engine's sum: windows of one engine overlap, and their errors are correlated
  (self-normalised sums: Howard et al. 2021; asymptotic: Waudby-Smith et al. 2024), **plus an error not yet observed**.
  Where errors are rare, engines without an error are similar, and Σ S² does not include the size of the first error.
  Where T points away from a tail, the size of an error of a whole engine in that tail is therefore added: Σ m4 / Σ m2.
  Here m4 is the fourth moment of the tail, and m2 the variance of an engine's sum if all its rows had the same error.
  Both are Minkowski's bounds and need probabilities only.

The result does not depend on the order of rows. Not covered: errors that engines have in common (one bad fuel delivery
for the whole fleet), and labels that are missing because of their value. numpy only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation.cluster_bootstrap import EngineGroups
from model.numerics import Floats

SCALES = (3.0, 100.0, 3e3, 1e5)  # of V, nats²: from about 30 rows to one year of a fleet, a factor of 30 apart


@dataclass(frozen=True)
class Deviations:
    """The deviation of each of N rows, and its moments under the probabilities; every field (N,)."""

    x: Floats
    variance: Floats
    above: Floats  # E (x⁺)⁴
    below: Floats  # E (x⁻)⁴


def of_losses(logits: npt.ArrayLike, loss: Floats, expected: Floats, variance: Floats) -> Deviations:
    """Return the deviations loss - entropy, in nats: the derivative of the log-likelihood by 1/T, most sensitive to T.

    Args:
        logits: (N, C), already divided by their temperatures.
        loss: (N,) cross-entropy of each row.
        expected: (N,) entropy of each row.
        variance: (N,) `numerics.loss_variance` of each row.
    """
    log_p = numerics.log_softmax(logits)
    root = np.exp(log_p / 4)  # p^¼ first: at p = 0, the fourth power of the logarithm may overflow
    gap = -log_p - expected[:, None]
    above, below = (((root * np.maximum(side, 0)) ** 4).sum(axis=1) for side in (gap, -gap))
    return Deviations(loss - expected, variance, above, below)


def of_class(p: Floats, q: Floats) -> Deviations:
    """Return the deviations q_k - p_k of one class: observed minus predicted frequency. p, q: (N,)."""
    return Deviations(q - p, p * (1 - p), p * (1 - p) ** 4, (1 - p) * p**4)


@dataclass(frozen=True)
class Evidence:
    """The total of n deviations, and the variance process against a total above and below zero."""

    n: int
    total: float
    variance_above: float
    variance_below: float

    @property
    def log_e(self) -> float:
        """Ln of the e-value against a mean of zero; 0 without rows."""
        return float(log_e(self.total, self.variance_above if self.total > 0 else self.variance_below))

    def mean_within(self, alpha: float) -> tuple[float, float]:
        """Return a confidence sequence, which contains the mean at all looks with probability 1 - alpha.

        It excludes zero exactly when the e-value reaches 1/alpha. It is infinite without rows.
        """
        if self.n == 0:
            return -np.inf, np.inf
        above, below = reach_of(self.variance_above, alpha), reach_of(self.variance_below, alpha)
        return (self.total - above) / self.n, (self.total + below) / self.n


def evidence(deviations: Deviations, engines: EngineGroups) -> Evidence:
    """Weigh the deviations of rows, with rows and with engines as the unit."""
    rows = float((deviations.x**2 + 2 * deviations.variance).sum()) / 3
    squares = float((engines.sum_rows(deviations.x) ** 2).sum())
    together = float((engines.sum_rows(np.sqrt(deviations.variance)) ** 2).sum()) or 1.0
    above, below = (
        float((engines.sum_rows(tail**0.25) ** 4).sum()) / together for tail in (deviations.above, deviations.below)
    )
    total = float(deviations.x.sum())
    return Evidence(len(deviations.x), total, max(rows, squares + below), max(rows, squares + above))


def log_e(total: npt.ArrayLike, variance: npt.ArrayLike) -> Floats:
    """Return ln E of totals and variances of the same shape."""
    t, v = np.asarray(total, dtype=np.float64)[..., None], np.asarray(variance, dtype=np.float64)[..., None]
    r = np.array(SCALES)
    return mean_of_e(t * t / (2 * (v + r)) - np.log1p(v / r) / 2)


def mean_of_e(logs: Floats) -> Floats:
    """Return ln of the mean of e-values over the last axis, which is an e-value even if they are dependent."""
    return np.asarray(np.logaddexp.reduce(logs, axis=-1) - np.log(logs.shape[-1]))


def reach_of(variance: float, alpha: float) -> float:
    """Return the total whose e-value is 1/alpha."""
    r, cost = variance + np.array(SCALES), np.log1p(variance / np.array(SCALES)) / 2
    # The mean of k e-values is at most the largest one and at least the largest one divided by k.
    low, high = (float(np.sqrt(2 * r * (np.log(k / alpha) + cost)).min()) for k in (1, len(SCALES)))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if log_e(middle, variance) >= -np.log(alpha) else (middle, high)
    return float(high)
