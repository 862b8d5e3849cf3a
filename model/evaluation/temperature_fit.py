"""A temperature fitted anew on labelled answers, and what engines left out say of it. numpy only.

Nothing is applied here: the fit says what would change, or is refused with the reason.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation.cluster_bootstrap import ENOUGH_ENGINES, Engines, engines_of, interval, resampled
from model.numerics import RELIABILITY_BINS, Floats

ENOUGH_ROWS = 100  # the logarithm of the temperature is then known to about a fifth, were all rows independent
FOLDS = 5
FOLD_TOLERANCE = 1e-6  # in ln T: losses are flat there, and five fits need not be finer
Reason = Literal["too_few_engines", "too_few_rows", "one_class", "no_finite_temperature", "held_out_loss_does_not_fall"]


class RefitRefused(ValueError):
    """There is no better temperature in these labels; the message is a sentence, `reason` names the case."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Change:
    """A measure on engines left out: before, after, and 90 % of the difference (after - before), engines resampled."""

    before: float
    after: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Refit:
    """The temperature from all rows; the measures are of temperatures that never saw the engine they are scored on."""

    temperature: float
    rows: int
    engines: int
    held_out_temperatures: tuple[float, ...]
    cross_entropy: Change
    ece: Change

    @property
    def sure(self) -> bool:
        """Whether all of the interval is a gain; if not, what is corrected may be noise."""
        return self.cross_entropy.interval[1] < 0


def refit(
    logits: npt.ArrayLike, labels: npt.ArrayLike, engine: npt.ArrayLike, temperature: npt.ArrayLike, folds: int = FOLDS
) -> Refit:
    """Fit a temperature and compare it, on engines left out, with the one that answered.

    The order of rows does not matter: engines are dealt to the folds in the order of their ids.

    Args:
        logits: (N, C) as the network gave them.
        labels: (N,) class indices or (N, C) distributions.
        engine: (N,) ids.
        temperature: what answered, one for all or (N,).
        folds: parts of the engines, each left out once.

    Raises:
        RefitRefused: too few engines or rows, one class only, no finite temperature, no gain on engines left out.
        ValueError: anything that `numerics.fit_temperature` refuses, or lengths that differ.
    """
    z, engines = np.atleast_2d(numerics.scaled(logits)), engines_of(engine)
    q = numerics.as_distributions(labels, z.shape[1])
    before = numerics.scaled_rows(z, temperature)
    if not len(z) == len(q) == len(engines.index):
        raise ValueError(f"{len(z)} rows of logits, {len(q)} labels and {len(engines.index)} engines do not fit")
    _check_enough(engines, q)
    held_out, parts = z.copy(), []
    for fold in range(folds):
        left_out = engines.index % folds == fold
        t = numerics.fit_temperature(z[~left_out], q[~left_out], tolerance=FOLD_TOLERANCE)
        held_out[left_out] /= t
        parts.append(t)
    fitted = _fitted(z, q)
    losses = _losses(before, held_out, q, engines)
    if losses.difference >= 0:
        raise RefitRefused("held_out_loss_does_not_fall", _no_gain(losses, fitted))
    return Refit(fitted, len(z), engines.count, tuple(parts), losses, _eces(before, held_out, q, engines))


def _check_enough(engines: Engines, q: Floats) -> None:
    if engines.count < ENOUGH_ENGINES:
        raise RefitRefused(
            "too_few_engines", f"labels of {engines.count} engines are too few: a fit needs {ENOUGH_ENGINES}"
        )
    if len(q) < ENOUGH_ROWS:
        raise RefitRefused("too_few_rows", f"{len(q)} labelled predictions are too few: a fit needs {ENOUGH_ROWS}")
    if np.count_nonzero(q.sum(axis=0)) < 2:
        raise RefitRefused("one_class", "all labels are of one class: a temperature from them would be certain of it")


def _fitted(z: Floats, q: Floats) -> float:
    t = numerics.fit_temperature(z, q)
    if t in (numerics.MIN_TEMPERATURE, numerics.MAX_TEMPERATURE):
        raise RefitRefused("no_finite_temperature", f"the loss still falls at the bound of temperatures, {t:g}")
    return t


def _no_gain(losses: Change, fitted: float) -> str:
    low, high = losses.interval
    return (
        f"on engines left out a temperature fitted to the others (about {fitted:.3g}) raises cross-entropy by "
        f"{losses.difference:.2g} nats (90 % from {low:+.2g} to {high:+.2g})"
    )


def _losses(before: Floats, after: Floats, q: Floats, engines: Engines) -> Change:
    was, becomes = (numerics.cross_entropy(z, q, reduction="none") for z in (before, after))
    drawn = resampled(np.column_stack([engines.sums(becomes - was), engines.sums(np.ones(len(q)))]))
    means = float(was.mean()), float(becomes.mean())
    return Change(*means, means[1] - means[0], interval(drawn[:, 0] / drawn[:, 1]))


def _eces(before: Floats, after: Floats, q: Floats, engines: Engines) -> Change:
    columns = []
    for z in (before, after):
        top = numerics.softmax(z).max(axis=1)
        columns.append(engines.sums_of_bins(top - numerics.correct(z, q), numerics.bin_of(top), RELIABILITY_BINS))
    drawn = resampled(np.column_stack([*columns, engines.sums(np.ones(len(q)))]))
    was, becomes = (abs(part).sum(axis=1) / drawn[:, -1] for part in np.split(drawn[:, :-1], 2, axis=1))
    values = [float(abs(column.sum(axis=0)).sum() / len(q)) for column in columns]
    return Change(values[0], values[1], values[1] - values[0], interval(becomes - was))
