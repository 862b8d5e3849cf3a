"""Prediction sets: two scores, their thresholds, the sets. numpy only.

A set contains every class whose score is at most the threshold, and always the most probable class. The threshold is
the weighted quantile of the scores of true classes on held-out rows (split conformal, Vovk et al. 2005).
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats

Method = Literal["lac", "aps"]


def class_scores(logits: npt.ArrayLike, temperature: float, method: Method) -> Floats:
    """Return the nonconformity score of each class, (N, C), 0..1.

    `lac`: 1 - p_k (Sadinle, Lei, Wasserman 2019), the smallest sets on average.
    `aps`: the mass of all classes at least as probable as k (Romano, Sesia, Candès 2020), not randomised: larger sets
    that adapt to each row.
    """
    return scores_from_probabilities(np.atleast_2d(numerics.softmax(logits, temperature)), method)


def scores_from_probabilities(p: Floats, method: Method) -> Floats:
    """Return the scores of probabilities (N, C), as `class_scores`."""
    if method == "lac":
        return np.asarray(1 - p)
    at_least = p[:, None, :] >= p[:, :, None]  # (N, k, j): class j is at least as probable as k
    return np.asarray((at_least * p[:, None, :]).sum(axis=2))


def fit_threshold(
    logits: npt.ArrayLike,
    targets: npt.NDArray[np.int64],
    weights: Floats,
    temperature: float,
    level: float,
    method: Method = "lac",
) -> float:
    """Return the weighted quantile of the scores of true classes at `level`."""
    scores = class_scores(logits, temperature, method)
    true_scores = scores[np.arange(len(scores)), targets]
    order = np.argsort(true_scores)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(min(true_scores[order][np.searchsorted(share, level)], 1.0))


def prediction_sets(
    logits: npt.ArrayLike, temperature: float, threshold: float, method: Method = "lac"
) -> npt.NDArray[np.bool_]:
    """Return which classes belong to the prediction set, (N, C)."""
    return sets_from_probabilities(np.atleast_2d(numerics.softmax(logits, temperature)), threshold, method)


def sets_from_probabilities(p: Floats, threshold: float, method: Method = "lac") -> npt.NDArray[np.bool_]:
    """Return the sets of probabilities (N, C), as `prediction_sets`."""
    scores = scores_from_probabilities(p, method)
    return np.asarray(scores <= np.maximum(scores.min(axis=1, keepdims=True), threshold))
