"""Attribution by occlusion: the change of a prediction if one channel is replaced by its baseline. numpy only.

The baseline is the mean in the operating condition of each row, which the network is trained to treat as a missing
sensor. One window becomes a batch with one copy per channel (Zeiler and Fergus 2014, applied to channels).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Readings = npt.NDArray[np.float32]


class ConditionBaselines(NamedTuple):
    """Baselines of K operating conditions: mean readings in physical units.

    A row belongs to the condition with the nearest centre. Each setting is divided by its scale.
    """

    scales: npt.NDArray[np.float64]  # (settings,)
    rows: npt.NDArray[np.float64]  # (K, channels), settings first

    @classmethod
    def from_lists(cls, scales: Sequence[float], rows: Sequence[Sequence[float]]) -> "ConditionBaselines":
        """Convert the lists of a manifest."""
        return cls(np.asarray(scales, dtype=np.float64), np.asarray(rows, dtype=np.float64))

    def nearest(self, telemetry: Readings) -> npt.NDArray[np.int64]:
        """Return the operating condition of each row of telemetry (..., channels)."""
        n = len(self.scales)
        gap = (telemetry[..., None, :n].astype(np.float64) - self.rows[:, :n]) / self.scales  # (..., K, settings)
        return np.asarray((gap**2).sum(-1).argmin(-1))

    def matching_rows(self, telemetry: Readings) -> Readings:
        """Return the baseline row for each row of telemetry (..., channels)."""
        return np.asarray(self.rows[self.nearest(telemetry)], dtype=np.float32)


def occlude_channels(window: Readings, baselines: ConditionBaselines) -> Readings:
    """Return copies (C, T, C) of a window (T, C), each with one channel replaced by its baseline."""
    channels = window.shape[1]
    copies, index = np.repeat(window[None], channels, axis=0), np.arange(channels)
    copies[index, :, index] = baselines.matching_rows(window).T
    return copies


class ChannelAttribution(NamedTuple):
    """The effect of one channel on a prediction."""

    channel: int
    shift: float  # total variation distance between the distributions with and without the channel, 0..1
    toward: int  # class whose probability the channel raises most
    rul: float | None  # cycles that the channel adds


def attribute_channels(
    probabilities: npt.NDArray[Any],
    rul: float | None,
    without: npt.NDArray[Any],
    rul_without: npt.NDArray[Any] | None,
) -> list[ChannelAttribution]:
    """Return the effect of each channel on a prediction, sorted by descending shift.

    Args:
        probabilities: (classes,) of the prediction.
        rul: RUL of the prediction in cycles, if the network returns it.
        without: (C, classes) probabilities with each channel occluded.
        rul_without: (C,) RUL with each channel occluded.
    """
    change = probabilities - without  # (C, classes)
    distance = np.abs(change).sum(axis=1) / 2
    return [
        ChannelAttribution(
            int(k),
            float(distance[k]),
            int(change[k].argmax()),
            None if rul is None or rul_without is None else float(rul - rul_without[k]),
        )
        for k in np.argsort(-distance, kind="stable")
    ]
