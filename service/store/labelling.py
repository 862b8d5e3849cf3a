"""What the truth of a prediction is, from all that was said of its engine. Pure, and blind to the order of saying.

An inspection of that engine at that cycle counts first. Else the engine's end tells: RUL = failed_at - cycle. Else an
engine still running more cycles later than the highest threshold was surely in the first class: survivors testify too,
because truths from failures alone describe only the engines that failed early.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from model.numerics import Floats


class LabelSource(IntEnum):
    """Where a label comes from, as it is stored."""

    INSPECTION = 0
    OUTCOME = 1
    SURVIVAL = 2


def derive_label(
    inspected: Floats | None,
    cycle: int | None,
    failed_at: int | None,
    newest_cycle: int | None,
    thresholds: Sequence[float] | None,
    classes: int,
) -> tuple[Floats, LabelSource] | None:
    """The label (C,) and its source; None while nothing is known.

    Args:
        inspected: what was said of this engine at this cycle, a distribution over the classes.
        cycle: of the prediction.
        failed_at: the last cycle of the engine.
        newest_cycle: at which the engine was seen running.
        thresholds: RUL in cycles that part the classes, falling; None for a model without RUL.
        classes: how many the model of the prediction has.
    """
    if inspected is not None and len(inspected) == classes:
        return inspected, LabelSource.INSPECTION
    if cycle is None or not thresholds:
        return None
    if failed_at is not None:  # after its end there is no engine to be right about
        return (_of_rul(failed_at - cycle, thresholds, classes), LabelSource.OUTCOME) if cycle <= failed_at else None
    if newest_cycle is not None and newest_cycle - cycle > thresholds[0]:
        return _of_rul(newest_cycle - cycle, thresholds, classes), LabelSource.SURVIVAL
    return None


def _of_rul(rul: float, thresholds: Sequence[float], classes: int) -> Floats:
    label = np.zeros(classes)
    label[sum(rul <= threshold for threshold in thresholds)] = 1.0
    return label
