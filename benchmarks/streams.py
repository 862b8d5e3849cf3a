"""Simulated streams of exactly calibrated, labelled predictions, and the state of the monitor after every label.

Streams have independent rows, engines that run to failure, or the strongest dependence within an engine. The state
after one more label takes constant time here. `agrees` checks that it equals `calibration.statistics`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model import numerics
from model.evaluation import sequential
from model.evaluation.cluster_bootstrap import MIN_ENGINES
from model.evaluation.sequential import Deviations
from model.numerics import Floats
from service.calibration.statistics import ALPHA_CLASSES, ALPHA_GAP, CalibrationRows, calibration

CLASSES = ("normal", "degrading", "critical")
THRESHOLDS = (125.0, 50.0)  # cycles of remaining life
LIVES = np.arange(100.0, 360.0, 4.0)  # cycles that an engine may live
PRIOR = np.exp(-(((LIVES - 210) / 50) ** 2) / 2)
PRIOR /= PRIOR.sum()
ENGINE_BIAS, READING_NOISE = 0.5, 0.3  # of the clue, the logarithm of the remaining life
CYCLES = 4  # between two predictions of an engine
Integers = npt.NDArray[np.int64]
Random = np.random.Generator


class Stream(NamedTuple):
    """Labelled predictions in the order in which labels arrive."""

    z: Floats  # (N, 3) logits of the predictions
    label: Integers  # (N,)
    engine: Integers  # (N,)


def independent(random: Random, labels: int, sharpness: float = 1.0, engines: int | None = None) -> Stream:
    """Draw independent rows, by default one per engine. Logits have a standard deviation of 2."""
    z = random.normal(0, 2, (labels, 3))
    p = numerics.softmax(z)
    engine = np.arange(labels) if engines is None else random.integers(0, engines, labels)
    return Stream(z * sharpness, _draw_labels(p, random.random(labels)), engine)


def alike(random: Random, engines: int, rows: int) -> Stream:
    """Draw the strongest dependence: every row predicts 0.90, 0.07, 0.03, and all rows of an engine have one label."""
    p, engine = np.tile([0.9, 0.07, 0.03], (engines * rows, 1)), np.repeat(np.arange(engines), rows)
    return Stream(np.log(p), _draw_labels(p, random.random(engines)[engine]), engine)


def fleet(random: Random, engines: int, arrival: str, sharpness: float = 1.0) -> Stream:
    """Simulate engines that run to failure. Predictions are the exact posterior given a clue and the age.

    The clue is the logarithm of the remaining life with a bias per engine and a noise per reading. Errors of one engine
    therefore have one cause, although every row is calibrated.

    Args:
        random: source of random numbers.
        engines: number of engines.
        arrival: order of labels. `outcome`: all labels of an engine together, engine after engine. `daily`: every
            running engine is inspected at every age. `staggered`: the same, with different start days. `failing`: all
            engines start together, and labels arrive as engines fail.
        sharpness: factor of the logits; 1 is calibrated.
    """
    life = random.choice(LIVES, engines, p=PRIOR)
    age_of = [np.arange(1.0 + random.integers(CYCLES), cycles, CYCLES) for cycles in life]
    engine, age = np.repeat(np.arange(engines), [len(ages) for ages in age_of]), np.concatenate(age_of)
    left = life[engine] - age
    clue = np.log(left) + random.normal(0, ENGINE_BIAS, engines)[engine] + random.normal(0, READING_NOISE, len(age))
    p = np.maximum(_compute_belief(age, clue), 1e-12)
    label = np.searchsorted(-np.array(THRESHOLDS), -left)
    start = random.integers(0, 400, engines)[engine] if arrival == "staggered" else 0
    when = {"outcome": engine, "failing": life[engine]}.get(arrival, age + start)
    order = np.lexsort((random.random(len(age)), when))
    return Stream(np.log(p[order]) * sharpness, label[order], engine[order])


def _compute_belief(age: Floats, clue: Floats) -> Floats:
    """Return the posterior of the class (N, 3), given the clue and that the engine still runs at this age."""
    left = LIVES - age[:, None]
    spread = np.hypot(ENGINE_BIAS, READING_NOISE)
    likelihood = np.exp(-(((clue[:, None] - np.log(np.maximum(left, 1))) / spread) ** 2) / 2)
    weight = PRIOR * likelihood * (left > 0)
    bounds = (np.inf, *THRESHOLDS, 0.0)
    shares = [(weight * ((left <= high) & (left > low))).sum(axis=1) for high, low in pairwise(bounds)]
    return np.asarray(np.stack(shares, axis=1) / weight.sum(axis=1, keepdims=True))


def _draw_labels(p: Floats, uniform: Floats) -> Integers:
    return np.asarray((uniform[:, None] > p.cumsum(axis=1)[:, :-1]).sum(axis=1))


class Running(NamedTuple):
    """A total after each label, and its variance process above and below zero; every field (N,)."""

    total: Floats
    above: Floats
    below: Floats
    rows: Floats  # the part of the variance process with rows as the unit

    def log_e(self, mean_total: Floats | float = 0.0) -> Floats:
        """Return ln E against a mean with the given total."""
        away = self.total - mean_total
        return sequential.log_e(away, np.where(away > 0, self.above, self.below))


@dataclass(frozen=True)
class Looks:
    """State of the monitor after each label."""

    gap: Running
    log_e: Floats  # of the loss gap
    frequencies: Floats  # ln E of the class frequencies
    enough: npt.NDArray[np.bool_]  # whether there are enough engines for a state

    def alarms(self) -> npt.NDArray[np.bool_]:
        """Return where the state is overconfident, underconfident or drifting."""
        return np.asarray(
            self.detects(1) | self.detects(-1) | (self.frequencies >= -np.log(ALPHA_CLASSES)) & self.enough
        )

    def detects(self, sign: int) -> npt.NDArray[np.bool_]:
        """Return where the state is overconfident (sign 1) or underconfident (-1)."""
        return np.asarray((self.log_e >= -np.log(ALPHA_GAP)) & (np.sign(self.gap.total) == sign) & self.enough)


def looks(stream: Stream) -> Looks:
    """Compute the state of the monitor after every label of a stream."""
    p, q = numerics.softmax(stream.z), np.eye(3)[stream.label]
    loss = numerics.cross_entropy(stream.z, stream.label, reduction="none")
    losses = sequential.of_losses(stream.z, loss, numerics.entropy(stream.z), numerics.loss_variance(stream.z))
    gap = running(losses, stream.engine)
    classes = [running(sequential.of_class(p[:, k], q[:, k]), stream.engine).log_e() for k in range(3)]
    enough = np.cumsum(_sum_within_engine(stream.engine, np.ones(len(p)))[0] == 1) >= MIN_ENGINES
    return Looks(gap, gap.log_e(), sequential.mean_of_e(np.stack(classes, axis=-1)), enough)


def running(deviations: Deviations, engine: Integers) -> Running:
    """Compute `sequential.evidence` after each row."""
    rows = np.cumsum(deviations.x**2 + 2 * deviations.variance) / 3
    squares, together = _sum_powers(engine, deviations.x, 2), _sum_powers(engine, np.sqrt(deviations.variance), 2)
    above, below = (
        np.maximum(rows, squares + _sum_powers(engine, tail**0.25, 4) / np.where(together > 0, together, 1))
        for tail in (deviations.below, deviations.above)
    )
    return Running(np.cumsum(deviations.x), above, below, rows)


def _sum_powers(engine: Integers, values: Floats, power: int) -> Floats:
    """Return Σ over engines of (sum over its rows so far)^power, after each row."""
    now, before = _sum_within_engine(engine, values)
    return np.asarray(np.cumsum(now**power - before**power))


def _sum_within_engine(engine: Integers, values: Floats) -> tuple[Floats, Floats]:
    """Return the sum of the row's engine up to each row, including and excluding the row."""
    order = np.argsort(engine, kind="stable")
    total = np.cumsum(values[order])
    first = np.flatnonzero(np.diff(engine[order], prepend=-1))
    before = np.repeat((total - values[order])[first], np.diff(first, append=len(order)))
    sums = np.empty_like(total)
    sums[order] = total - before
    return sums, sums - values


def rows_of(stream: Stream, begin: int, end: int) -> CalibrationRows:
    """Return labels begin..end of a stream as the service passes them to the monitor."""
    n, part = end - begin, slice(begin, end)
    nothing, zero = np.full(n, np.nan), np.zeros(n)
    label, source = np.eye(3)[stream.label[part]], np.ones(n, dtype=int)
    return CalibrationRows(stream.z[part], np.ones(n), label, stream.engine[part], nothing, nothing, zero, zero, source)


def agrees(stream: Stream, seen: Looks, label: int) -> bool:
    """Return whether the state after a label (first: 0) equals that of `calibration` for the labels up to it."""
    answer = calibration(rows_of(stream, 0, label + 1), CLASSES, 0.0)
    e = [answer["evidence"][name]["log10_e"] * np.log(10) for name in ("gap", "classes")]
    alarmed = answer["state"] not in ("calibrated", "insufficient_data")
    same = np.allclose(e, [seen.log_e[label], seen.frequencies[label]], atol=1e-6)
    return bool(same and alarmed == seen.alarms()[label])
