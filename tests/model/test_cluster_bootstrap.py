import numpy as np
import pytest

from model.evaluation.cluster_bootstrap import MAX_RESAMPLED_UNITS, central_interval, group_by_engine, resample_sums


def test_sums_by_engine_in_order_of_ids() -> None:
    """Rows of an engine are added in any order of rows, and engines are sorted by their ids."""
    engines = group_by_engine(["b", "a", "b"])
    assert (2, [1, 0, 1]) == (engines.count, engines.index.tolist())
    assert [2.0, 5.0] == engines.sum_rows(np.array([1.0, 2.0, 4.0])).tolist()
    sums_of_engines = engines.sum_rows_by_bin(np.array([1.0, 2.0, 4.0]), np.array([0, 2, 0]), 3)
    assert [[0, 0, 2], [5, 0, 0]] == sums_of_engines.tolist()


def test_sums_without_rows_are_empty() -> None:
    """Without rows there are no engines and no sums."""
    engines = group_by_engine(np.array([], dtype=int))
    assert (0, 0) == (engines.count, len(engines.sum_rows(np.array([]))))


@pytest.mark.parametrize("count", [1, 20, MAX_RESAMPLED_UNITS, 3 * MAX_RESAMPLED_UNITS])
def test_resample_draws_the_same_number_of_engines(count: int) -> None:
    """Every resample has the same number of engines; drawn in groups, approximately."""
    totals = resample_sums(np.ones((count, 1)), draws=20)
    np.testing.assert_allclose(float(count), totals, rtol=1e-12)


@pytest.mark.parametrize("count", [100, 10 * MAX_RESAMPLED_UNITS + 7])
def test_resampled_totals_have_theoretical_variance(count: int) -> None:
    """Totals of resampled engines have the mean and variance of theory, with and without groups."""
    sums = np.random.default_rng(0).normal(1, 2, (count, 1))
    totals = resample_sums(sums, draws=4000)
    spread = np.sqrt(((sums - sums.mean()) ** 2).sum())
    assert float(sums.sum()) == pytest.approx(totals.mean(), abs=4 * spread / np.sqrt(4000))
    assert float(spread) == pytest.approx(totals.std(), rel=0.05)


def test_central_interval_contains_90_percent() -> None:
    """The central interval of 0 to 100 is 5 to 95."""
    assert (5.0, 95.0) == central_interval(np.arange(101.0))
