"""Softmax, cross-entropy and calibration error, once, in log space and float64.

Every function takes **logits**, never probabilities, and divides them by a temperature first.
Shapes: `logits` (N, C) or (C,); `targets` (N,) integers or (N, C) distributions over the classes.
Imports nothing else from this project. Invalid values raise `ValueError`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Reduction = Literal["mean", "sum", "none"]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_LOGIT = 1e150  # far beyond float32; no computation with such logits overflows
RELIABILITY_BINS = 15
MAX_WEIGHT = 1e9  # far beyond any use; no sum of losses overflows
# Accepted deviation of the sum of a label distribution from 1, so that probabilities of four decimals are valid.
SUM_TOLERANCE = 1e-4


def scaled(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return logits in float64, divided by the temperature.

    Raises:
        ValueError: no class axis, not finite, beyond 1e150, or a temperature outside 0.01..100.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError("logits need at least one class on the last axis")
    if not (np.abs(z) <= MAX_LOGIT).all():  # also when one is NaN
        raise ValueError(f"logits must be finite, from -{MAX_LOGIT:g} to {MAX_LOGIT:g}")
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}, not {temperature!r}")
    return z / temperature


def scaled_rows(logits: npt.ArrayLike, temperatures: npt.ArrayLike) -> Floats:
    """Return logits (N, C) in float64, each row divided by its temperature (N,), or all rows by one number.

    Raises:
        ValueError: as `scaled`, or lengths differ.
    """
    z, t = scaled(logits), np.asarray(temperatures, dtype=np.float64)
    if z.ndim != 2 or t.shape not in ((), z.shape[:1]):
        raise ValueError(f"logits of shape {z.shape} and temperatures of shape {t.shape} do not match")
    if not ((t >= MIN_TEMPERATURE) & (t <= MAX_TEMPERATURE)).all():
        raise ValueError(f"temperatures must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    return z / np.broadcast_to(t, z.shape[:1])[:, None]


def log_softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return ln p = z - m - ln Σ exp(z - m), with z = logits / T and m = max z, so that no exponential overflows.

    Example: `[-100, 0, 1]` gives `[-101.3133, -1.3133, -0.3133]`.
    """
    z = scaled(logits, temperature)
    shifted = z - z.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return p_k = exp(z_k - max z) / Σ exp(z - max z), with the shape of the logits."""
    z = scaled(logits, temperature)
    exponentials = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def posterior(logits: npt.NDArray[np.floating], temperature: float) -> tuple[Floats, Floats]:
    """Return probabilities (N, C) and their entropies (N,) in nats, without input checks.

    The result has the same bits as `exp(log_softmax(logits, temperature))`. Logits (N, C) must be finite float32, and
    the temperature must be within its bounds.
    """
    z = logits.astype(np.float64)
    z /= temperature
    z -= z.max(axis=1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    p = np.exp(z)
    z *= p
    return p, 0.0 - z.sum(axis=1)


def as_distributions(targets: npt.ArrayLike, classes: int) -> Floats:
    """Return targets as rows of probabilities (N, C): one-hot for integers, unchanged for distributions.

    Raises:
        ValueError: an index outside 0..C-1, a negative probability, or a row that does not sum to 1 within 1e-4.
    """
    t = np.asarray(targets)
    if t.ndim == 1:
        one_hot = np.zeros((len(t), classes))
        one_hot[np.arange(len(t)), _class_indices(t, classes)] = 1
        return one_hot
    q = t.astype(np.float64)
    if q.ndim != 2 or q.shape[1] != classes:
        raise ValueError(f"distributions need {classes} probabilities per row, got shape {q.shape}")
    within = (q >= 0) & (q <= 1 + SUM_TOLERANCE)  # checked first, because a sum of large numbers may overflow
    if not (within.all() and (abs(q.sum(axis=1) - 1) <= SUM_TOLERANCE).all()):
        raise ValueError("a distribution needs probabilities >= 0 that sum to 1")
    return q


def _class_indices(targets: npt.NDArray[np.generic], classes: int) -> npt.NDArray[np.int64]:
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"class indices must be integers, not {targets.dtype}")
    indices = targets.astype(np.int64)
    if indices.size and not (indices.min() >= 0 and indices.max() < classes):
        raise ValueError(f"class indices must be from 0 to {classes - 1}")
    return indices


def cross_entropy(
    logits: npt.ArrayLike,
    targets: npt.ArrayLike,
    temperature: float = 1.0,
    class_weights: npt.ArrayLike | None = None,
    reduction: Reduction = "mean",
) -> Floats:
    """Return -Σ w_k q_k ln p_k in nats: `-ln p_y` for a class index y, the whole sum for a distribution q.

    The mean divides by the sum of the targets' weights for indices and by N for distributions, as
    `torch.nn.functional.cross_entropy(weight=...)` does. Convention: 0 ln 0 = 0.
    Example: p_y = 0.96 gives 0.041, p_y = 0.40 gives 0.916, p_y = 0.01 gives 4.605.
    """
    z = np.atleast_2d(np.asarray(logits, dtype=np.float64))
    log_p = log_softmax(z, temperature)
    t = np.atleast_1d(np.asarray(targets))
    w = _weights(class_weights, z.shape[1])
    q = as_distributions(t, z.shape[1])
    if len(q) != len(z):
        raise ValueError(f"{len(z)} rows of logits but {len(q)} targets")
    losses: Floats = 0.0 - (w * q * log_p).sum(axis=1)  # 0 - x gives 0.0 instead of -0.0
    if reduction == "none":
        return losses
    if reduction == "sum":
        return np.asarray(losses.sum())
    total = float((q @ w).sum()) if t.ndim == 1 else float(len(z))
    if total <= 0:
        raise ValueError("a mean needs at least one row whose class weight is above 0")
    return np.asarray(losses.sum() / total)


def _weights(class_weights: npt.ArrayLike | None, classes: int) -> Floats:
    w = np.ones(classes) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
    if w.shape != (classes,) or not ((w >= 0) & (w <= MAX_WEIGHT)).all():
        raise ValueError(f"class weights must be {classes} numbers from 0 to {MAX_WEIGHT:g}")
    return w


def entropy(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return H(p) = -Σ p ln p in nats, the expected cross-entropy of a calibrated model."""
    log_p = log_softmax(logits, temperature)
    return np.asarray(0.0 - (np.exp(log_p) * log_p).sum(axis=-1))  # 0 - x gives 0.0 instead of -0.0


def loss_variance(logits: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return Σ p (ln p)² - H(p)², nats²: the variance of the loss of a calibrated row, used for z of the loss gap."""
    log_p = log_softmax(logits, temperature)
    p = np.exp(log_p)
    return np.asarray(np.maximum((p * log_p**2).sum(axis=-1) - (p * log_p).sum(axis=-1) ** 2, 0.0))


def brier(logits: npt.ArrayLike, targets: npt.ArrayLike, temperature: float = 1.0) -> Floats:
    """Return Σ_k (p_k - q_k)² per row (N,), 0..2 (Brier 1950, summed over classes)."""
    p = np.atleast_2d(softmax(logits, temperature))
    return np.asarray(((p - as_distributions(np.atleast_1d(np.asarray(targets)), p.shape[1])) ** 2).sum(axis=1))


def correct(logits: npt.ArrayLike, targets: npt.ArrayLike) -> Floats:
    """Return the target's probability of the predicted class per row (N,): 0 or 1 for a class index."""
    z = np.atleast_2d(scaled(logits))
    q = as_distributions(np.atleast_1d(np.asarray(targets)), z.shape[1])
    return np.asarray(q[np.arange(len(z)), z.argmax(axis=1)])


@dataclass(frozen=True)
class Reliability:
    """Sums over the rows of each bin of the top probability. Every field has shape (bins,)."""

    count: Floats
    confidence: Floats  # sum of the top probabilities
    correct: Floats  # sum of `correct`

    def ece(self) -> float:
        """Return the expected calibration error Σ |confidence - correct| / N (Naeini et al. 2015)."""
        return float(abs(self.confidence - self.correct).sum() / max(self.count.sum(), 1.0))


def bin_of(confidence: npt.ArrayLike, bins: int = RELIABILITY_BINS) -> npt.NDArray[np.int64]:
    """Return the index k of the bin (k/bins, (k+1)/bins] of each confidence; zero belongs to the first bin."""
    return np.asarray(np.searchsorted(np.arange(1, bins) / bins, np.asarray(confidence)), dtype=np.int64)


def reliability(
    logits: npt.ArrayLike, targets: npt.ArrayLike, temperature: float = 1.0, bins: int = RELIABILITY_BINS
) -> Reliability:
    """Sum counts, confidences and correct predictions in equal-width bins of the top probability."""
    top = np.atleast_2d(softmax(logits, temperature)).max(axis=1)
    k, hits = bin_of(top, bins), correct(logits, targets)
    return Reliability(*(np.bincount(k, w, bins).astype(np.float64) for w in (np.ones_like(top), top, hits)))


def ece(logits: npt.ArrayLike, targets: npt.ArrayLike, temperature: float = 1.0, bins: int = RELIABILITY_BINS) -> float:
    """Return the expected calibration error over equal-width bins of the top probability."""
    return reliability(logits, targets, temperature, bins).ece()


def ece_noise_band(
    logits: npt.ArrayLike,
    temperature: float = 1.0,
    draws: int = 200,
    seed: int = 0,
    bins: int = RELIABILITY_BINS,
    coins: int = 10**6,
) -> tuple[float, float]:
    """Return the 5th and 95th percentile of ECE of a perfectly calibrated model with these confidences.

    A calibrated model is correct with a probability equal to its confidence, so no labels are needed. Up to `coins`
    rows are simulated individually. For more rows, the sum of a bin is drawn from a normal distribution.
    """
    top = np.atleast_2d(softmax(logits, temperature)).max(axis=1)
    k, random = bin_of(top, bins), np.random.default_rng(seed)
    if len(top) <= coins:
        gaps = np.array([np.bincount(k, (random.random(len(top)) < top) - top, bins) for _ in range(draws)])
    else:
        gaps = random.normal(0, np.sqrt(np.bincount(k, top * (1 - top), bins)), (draws, bins))
    low, high = np.quantile(np.abs(gaps).sum(axis=1) / max(len(top), 1), [0.05, 0.95])
    return float(low), float(high)


def fit_temperature(
    logits: npt.ArrayLike, targets: npt.ArrayLike, weights: npt.ArrayLike | None = None, tolerance: float = 1e-9
) -> float:
    """Return the temperature in 0.01..100 with the lowest mean cross-entropy (Guo et al. 2017).

    Mean cross-entropy is convex in b = 1/T with slope E_p[z] - E_q[z]. The root of the slope is found by bisection
    over ln T. The result is a bound if the loss still decreases there (separable data), and 1.0 if the loss is flat.

    Args:
        logits: (N, C).
        targets: (N,) indices or (N, C) distributions.
        weights: (N,), >= 0; equal if absent.
        tolerance: width in ln T at which the search stops.

    Raises:
        ValueError: no rows, or an argument that `cross_entropy` rejects.
    """
    z = np.atleast_2d(scaled(logits))
    q = as_distributions(np.atleast_1d(np.asarray(targets)), z.shape[1])
    w = np.ones(len(z)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(z) == 0 or len(q) != len(z) or w.shape != (len(z),) or not (w >= 0).all() or not 0 < w.sum() < np.inf:
        raise ValueError("a temperature needs rows, one target and one weight >= 0 for each, not all of them 0")
    # A shift of a row does not change the slope, and small numbers lose fewer digits. numpy sums long columns fastest.
    z = np.asfortranarray(z - z.max(axis=1, keepdims=True))
    observed = w @ (q * z).sum(axis=1)

    def slope(log_t: float) -> float:  # of the loss over 1/T
        return float(w @ (softmax(z, float(np.exp(log_t))) * z).sum(axis=1) - observed)

    low, high = np.log(MIN_TEMPERATURE) + 1e-12, np.log(MAX_TEMPERATURE) - 1e-12
    if slope(low) == 0 == slope(high):
        return 1.0
    if slope(low) <= 0:  # the loss decreases up to the largest 1/T
        return MIN_TEMPERATURE
    if slope(high) >= 0:
        return MAX_TEMPERATURE
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))
