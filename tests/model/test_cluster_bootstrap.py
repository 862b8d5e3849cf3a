import numpy as np
import pytest

from model.evaluation.cluster_bootstrap import MAX_RESAMPLED_UNITS, central_interval, group_by_engine, resample_sums


def test_sums_are_over_each_engines_rows() -> None:
    """Rows of an engine are added wherever they stand, engines in the order of their ids, whatever the ids are."""
    engines = group_by_engine(["b", "a", "b"])
    assert (2, [1, 0, 1]) == (engines.count, engines.index.tolist())
    assert [2.0, 5.0] == engines.sum_rows(np.array([1.0, 2.0, 4.0])).tolist()
    found = engines.sum_rows_by_bin(np.array([1.0, 2.0, 4.0]), np.array([0, 2, 0]), 3)
    assert [[0, 0, 2], [5, 0, 0]] == found.tolist()


def test_no_rows_have_no_engines() -> None:
    """Nothing sums to nothing."""
    engines = group_by_engine(np.array([], dtype=int))
    assert (0, 0) == (engines.count, len(engines.sum_rows(np.array([]))))


@pytest.mark.parametrize("count", [1, 20, MAX_RESAMPLED_UNITS, 3 * MAX_RESAMPLED_UNITS])
def test_a_resample_draws_as_many_engines(count: int) -> None:
    """Every resample counts as many engines as there are, and drawn in groups still about as many."""
    found = resample_sums(np.ones((count, 1)), draws=20)
    np.testing.assert_allclose(float(count), found, rtol=1e-12)


@pytest.mark.parametrize("count", [100, 10 * MAX_RESAMPLED_UNITS + 7])
def test_resampled_totals_spread_as_the_engines_do(count: int) -> None:
    """Totals of resampled engines have the mean and the variance that theory gives, in groups and without."""
    sums = np.random.default_rng(0).normal(1, 2, (count, 1))
    found = resample_sums(sums, draws=4000)
    spread = np.sqrt(((sums - sums.mean()) ** 2).sum())
    assert float(sums.sum()) == pytest.approx(found.mean(), abs=4 * spread / np.sqrt(4000))
    assert float(spread) == pytest.approx(found.std(), rel=0.05)


def test_an_interval_is_the_middle_nine_tenths() -> None:
    """Of 0 to 100 it is 5 to 95."""
    assert (5.0, 95.0) == central_interval(np.arange(101.0))
