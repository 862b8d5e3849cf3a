import numpy as np
import pytest

from model.batch_invariance import Array, max_difference, run_alone

ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


def doubled(batch: Array) -> list[Array]:
    """Return two outputs whose rows are independent."""
    return [2 * batch, batch.sum(axis=1)]


def centred(batch: Array) -> list[Array]:
    """Return an output whose rows depend on their batch."""
    return [batch - batch.mean(axis=0), batch.sum(axis=1)]


def test_run_alone_returns_each_output_of_every_row() -> None:
    """Outputs of batches of one equal those of the whole batch if rows are independent."""
    for expected, column in zip(doubled(ROWS), run_alone(doubled, ROWS), strict=True):
        np.testing.assert_array_equal(expected, column)


def test_max_difference_of_independent_rows_is_zero() -> None:
    """A network with independent rows has the same outputs in any batch and any order of rows."""
    batches = [np.array([0]), np.array([5, 1, 3]), np.arange(6)]
    assert 0 == max_difference(doubled, ROWS, run_alone(doubled, ROWS), batches, (1.0, 1.0))


def test_max_difference_of_dependent_rows_is_measured() -> None:
    """A network that subtracts the mean of its batch differs by that mean: 5 and 6, at most 3 in units of 2."""
    expected = run_alone(doubled, ROWS)[1:]
    alone = [ROWS, expected[0]]
    assert 6 == max_difference(centred, ROWS, alone, [np.arange(6)], (1.0, 1.0))
    assert 3 == max_difference(centred, ROWS, alone, [np.arange(6)], (2.0, 1.0))
    assert 0.5 == max_difference(centred, ROWS, alone, [np.arange(6)], (np.full((6, 1), 12.0), 1.0))


@pytest.mark.parametrize("worst_first", [True, False])
def test_max_difference_with_nan_is_nan(worst_first: bool) -> None:
    """A NaN in the first or the last batch makes the difference NaN."""

    def network_with_nan(batch: Array) -> list[Array]:
        return [np.where(batch == 0, np.nan, batch)]

    batches = [np.array([0]), np.array([3])]
    difference = max_difference(network_with_nan, ROWS, [ROWS], batches if worst_first else batches[::-1], (1.0,))
    assert np.isnan(difference)


def test_max_difference_with_another_shape_is_infinite() -> None:
    """A network with a fixed batch size returns too many or too few rows, an infinite difference."""
    assert np.inf == max_difference(lambda _: [ROWS[:4]], ROWS, [ROWS], [np.arange(6)], (1.0,))
