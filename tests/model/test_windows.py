import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.windows import Readings, every_window, hold_last, pad_left


def history(cycles: int) -> Readings:
    return np.arange(cycles * 2, dtype=np.float32).reshape(cycles, 2)


@given(st.integers(1, 30), st.integers(1, 30))
def test_window_pads_short_history_with_oldest_row(cycles: int, window: int) -> None:
    """A long history gives its newest rows; copies of the oldest row precede a short one."""
    rows = history(cycles)
    padded = pad_left(rows, window)
    assert (window, 2) == padded.shape
    np.testing.assert_array_equal(rows[-min(cycles, window) :], padded[-min(cycles, window) :])
    assert (padded[: max(window - cycles, 0)] == rows[0]).all()


@given(st.integers(1, 30), st.integers(1, 12))
def test_every_window_equals_padding_at_its_cycle(cycles: int, window: int) -> None:
    """Training windows of a history equal the serving windows of the history up to each cycle."""
    rows = history(cycles)
    expected = np.stack([pad_left(rows[: t + 1], window) for t in range(cycles)])
    np.testing.assert_array_equal(expected, every_window(rows, window))


def test_every_window_shares_memory() -> None:
    """10,000 windows of 50 rows take the memory of one padded history."""
    view = every_window(history(10_000), 50)
    assert view.base is not None
    assert not view.flags.writeable


def test_window_of_empty_history_raises() -> None:
    """A history without rows is an error."""
    with pytest.raises(ValueError, match="at least one row"):
        pad_left(history(0), 5)


def test_hold_last_repeats_the_last_value() -> None:
    """A missing value becomes the last value of its channel; without one it stays missing and is not counted."""
    nan = np.nan
    rows = np.array([[nan, 1], [2, nan], [nan, nan], [3, 4]], dtype=np.float32)
    held, counts = hold_last(rows)
    np.testing.assert_array_equal([[nan, 1], [2, 1], [2, 1], [3, 4]], held)
    assert [1, 2] == counts.tolist()
