"""Fit a temperature on labelled predictions, with cross-validation by engine. numpy only.

The fit is not applied here. The result contains the expected changes of metrics. `FitRefused` contains the reason.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation.cluster_bootstrap import (
    MIN_ENGINES,
    EngineGroups,
    central_interval,
    group_by_engine,
    resample_sums,
)
from model.numerics import RELIABILITY_BINS, Floats

MIN_ROWS = 100  # the standard error of ln T is then about 0.2 for independent rows
FOLDS = 5
FOLD_TOLERANCE = 1e-6  # in ln T; the loss is flat at its minimum
Reason = Literal["too_few_engines", "too_few_rows", "one_class", "no_finite_temperature", "held_out_loss_does_not_fall"]


class FitRefused(ValueError):
    """These labels do not support another temperature. The message is a sentence, `reason` is the case."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class MetricChange:
    """A metric on held-out engines before and after, and the 90 % interval of after - before by engine bootstrap."""

    before: float
    after: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class TemperatureFit:
    """The temperature fitted to all rows. Metrics are of the cross-validation, on held-out engines."""

    temperature: float
    rows: int
    engines: int
    held_out_temperatures: tuple[float, ...]
    cross_entropy: MetricChange
    ece: MetricChange

    @property
    def significant(self) -> bool:
        """Whether the whole interval of cross-entropy is below zero; otherwise the gain may be noise."""
        return self.cross_entropy.interval[1] < 0


def cross_validate_temperature(
    logits: npt.ArrayLike, labels: npt.ArrayLike, engine: npt.ArrayLike, temperature: npt.ArrayLike, folds: int = FOLDS
) -> TemperatureFit:
    """Fit a temperature and compare it on held-out engines with the temperature in use.

    The order of rows has no effect: engines are assigned to folds in the order of their ids.

    Args:
        logits: (N, C), not divided by a temperature.
        labels: (N,) class indices or (N, C) distributions.
        engine: (N,) ids.
        temperature: in use, a number or one per row (N,).
        folds: number of folds; each engine is held out once.

    Raises:
        FitRefused: too few engines or rows, a single class, no finite temperature, no gain on held-out engines.
        ValueError: as `numerics.fit_temperature`, or lengths differ.
    """
    z, engines = np.atleast_2d(numerics.scaled(logits)), group_by_engine(engine)
    q = numerics.as_distributions(labels, z.shape[1])
    before = numerics.scaled_rows(z, temperature)
    if not len(z) == len(q) == len(engines.index):
        raise ValueError(
            f"the lengths must be equal: {len(z)} rows of logits, {len(q)} labels and {len(engines.index)} engine ids"
        )
    _check_enough(engines, q)
    held_out, fold_temperatures = z.copy(), []
    for fold in range(folds):
        in_fold = engines.index % folds == fold
        t = numerics.fit_temperature(z[~in_fold], q[~in_fold], tolerance=FOLD_TOLERANCE)
        held_out[in_fold] /= t
        fold_temperatures.append(t)
    fitted = _fit_finite_temperature(z, q)
    losses = _loss_change(before, held_out, q, engines)
    if losses.difference >= 0:
        raise FitRefused("held_out_loss_does_not_fall", _no_gain_message(losses, fitted))
    return TemperatureFit(
        fitted, len(z), engines.count, tuple(fold_temperatures), losses, _ece_change(before, held_out, q, engines)
    )


def _check_enough(engines: EngineGroups, q: Floats) -> None:
    if engines.count < MIN_ENGINES:
        raise FitRefused("too_few_engines", f"labels of {engines.count} engines are too few; a fit needs {MIN_ENGINES}")
    if len(q) < MIN_ROWS:
        raise FitRefused("too_few_rows", f"{len(q)} labelled predictions are too few; a fit needs {MIN_ROWS}")
    if np.count_nonzero(q.sum(axis=0)) < 2:
        raise FitRefused("one_class", "all labels are of one class; a fit needs labels of at least two classes")


def _fit_finite_temperature(z: Floats, q: Floats) -> float:
    t = numerics.fit_temperature(z, q)
    if t in (numerics.MIN_TEMPERATURE, numerics.MAX_TEMPERATURE):
        message = f"the loss has no minimum at a permitted temperature; it still decreases at the bound {t:g}"
        raise FitRefused("no_finite_temperature", message)
    return t


def _no_gain_message(losses: MetricChange, fitted: float) -> str:
    low, high = losses.interval
    return (
        f"on held-out engines, a temperature fitted to the other engines (about {fitted:.3g}) raises cross-entropy by "
        f"{losses.difference:.2g} nats (90 % from {low:+.2g} to {high:+.2g})"
    )


def _loss_change(before: Floats, after: Floats, q: Floats, engines: EngineGroups) -> MetricChange:
    loss_before, loss_after = (numerics.cross_entropy(z, q, reduction="none") for z in (before, after))
    totals = resample_sums(
        np.column_stack([engines.sum_rows(loss_after - loss_before), engines.sum_rows(np.ones(len(q)))])
    )
    means = float(loss_before.mean()), float(loss_after.mean())
    return MetricChange(*means, means[1] - means[0], central_interval(totals[:, 0] / totals[:, 1]))


def _ece_change(before: Floats, after: Floats, q: Floats, engines: EngineGroups) -> MetricChange:
    columns = []
    for z in (before, after):
        top = numerics.softmax(z).max(axis=1)
        columns.append(engines.sum_rows_by_bin(top - numerics.correct(z, q), numerics.bin_of(top), RELIABILITY_BINS))
    totals = resample_sums(np.column_stack([*columns, engines.sum_rows(np.ones(len(q)))]))
    ece_before, ece_after = (abs(part).sum(axis=1) / totals[:, -1] for part in np.split(totals[:, :-1], 2, axis=1))
    values = [float(abs(column.sum(axis=0)).sum() / len(q)) for column in columns]
    return MetricChange(values[0], values[1], values[1] - values[0], central_interval(ece_after - ece_before))
