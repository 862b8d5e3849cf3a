"""Derive the label of a prediction from everything reported about its engine. Independent of the order of reports.

1. An inspection of the engine at that cycle takes precedence.
2. Otherwise the failure of the engine gives the label: RUL = failed_at - cycle.
3. Otherwise an engine that ran more cycles later than the highest threshold was in the first class. Without labels from
   continued operation, labels would describe only engines that failed early.
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
    """Return the label (C,) and its source; None while there is no label.

    Args:
        inspected: (C,) the label reported for this engine at this cycle, a distribution over the classes.
        cycle: cycle of the prediction.
        failed_at: the last cycle of the engine.
        newest_cycle: the newest cycle at which the engine was running.
        thresholds: RUL in cycles that separate the classes, in descending order; None for a model without RUL.
        classes: number of classes of the model of the prediction.
    """
    if inspected is not None and len(inspected) == classes:
        return inspected, LabelSource.INSPECTION
    if cycle is None or not thresholds:
        return None
    if failed_at is not None:  # predictions after the failure have no label
        return (
            (_label_of_rul(failed_at - cycle, thresholds, classes), LabelSource.OUTCOME) if cycle <= failed_at else None
        )
    if newest_cycle is not None and newest_cycle - cycle > thresholds[0]:
        return _label_of_rul(newest_cycle - cycle, thresholds, classes), LabelSource.SURVIVAL
    return None


def _label_of_rul(rul: float, thresholds: Sequence[float], classes: int) -> Floats:
    label = np.zeros(classes)
    label[sum(rul <= threshold for threshold in thresholds)] = 1.0
    return label
