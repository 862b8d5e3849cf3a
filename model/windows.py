"""Histories to windows: padding on the left, missing values held. Training, serving and batch scoring share it.

Imports nothing else from this project. A missing value is NaN. Time runs along the first axis, oldest row first.
"""

import numpy as np
import numpy.typing as npt

Readings = npt.NDArray[np.float32]


def pad_left(history: Readings, window: int) -> Readings:
    """Return the newest `window` rows of a history (T, C); copies of the oldest row precede a shorter history.

    Raises:
        ValueError: an empty history.
    """
    if len(history) == 0:
        raise ValueError("a window needs at least one row")
    missing = window - len(history)
    return history[-window:] if missing <= 0 else np.concatenate([np.repeat(history[:1], missing, axis=0), history])


def every_window(history: Readings, window: int) -> Readings:
    """Return one window per cycle, (T, window, C): the history up to each cycle.

    The result is a read-only view of one padded copy of the history.
    """
    return overlapping(np.concatenate([np.repeat(history[:1], window - 1, axis=0), history]), window)


def overlapping(rows: Readings, window: int) -> Readings:
    """Return every window within rows (M, C), (M - window + 1, window, C), as a read-only view; none if M < window."""
    if len(rows) < window:
        return np.empty((0, window, rows.shape[1]), np.float32)
    return np.lib.stride_tricks.sliding_window_view(rows, window, axis=0).transpose(0, 2, 1)


def hold_last(history: Readings) -> tuple[Readings, npt.NDArray[np.int64]]:
    """Replace each missing value by the last one of its channel, and return the number of replaced values (C,).

    A value that is missing before the first one of its channel stays NaN.
    """
    missing = np.isnan(history)  # (T, C)
    seen_at = np.where(missing, 0, np.arange(len(history))[:, None])
    filled = np.take_along_axis(history, np.maximum.accumulate(seen_at, axis=0), axis=0)
    return filled, (missing & ~np.isnan(filled)).sum(axis=0)
