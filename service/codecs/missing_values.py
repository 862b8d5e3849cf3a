"""Replace missing readings by the last value of the channel."""

import numpy as np
import numpy.typing as npt

from model import windows
from service.codecs.faults import Loc
from service.errors import Fault
from service.inference.onnx_model import Batch

LOOK_BACK_ROWS = 4096  # rows that are searched together for a value to hold


def hold_window(
    values: Batch, window: int, channels: tuple[str, ...], loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64]]:
    """Return the newest window of a history (T, channels), missing values held, and their number per channel.

    The window is None after the first place without a value to hold is appended to `faults`.
    """
    before = max(len(values) - window, 0)  # rows before the window: they only provide values to hold
    held = windows.hold_last(np.concatenate([_last_values(values[:before]), values[before:]]))[0][1:]
    row, channel = np.nonzero(np.isnan(held))
    if len(row):
        place = (*loc, before + int(row[0]), channels[channel[0]])
        faults.append(Fault(place, "missing, and no earlier value of this channel to hold"))
        return None, np.zeros(len(channels), dtype=np.int64)
    return windows.pad_left(held, window), np.isnan(values[before:]).sum(axis=0)


def _last_values(values: Batch) -> Batch:
    """Return the last value of each channel (1, channels), NaN where all are missing; search from the end."""
    last = np.full((1, values.shape[1]), np.nan, dtype=np.float32)
    for end in range(len(values), 0, -LOOK_BACK_ROWS):
        held = windows.hold_last(values[max(end - LOOK_BACK_ROWS, 0) : end])[0][-1:]
        last = np.where(np.isnan(last), held, last)
        if not np.isnan(last).any():
            break
    return last
