import numpy as np
import pytest

from model.evaluation.cluster_bootstrap import GROUPS, engines_of, interval, resampled


def test_sums_are_over_each_engines_rows() -> None:
    """Rows of an engine are added wherever they stand, engines in the order of their ids, whatever the ids are."""
    engines = engines_of(["b", "a", "b"])
    assert (2, [1, 0, 1]) == (engines.count, engines.index.tolist())
    assert [2.0, 5.0] == engines.sums(np.array([1.0, 2.0, 4.0])).tolist()
    found = engines.sums_of_bins(np.array([1.0, 2.0, 4.0]), np.array([0, 2, 0]), 3)
    assert [[0, 0, 2], [5, 0, 0]] == found.tolist()


def test_no_rows_have_no_engines() -> None:
    """Nothing sums to nothing."""
    engines = engines_of(np.array([], dtype=int))
    assert (0, 0) == (engines.count, len(engines.sums(np.array([]))))


@pytest.mark.parametrize("count", [1, 20, GROUPS, 3 * GROUPS])
def test_a_resample_draws_as_many_engines(count: int) -> None:
    """Every resample counts as many engines as there are, and drawn in groups still about as many."""
    found = resampled(np.ones((count, 1)), draws=20)
    np.testing.assert_allclose(float(count), found, rtol=1e-12)


@pytest.mark.parametrize("count", [100, 10 * GROUPS + 7])
def test_resampled_totals_spread_as_the_engines_do(count: int) -> None:
    """Totals of resampled engines have the mean and the variance that theory gives, in groups and without."""
    sums = np.random.default_rng(0).normal(1, 2, (count, 1))
    found = resampled(sums, draws=4000)
    spread = np.sqrt(((sums - sums.mean()) ** 2).sum())
    assert float(sums.sum()) == pytest.approx(found.mean(), abs=4 * spread / np.sqrt(4000))
    assert float(spread) == pytest.approx(found.std(), rel=0.05)


def test_an_interval_is_the_middle_nine_tenths() -> None:
    """Of 0 to 100 it is 5 to 95."""
    assert (5.0, 95.0) == interval(np.arange(101.0))
