"""Evaluation metrics: one function per metric, one dictionary per row of a table. numpy only."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model import contract, numerics
from model.numerics import Floats

Integers = npt.NDArray[np.int64]


class EvaluatedRows(NamedTuple):
    """Predictions and ground truth of rows: logits (N, C), labels (N,), RUL (N,) in cycles."""

    logits: Floats
    labels: Integers
    rul: Floats
    true_rul: Floats


def concatenate_rows(parts: list[EvaluatedRows], last_only: bool) -> EvaluatedRows:
    """Concatenate all rows, or the last rows, of engines."""
    return EvaluatedRows(
        *(
            np.concatenate([column[-1:] if last_only else column for column in columns])
            for columns in zip(*parts, strict=True)
        )
    )


def macro_f1(predicted: Integers, labels: Integers, classes: int) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN). A class that is neither predicted nor true counts 0."""
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    sizes = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    return float(np.mean(2 * hits / np.maximum(sizes, 1)))


def nasa_score(rul: Floats, true_rul: Floats) -> float:
    """Return Σ exp(-d/13) - 1 for d = predicted - true < 0, else exp(d/10) - 1 (Saxena et al. 2008)."""
    d = rul - true_rul
    return float(np.expm1(np.where(d < 0, -d / 13, d / 10)).sum())


def rmse(rul: Floats, true_rul: Floats) -> float:
    """Return √ mean (predicted - true)² in cycles."""
    return float(np.sqrt(((rul - true_rul) ** 2).mean()))


def class_metrics(rows: EvaluatedRows, temperature: float) -> dict[str, float]:
    """Return metrics of class probabilities. A two-step error confuses `normal` and `critical`."""
    top, last = rows.logits.argmax(axis=1), rows.logits.shape[1] - 1
    critical = rows.labels == last
    low, high = numerics.ece_noise_band(rows.logits, temperature)
    return {
        "n": len(rows.labels),
        "accuracy": float((top == rows.labels).mean()),
        "macro-F1": macro_f1(top, rows.labels, last + 1),
        "cross-entropy": float(numerics.cross_entropy(rows.logits, rows.labels, temperature)),
        "ECE": numerics.ece(rows.logits, rows.labels, temperature),
        "ECE low": low,
        "ECE high": high,
        "Brier": float(numerics.brier(rows.logits, rows.labels, temperature).mean()),
        "critical recall": float((top[critical] == last).mean()) if critical.any() else float("nan"),
        "two-step errors": float((abs(top - rows.labels) >= 2).mean()),
        "entropy": float(numerics.entropy(rows.logits, temperature).mean()),
    }


def rul_metrics(rows: EvaluatedRows) -> dict[str, float]:
    """Return metrics of RUL, against the RUL capped at 125 cycles (usual in the literature) and the true RUL."""
    capped = np.minimum(rows.true_rul, contract.RUL_CAP)
    return {
        "RUL RMSE": rmse(rows.rul, capped),
        "raw RMSE": rmse(rows.rul, rows.true_rul),
        "NASA score": nasa_score(rows.rul, capped),
    }


def set_metrics(labels: Integers, sets: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return coverage and mean size of prediction sets (N, C)."""
    return {
        "coverage": float(sets[np.arange(len(sets)), labels].mean()) if len(sets) else float("nan"),
        "set size": float(sets.sum(axis=1).mean()) if len(sets) else float("nan"),
    }
