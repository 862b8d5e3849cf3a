"""Replace missing readings by the last value of the channel."""

import numpy as np
import numpy.typing as npt

from model import windows
from service.codecs.faults import Loc
from service.errors import Fault
from service.inference.onnx_model import Batch

LOOK_BACK_ROWS = 4096  # rows looked at together for a value to hold


def hold_window(
    values: Batch, window: int, channels: tuple[str, ...], loc: Loc, faults: list[Fault]
) -> tuple[Batch | None, npt.NDArray[np.int64]]:
    """The newest window of a history (T, channels), missing values held, and how many were, per channel.

    None after naming the first place where there is nothing to hold.
    """
    before = max(len(values) - window, 0)  # rows that may give a value to hold, and are not seen themselves
    held = windows.hold_last(np.concatenate([_last_seen(values[:before]), values[before:]]))[0][1:]
    row, channel = np.nonzero(np.isnan(held))
    if len(row):
        place = (*loc, before + int(row[0]), channels[channel[0]])
        faults.append(Fault(place, "missing, and no earlier value of this channel to hold"))
        return None, np.zeros(len(channels), dtype=np.int64)
    return windows.pad_left(held, window), np.isnan(values[before:]).sum(axis=0)


def _last_seen(values: Batch) -> Batch:
    """The last value of each channel (1, channels), NaN where none was seen; looked for from the end."""
    found = np.full((1, values.shape[1]), np.nan, dtype=np.float32)
    for end in range(len(values), 0, -LOOK_BACK_ROWS):
        held = windows.hold_last(values[max(end - LOOK_BACK_ROWS, 0) : end])[0][-1:]
        found = np.where(np.isnan(found), held, found)
        if not np.isnan(found).any():
            break
    return found
