"""What an evaluation says of some rows: one function a figure, one dictionary a line of a table. numpy only."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model import contract, numerics
from model.numerics import Floats

Integers = npt.NDArray[np.int64]


class Answers(NamedTuple):
    """What a network says of some rows, and what is true: logits (N, C), labels (N,), RUL (N,) cycles."""

    logits: Floats
    labels: Integers
    rul: Floats
    true_rul: Floats


def rows_of(parts: list[Answers], last_only: bool) -> Answers:
    """All rows of some engines, or only their last."""
    return Answers(
        *(
            np.concatenate([column[-1:] if last_only else column for column in columns])
            for columns in zip(*parts, strict=True)
        )
    )


def macro_f1(predicted: Integers, labels: Integers, classes: int) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); a class neither predicted nor true counts 0."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    sizes = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float(np.mean(2 * hits / np.maximum(sizes, 1)))


def nasa_score(rul: Floats, true_rul: Floats) -> float:
    """Σ exp(-d/13) - 1 where d = predicted - true < 0, exp(d/10) - 1 else (Saxena et al. 2008): late costs more."""
    d = rul - true_rul
    return float(np.expm1(np.where(d < 0, -d / 13, d / 10)).sum())


def rmse(rul: Floats, true_rul: Floats) -> float:
    """√ mean (predicted - true)², cycles."""
    return float(np.sqrt(((rul - true_rul) ** 2).mean()))


def of_classes(found: Answers, temperature: float) -> dict[str, float]:
    """Figures of the class probabilities. A two-step error calls a normal engine critical, or a critical one normal."""
    top, last = found.logits.argmax(axis=1), found.logits.shape[1] - 1
    critical = found.labels == last
    low, high = numerics.ece_noise_band(found.logits, temperature)
    return {
        "n": len(found.labels),
        "accuracy": float((top == found.labels).mean()),
        "macro-F1": macro_f1(top, found.labels, last + 1),
        "cross-entropy": float(numerics.cross_entropy(found.logits, found.labels, temperature)),
        "ECE": numerics.ece(found.logits, found.labels, temperature),
        "ECE low": low,
        "ECE high": high,
        "Brier": float(numerics.brier(found.logits, found.labels, temperature).mean()),
        "critical recall": float((top[critical] == last).mean()) if critical.any() else float("nan"),
        "two-step errors": float((abs(top - found.labels) >= 2).mean()),
        "entropy": float(numerics.entropy(found.logits, temperature).mean()),
    }


def of_rul(found: Answers) -> dict[str, float]:
    """Figures of the RUL: capped at 125 cycles, as the literature has it, and against the raw truth."""
    capped = np.minimum(found.true_rul, contract.RUL_CAP)
    return {
        "RUL RMSE": rmse(found.rul, capped),
        "raw RMSE": rmse(found.rul, found.true_rul),
        "NASA score": nasa_score(found.rul, capped),
    }


def of_sets(labels: Integers, sets: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Coverage and mean size of prediction sets (N, C)."""
    return {
        "coverage": float(sets[np.arange(len(sets)), labels].mean()) if len(sets) else float("nan"),
        "set size": float(sets.sum(axis=1).mean()) if len(sets) else float("nan"),
    }
