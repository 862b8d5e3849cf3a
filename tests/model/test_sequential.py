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


def random_deviations(rows: int, seed: int = 0) -> tuple[Deviations, np.ndarray]:
    random = np.random.default_rng(seed)
    z = random.normal(0, 2, (rows, 3))
    return losses_of(z, random.integers(0, 3, rows)), random.integers(0, rows // 5, rows)


def test_log_e_equals_the_formula() -> None:
    """Ln E equals the formula when written out term by term."""
    for total, variance in ((0.0, 0.0), (3.0, 2.0), (-40.0, 120.0), (1e4, 1e6)):
        terms = [np.sqrt(r / (variance + r)) * np.exp(total**2 / (2 * (variance + r))) for r in SCALES]
        assert np.log(np.mean(terms)) == pytest.approx(float(log_e(total, variance)), abs=1e-12)


def test_variances_of_an_example() -> None:
    """Two engines, one with two rows: V is the larger of rows and engines, plus the unobserved error on its side."""
    deviations = Deviations(np.array([1.0, 2.0, -1.0]), np.ones(3), np.array([16.0, 16, 16]), np.array([1.0, 1, 1]))
    result = evidence(deviations, group_by_engine([7, 7, 9]))
    rows, squares, together = (1 + 4 + 1 + 2 * 3) / 3, (1 + 2) ** 2 + 1, (1 + 1) ** 2 + 1
    assert (3, 2.0) == (result.n, result.total)
    assert max(rows, squares + ((1 + 1) ** 4 + 1) / together) == pytest.approx(result.variance_above)
    assert max(rows, squares + ((2 + 2) ** 4 + 2**4) / together) == pytest.approx(result.variance_below)


@given(logits)
def test_moments_are_those_of_predicted_labels(z: np.ndarray) -> None:
    """Over labels drawn from the probabilities, the mean is 0, and variance and tails are as stated."""
    p = numerics.softmax(z)
    for k in range(z.shape[1]):
        by_label = [
            (losses_of(z, np.full(len(z), y)), of_class(p[:, k], np.full(len(z), float(y == k))))
            for y in range(z.shape[1])
        ]
        for kind in (0, 1):
            x = np.stack([pair[kind].x for pair in by_label], axis=1)
            expected = by_label[0][kind]
            np.testing.assert_allclose(0.0, (p * x).sum(axis=1), atol=1e-9)
            np.testing.assert_allclose((p * x**2).sum(axis=1), expected.variance, atol=1e-7, rtol=1e-6)
            np.testing.assert_allclose((p * np.maximum(x, 0) ** 4).sum(axis=1), expected.above, atol=1e-7, rtol=1e-6)
            np.testing.assert_allclose((p * np.maximum(-x, 0) ** 4).sum(axis=1), expected.below, atol=1e-7, rtol=1e-6)


def test_evidence_ignores_the_order_of_rows() -> None:
    """The evidence does not depend on the order of rows or on engine ids."""
    deviations, engine = random_deviations(300)
    order = np.random.default_rng(1).permutation(300)
    permuted = Deviations(*(column[order] for column in vars(deviations).values()))
    result, shuffled = (
        evidence(deviations, group_by_engine(engine)),
        evidence(permuted, group_by_engine(1000 - engine[order])),
    )
    assert vars(result) == pytest.approx(vars(shuffled), rel=1e-12)


def test_repeated_fleet_doubles_total_and_squares() -> None:
    """Repeating a fleet doubles total and squares, but not the size of an unobserved error."""
    deviations, engine = random_deviations(300)
    twice = Deviations(*(np.tile(column, 2) for column in vars(deviations).values()))
    engines, both = group_by_engine(engine), group_by_engine(np.concatenate([engine, engine + 1000]))
    result, doubled = evidence(deviations, engines), evidence(twice, both)
    squares = float((engines.sum_rows(deviations.x) ** 2).sum())
    assert 2 * result.total == pytest.approx(doubled.total)
    assert squares == pytest.approx(doubled.variance_below - result.variance_below)


def test_rows_of_fewer_engines_are_weaker_evidence() -> None:
    """The same rows are weaker evidence if they belong to fewer engines."""
    deviations, _ = random_deviations(300)
    alone = Deviations(abs(deviations.x), deviations.variance, deviations.above, deviations.below)
    each = [evidence(alone, group_by_engine(np.arange(300) % count)).log_e for count in (300, 60, 12)]
    assert each == sorted(each, reverse=True)
    assert each[0] > np.log(20) > each[-1]


def test_engines_without_errors_are_weak_evidence() -> None:
    """Forty correct engines with P(normal) = 0.99 and 100 rows each raise no alarm."""
    z = np.tile(np.log([0.99, 0.007, 0.003]), (4000, 1))
    deviations = losses_of(z, np.zeros(4000, dtype=int))
    assert evidence(deviations, group_by_engine(np.arange(4000))).log_e > np.log(1e6)
    assert evidence(deviations, group_by_engine(np.arange(4000) // 100)).log_e < np.log(20)


@given(st.floats(-1e3, 1e3), st.floats(0, 1e5), st.floats(0, 1e5), st.sampled_from([0.04, 0.01, 0.3]))
def test_confidence_sequence_agrees_with_the_e_value(t: float, above: float, below: float, alpha: float) -> None:
    """The sequence excludes zero exactly when E reaches 1/alpha."""
    result = sequential.Evidence(10, t, above, below)
    low, high = result.mean_within(alpha)
    assert low <= result.total / 10 <= high
    if abs(result.log_e + np.log(alpha)) > 1e-9:
        assert (result.log_e >= -np.log(alpha)) == (not low <= 0 <= high)


def test_evidence_without_rows_is_neutral() -> None:
    """Without rows, the e-value is 1 and the sequence is infinite."""
    none = Deviations(*(np.array([]) for _ in range(4)))
    result = evidence(none, group_by_engine(np.array([], dtype=int)))
    assert (0.0, (-np.inf, np.inf)) == (result.log_e, result.mean_within(0.05))


@pytest.mark.parametrize("z", [[[1e4, 0.0, -1e4]], [[3e38, -3e38, 0.0]], [[5.0]]])
def test_evidence_at_certainty_is_finite(z: list[list[float]]) -> None:
    """Certainty, a confident error and a single class have finite evidence."""
    for label in range(len(z[0])):
        deviations = losses_of(np.array(z), np.array([label]))
        assert all(np.isfinite(column).all() for column in vars(deviations).values())
        assert np.isfinite(evidence(deviations, group_by_engine([0])).log_e)
