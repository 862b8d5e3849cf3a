"""Scores of labelled predictions, as metrics and responses need them. Pure arithmetic."""

import numpy as np
import numpy.typing as npt

from model import numerics
from model.numerics import Floats
from service.inference.predictions import Mask, Predictions
from service.metrics import Labelled


def score_labels(logits: npt.ArrayLike, labels: Floats, temperature: float, sets: Mask | None) -> Labelled:
    """Score N labelled predictions: logits and labels (N, C) at one temperature, and prediction sets (N, C)."""
    return Labelled(
        loss=numerics.cross_entropy(logits, labels, temperature, reduction="none"),
        expected_loss=numerics.entropy(logits, temperature),
        variance=numerics.loss_variance(logits, temperature),
        correct=numerics.correct(logits, labels),
        brier=numerics.brier(logits, labels, temperature),
        covered=None if sets is None else (labels * sets).sum(axis=1),
        bins=numerics.reliability(logits, labels, temperature),
    )


def score_labelled_rows(answers: Predictions, targets: Floats, temperature: float) -> Labelled:
    """Score those of N predictions whose target (N, C) is not a row of NaN."""
    labelled = ~np.isnan(targets[:, 0])
    sets = None if answers.sets is None else answers.sets[labelled]
    return score_labels(answers.logits[labelled], targets[labelled], temperature, sets)
