"""Attribution by occlusion: what an answer would be if one channel told nothing. numpy only, knows no network.

A sensor is occluded by what is usual in the operating condition of each row, which is how the network was taught to
read a silent sensor. One window becomes a batch of one a channel (Zeiler and Fergus 2014, on channels).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Readings = npt.NDArray[np.float32]


class Usual(NamedTuple):
    """What is usual in each of K operating conditions, in physical units.

    Rows belong to the condition whose centre is nearest, each setting being measured in its own scale.
    """

    scales: npt.NDArray[np.float64]  # (settings,)
    rows: npt.NDArray[np.float64]  # (K, channels), settings first

    @classmethod
    def of(cls, scales: Sequence[float], rows: Sequence[Sequence[float]]) -> "Usual":
        """From the lists of a manifest."""
        return cls(np.asarray(scales, dtype=np.float64), np.asarray(rows, dtype=np.float64))

    def condition(self, telemetry: Readings) -> npt.NDArray[np.int64]:
        """The operating condition of each row of telemetry (..., channels)."""
        n = len(self.scales)
        gap = (telemetry[..., None, :n].astype(np.float64) - self.rows[:, :n]) / self.scales  # (..., K, settings)
        return np.asarray((gap**2).sum(-1).argmin(-1))

    def like(self, telemetry: Readings) -> Readings:
        """The usual row for each row of telemetry (..., channels)."""
        return np.asarray(self.rows[self.condition(telemetry)], dtype=np.float32)


def occluded(window: Readings, usual: Usual) -> Readings:
    """One copy of a window (T, C) for each channel, that channel replaced by what is usual: (C, T, C)."""
    channels = window.shape[1]
    copies, every = np.repeat(window[None], channels, axis=0), np.arange(channels)
    copies[every, :, every] = usual.like(window).T
    return copies


class Shift(NamedTuple):
    """What one channel did to an answer."""

    channel: int
    shift: float  # total variation distance of the distributions with and without it, 0..1
    toward: int  # the class whose probability it raised most
    rul: float | None  # cycles that it added


def shifts(
    probabilities: npt.NDArray[Any],
    rul: float | None,
    without: npt.NDArray[Any],
    rul_without: npt.NDArray[Any] | None,
) -> list[Shift]:
    """What each channel did to an answer, the strongest first.

    Args:
        probabilities: (classes,) of the answer.
        rul: its RUL, if the network has one.
        without: (C, classes) with each channel occluded.
        rul_without: (C,) likewise.
    """
    change = probabilities - without  # (C, classes)
    distance = np.abs(change).sum(axis=1) / 2
    return [
        Shift(
            int(k),
            float(distance[k]),
            int(change[k].argmax()),
            None if rul is None or rul_without is None else float(rul - rul_without[k]),
        )
        for k in np.argsort(-distance, kind="stable")
    ]
