"""Prediction sets: two scores, their thresholds, the sets. numpy only.

A set holds every class whose score is at most the threshold, the weighted quantile of the true classes' scores on rows
that the network never learned from (split conformal, Vovk et al. 2005). The most probable class always belongs.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats

Method = Literal["lac", "aps"]


def scores(logits: npt.ArrayLike, temperature: float, method: Method) -> Floats:
    """How strange each class would be, (N, C), 0..1.

    `lac`: 1 - p_k (Sadinle, Lei, Wasserman 2019), the smallest sets on average.
    `aps`: the mass of all classes at least as probable as k (Romano, Sesia, Candès 2020), not randomised: larger sets
    that adapt to each row.
    """
    return scores_of(np.atleast_2d(numerics.softmax(logits, temperature)), method)


def scores_of(p: Floats, method: Method) -> Floats:
    """As `scores`, from the probabilities (N, C) themselves."""
    if method == "lac":
        return np.asarray(1 - p)
    at_least = p[:, None, :] >= p[:, :, None]  # (N, k, j): class j is at least as probable as k
    return np.asarray((at_least * p[:, None, :]).sum(axis=2))


def threshold(
    logits: npt.ArrayLike,
    targets: npt.NDArray[np.int64],
    weights: Floats,
    temperature: float,
    level: float,
    method: Method = "lac",
) -> float:
    """The weighted quantile of the true classes' scores at `level`."""
    found = scores(logits, temperature, method)
    score = found[np.arange(len(found)), targets]
    order = np.argsort(score)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(min(score[order][np.searchsorted(share, level)], 1.0))


def sets(logits: npt.ArrayLike, temperature: float, limit: float, method: Method = "lac") -> npt.NDArray[np.bool_]:
    """Which classes belong to the prediction set, (N, C)."""
    return sets_of(np.atleast_2d(numerics.softmax(logits, temperature)), limit, method)


def sets_of(p: Floats, limit: float, method: Method = "lac") -> npt.NDArray[np.bool_]:
    """As `sets`, from the probabilities (N, C) themselves."""
    found = scores_of(p, method)
    return np.asarray(found <= np.maximum(found.min(axis=1, keepdims=True), limit))
