"""What labelled rows say, as sections of a report: the live monitor's and offline ones, so that both agree. numpy only.

Where nothing can be said, a figure is NaN; `finite` makes it null.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation import reliability
from model.evaluation.cluster_bootstrap import Engines, engines_of, interval, resampled
from model.numerics import Floats, Reliability

COINS = 20_000  # rows up to which the noise band of ECE tosses each coin; beyond, a bin's sum is normal
Json = dict[str, Any]


@dataclass(frozen=True)
class Labelled:
    """Labelled rows, measured once. Losses in nats."""

    z: Floats  # (N, C) logits, divided by their temperatures
    p: Floats  # (N, C) probabilities
    q: Floats  # (N, C) truth as distributions
    top: Floats  # (N,) largest probability
    correct: Floats  # (N,) probability that the truth gives to the predicted class
    loss: Floats  # (N,)
    entropy: Floats  # (N,) the loss that the model expects
    variance: Floats  # (N,) nats², of the loss as the model expects it
    engines: Engines


def labelled(z: Floats, q: npt.ArrayLike, engine: npt.ArrayLike) -> Labelled:
    """Measure rows: z (N, C) scaled logits, q (N,) class indices or (N, C) distributions, engine (N,) ids.

    Raises:
        ValueError: anything that `numerics.cross_entropy` refuses.
    """
    z = np.asfortranarray(z)  # a column a class: numpy adds long columns several times faster than short rows
    truth, p = np.asfortranarray(numerics.as_distributions(q, z.shape[1])), numerics.softmax(z)
    loss, correct = numerics.cross_entropy(z, truth, reduction="none"), numerics.correct(z, truth)
    expected, variance = numerics.entropy(z), numerics.loss_variance(z)
    return Labelled(z, p, truth, p.max(axis=1), correct, loss, expected, variance, engines_of(engine))


def sections(found: Labelled, classes: tuple[str, ...]) -> Json:
    """Every section that needs nothing but labelled rows, in the order of the report."""
    bins = numerics.reliability(found.z, found.q)
    return {
        "cross_entropy": cross_entropy(found),
        "brier": mean(((found.p - found.q) ** 2).sum(axis=1)),
        "brier_decomposition": reliability.brier_parts(found.p, found.q)._asdict() if len(found.p) else None,
        "accuracy": mean(found.correct),
        "ece": ece(found, bins),
        "reliability": diagram(bins),
        "classes": [of_class(found, k, name) for k, name in enumerate(classes)],
    }


def cross_entropy(found: Labelled) -> Json:
    """Realised and expected, and their gap: z with rows as the unit, z_engines and 90 % interval with engines.

    `z_engines` is what resampling engines tends to: the gap over the spread of engines' sums about their share of it
    (the cluster-robust error of a ratio), so that it does not depend on a seed.
    """
    x, n, count = found.loss - found.entropy, len(found.loss), found.engines.count
    sums, sizes = found.engines.sums(x), found.engines.sums(np.ones(n))
    spread = np.sqrt(((sums - sizes * mean(x)) ** 2).sum() * count / (count - 1)) if count > 1 else np.nan
    drawn = resampled(np.column_stack([sums, sizes])) if n else np.empty((0, 2))
    return {
        "realised": mean(found.loss),
        "expected": mean(found.entropy),
        "gap": mean(x),
        "z": ratio(x.sum(), np.sqrt(found.variance.sum())),
        "z_engines": ratio(x.sum(), spread),
        "interval": interval(drawn[:, 0] / drawn[:, 1]) if n else None,
    }


def ece(found: Labelled, bins: Reliability) -> Json:
    """ECE of equal-width bins, the band in which a calibrated model's would lie, of equal masses, and an interval."""
    if len(found.top) == 0:
        return {"value": None, "noise_band": None, "equal_mass": None, "interval": None}
    ordered = found.z[np.argsort(found.top)] if len(found.z) <= COINS else found.z  # each its coin, whatever the order
    return {
        "value": bins.ece(),
        "noise_band": numerics.ece_noise_band(ordered, coins=COINS),
        "equal_mass": reliability.equal_mass_ece(found.top, found.correct),
        "interval": reliability.ece_interval(found.top, found.correct, found.engines),
    }


def diagram(bins: Reliability) -> list[Json]:
    """The reliability diagram: a bin holds the confidences in (lower, upper]."""
    width = len(bins.count)
    return [
        {
            "lower": k / width,
            "upper": (k + 1) / width,
            "n": int(n),
            "confidence": ratio(bins.confidence[k], n),
            "accuracy": ratio(bins.correct[k], n),
        }
        for k, n in enumerate(bins.count)
    ]


def of_class(found: Labelled, k: int, name: str) -> Json:
    """One class: how many were, ECE, recall and precision, and its share as said (mean p) and as seen (mean truth)."""
    said, seen = found.p[:, k], found.q[:, k]
    called = found.z.argmax(axis=1) == k
    n, hits = float(seen.sum()), float(seen[called].sum())
    return {
        "class": name,
        "n": int(n) if n.is_integer() else n,  # soft labels make parts of a row
        "ece": reliability.class_ece(said, seen) if len(said) else np.nan,
        "recall": ratio(hits, n),
        "precision": ratio(hits, called.sum()),
        "said": mean(said),
        "seen": mean(seen),
    }


def mean(values: npt.NDArray[Any]) -> float:
    """The mean, NaN of nothing."""
    return float(values.mean()) if len(values) else np.nan


def ratio(above: float, below: float) -> float:
    """A quotient, NaN where there is nothing to divide by."""
    return float(above / below) if below > 0 else np.nan


def finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity and knows no numpy: such floats become null, numpy's become Python's."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if np.isfinite(value) else None
    return value
