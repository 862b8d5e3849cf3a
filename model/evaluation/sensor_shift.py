"""Sensor shift: deviations of an engine's sensors from the baselines of operating conditions. numpy only.

Altitude and speed have the largest effect on raw readings. After subtraction of the baseline of the condition, the
effect of wear remains.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.evaluation.occlusion import ConditionBaselines
from model.numerics import Floats
from model.windows import Readings

RECENT_FLIGHTS = 10  # newest flights, whose mean deviation is the shift


class SensorShift(NamedTuple):
    """One sensor of one engine, in standard deviations of the operating condition of each flight."""

    channel: int
    deviations: Floats  # (N,) of each reading from the baseline
    shift: float  # mean deviation of the newest flights


def sensor_shifts(
    flights: Readings, baselines: ConditionBaselines, standard_deviations: npt.ArrayLike
) -> list[SensorShift]:
    """Return the shift of each sensor over flights, sorted by descending absolute shift.

    Args:
        flights: (N, channels) raw readings in the order of cycles, settings first, N >= 1.
        baselines: of K operating conditions.
        standard_deviations: (K, sensors) of each sensor in each condition. Where it is 0, deviations are 0.
    """
    settings, condition = len(baselines.scales), baselines.nearest(flights)
    spread = np.asarray(standard_deviations, dtype=np.float64)[condition]  # (N, sensors)
    differences = (flights.astype(np.float64) - baselines.rows[condition])[:, settings:]
    deviations = np.divide(differences, spread, out=np.zeros_like(differences), where=spread > 0)
    recent = deviations[-RECENT_FLIGHTS:].mean(axis=0)
    return [
        SensorShift(settings + int(k), deviations[:, k], float(recent[k]))
        for k in np.argsort(-abs(recent), kind="stable")
    ]
