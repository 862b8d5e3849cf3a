"""How far an engine's sensors are from what is usual in the operating condition of each flight. numpy only.

Altitude and speed move a raw reading most; less what is usual in the flight's condition, wear is what remains.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.evaluation.occlusion import Usual
from model.numerics import Floats
from model.windows import Readings

RECENT = 10  # flights whose mean says where a sensor is now


class Moved(NamedTuple):
    """One sensor of one engine, in deviations of the flight's operating condition."""

    channel: int
    away: Floats  # (N,) how far each reading is from the usual one
    moved: float  # mean of the last ten


def moved(flights: Readings, usual: Usual, deviations: npt.ArrayLike) -> list[Moved]:
    """Each sensor of flights (N, channels), N >= 1, in the order of their cycles, the most moved first.

    Args:
        flights: raw readings, settings first.
        usual: of K operating conditions.
        deviations: (K, sensors) of each sensor in each condition; where it is 0, the sensor has not moved.
    """
    settings, condition = len(usual.scales), usual.condition(flights)
    spread = np.asarray(deviations, dtype=np.float64)[condition]  # (N, sensors)
    apart = (flights.astype(np.float64) - usual.rows[condition])[:, settings:]
    away = np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 0)
    recent = away[-RECENT:].mean(axis=0)
    return [Moved(settings + int(k), away[:, k], float(recent[k])) for k in np.argsort(-abs(recent), kind="stable")]
