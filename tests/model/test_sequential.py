import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model import numerics
from model.evaluation import sequential
from model.evaluation.cluster_bootstrap import group_by_engine
from model.evaluation.sequential import SCALES, Deviations, evidence, log_e, of_class, of_losses

logits = arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-60, 60))


def losses_of(z: np.ndarray, labels: np.ndarray) -> Deviations:
    loss = numerics.cross_entropy(z, labels, reduction="none")
    return of_losses(z, loss, numerics.entropy(z), numerics.loss_variance(z))


def some(rows: int, seed: int = 0) -> tuple[Deviations, np.ndarray]:
    random = np.random.default_rng(seed)
    z = random.normal(0, 2, (rows, 3))
    return losses_of(z, random.integers(0, 3, rows)), random.integers(0, rows // 5, rows)


def test_e_is_the_mean_of_robbins_mixtures() -> None:
    """Ln E is what the formula gives when it is written out, term by term."""
    for total, variance in ((0.0, 0.0), (3.0, 2.0), (-40.0, 120.0), (1e4, 1e6)):
        terms = [np.sqrt(r / (variance + r)) * np.exp(total**2 / (2 * (variance + r))) for r in SCALES]
        assert np.log(np.mean(terms)) == pytest.approx(float(log_e(total, variance)), abs=1e-12)


def test_variances_by_hand() -> None:
    """Two engines, one of two rows: the larger of rows and engines, with the unseen surprise on its side."""
    found = Deviations(np.array([1.0, 2.0, -1.0]), np.ones(3), np.array([16.0, 16, 16]), np.array([1.0, 1, 1]))
    seen = evidence(found, group_by_engine([7, 7, 9]))
    rows, squares, together = (1 + 4 + 1 + 2 * 3) / 3, (1 + 2) ** 2 + 1, (1 + 1) ** 2 + 1
    assert (3, 2.0) == (seen.n, seen.total)
    assert max(rows, squares + ((1 + 1) ** 4 + 1) / together) == pytest.approx(seen.variance_above)
    assert max(rows, squares + ((2 + 2) ** 4 + 2**4) / together) == pytest.approx(seen.variance_below)


@given(logits)
def test_moments_are_those_of_the_truth_as_the_model_says(z: np.ndarray) -> None:
    """Over all truths, weighed as the probabilities say, the mean is zero and variance and tails are as stated."""
    p = numerics.softmax(z)
    for k in range(z.shape[1]):
        brought = [
            (losses_of(z, np.full(len(z), y)), of_class(p[:, k], np.full(len(z), float(y == k))))
            for y in range(z.shape[1])
        ]
        for kind in (0, 1):
            x = np.stack([pair[kind].x for pair in brought], axis=1)
            said = brought[0][kind]
            np.testing.assert_allclose(0.0, (p * x).sum(axis=1), atol=1e-9)
            np.testing.assert_allclose((p * x**2).sum(axis=1), said.variance, atol=1e-7, rtol=1e-6)
            np.testing.assert_allclose((p * np.maximum(x, 0) ** 4).sum(axis=1), said.above, atol=1e-7, rtol=1e-6)
            np.testing.assert_allclose((p * np.maximum(-x, 0) ** 4).sum(axis=1), said.below, atol=1e-7, rtol=1e-6)


def test_the_order_of_rows_does_not_matter() -> None:
    """The evidence at the end is the same however the labels came in, and whatever the engines are called."""
    found, engine = some(300)
    order = np.random.default_rng(1).permutation(300)
    moved = Deviations(*(column[order] for column in vars(found).values()))
    one, other = evidence(found, group_by_engine(engine)), evidence(moved, group_by_engine(1000 - engine[order]))
    assert vars(one) == pytest.approx(vars(other), rel=1e-12)


def test_a_fleet_twice_is_twice_the_total_and_the_same_surprise() -> None:
    """As many engines again with the same rows double totals and squares, but not what one unseen engine may bring."""
    found, engine = some(300)
    twice = Deviations(*(np.tile(column, 2) for column in vars(found).values()))
    engines, both = group_by_engine(engine), group_by_engine(np.concatenate([engine, engine + 1000]))
    one, two = evidence(found, engines), evidence(twice, both)
    squares = float((engines.sum_rows(found.x) ** 2).sum())
    assert 2 * one.total == pytest.approx(two.total)
    assert squares == pytest.approx(two.variance_below - one.variance_below)


def test_rows_of_one_engine_are_weaker_than_rows_of_many() -> None:
    """The same rows say less when they are of few engines."""
    found, _ = some(300)
    alone = Deviations(abs(found.x), found.variance, found.above, found.below)
    each = [evidence(alone, group_by_engine(np.arange(300) % count)).log_e for count in (300, 60, 12)]
    assert each == sorted(each, reverse=True)
    assert each[0] > np.log(20) > each[-1]


def test_engines_without_a_surprise_prove_little() -> None:
    """Forty engines that were said to be fine with 0.99, and are, alarm nobody, though each is seen a hundred times."""
    z = np.tile(np.log([0.99, 0.007, 0.003]), (4000, 1))
    found = losses_of(z, np.zeros(4000, dtype=int))
    assert evidence(found, group_by_engine(np.arange(4000))).log_e > np.log(1e6)
    assert evidence(found, group_by_engine(np.arange(4000) // 100)).log_e < np.log(20)


@given(st.floats(-1e3, 1e3), st.floats(0, 1e5), st.floats(0, 1e5), st.sampled_from([0.04, 0.01, 0.3]))
def test_the_sequence_leaves_zero_out_exactly_when_it_alarms(
    t: float, above: float, below: float, alpha: float
) -> None:
    """Interval and e-value are one test: the mean lies off zero if and only if E reaches 1/alpha."""
    found = sequential.Evidence(10, t, above, below)
    low, high = found.mean_within(alpha)
    assert low <= found.total / 10 <= high
    if abs(found.log_e + np.log(alpha)) > 1e-9:
        assert (found.log_e >= -np.log(alpha)) == (not low <= 0 <= high)


def test_without_rows_there_is_no_evidence() -> None:
    """Nothing seen is an e-value of 1 and a mean that may be anything."""
    none = Deviations(*(np.array([]) for _ in range(4)))
    found = evidence(none, group_by_engine(np.array([], dtype=int)))
    assert (0.0, (-np.inf, np.inf)) == (found.log_e, found.mean_within(0.05))


@pytest.mark.parametrize("z", [[[1e4, 0.0, -1e4]], [[3e38, -3e38, 0.0]], [[5.0]]])
def test_probabilities_of_zero_and_one_stay_finite(z: list[list[float]]) -> None:
    """Certainty, its confident mistake, and one class alone give finite evidence."""
    for label in range(len(z[0])):
        found = losses_of(np.array(z), np.array([label]))
        assert all(np.isfinite(column).all() for column in vars(found).values())
        assert np.isfinite(evidence(found, group_by_engine([0])).log_e)
