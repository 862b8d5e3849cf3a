from pathlib import Path

import numpy as np

from model.contract import CHANNELS, Manifest
from model.data import cmapss
from model.evaluation.occlusion import ConditionBaselines
from model.evaluation.sensor_shift import sensor_shifts

USUAL = ConditionBaselines.from_lists(
    [1.0], [[0.0, 10.0, 20.0], [5.0, 30.0, 40.0]]
)  # one setting, two sensors, two conditions
SPREAD = [[2.0, 1.0], [4.0, 0.0]]


def test_deviation_is_relative_to_the_condition() -> None:
    """The deviation of a reading is from the baseline of its condition, in deviations of the condition."""
    flights = np.array([[0.1, 14.0, 20.0], [4.9, 30.0, 47.0]], dtype=np.float32)
    first, second = sensor_shifts(flights, USUAL, SPREAD)
    assert (1, 1.0, [2.0, 0.0]) == (first.channel, first.shift, first.deviations.tolist())
    # without spread, deviations are 0
    assert (2, 0.0, [0.0, 0.0]) == (second.channel, second.shift, second.deviations.tolist())


def test_shift_is_the_mean_of_the_newest_ten_flights() -> None:
    """Older flights are in the deviations but not in the shift; the largest shift is first."""
    flights = np.tile(np.array([[0.0, 10.0, 20.0]], dtype=np.float32), (15, 1))
    flights[:5, 1], flights[-1, 2] = 99.0, 30.0
    first, second = sensor_shifts(flights, USUAL, SPREAD)
    assert (2, 1.0) == (first.channel, first.shift)
    assert (1, 0.0, 44.5) == (second.channel, second.shift, second.deviations[0])


def test_wear_of_official_engines_shifts_known_sensors(cmapss_dir: Path, manifest: Manifest) -> None:
    """Before failure, 90 % of the engines of FD001 have a higher pressure at the compressor outlet."""
    conditions = manifest.conditions
    assert conditions is not None
    usual, k = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual), CHANNELS.index("sensor_11")
    engines = [
        sensor_shifts(history.telemetry, usual, conditions.deviations)
        for history in cmapss.read_train(cmapss_dir, "FD001")
    ]
    ends = [next(sensor.shift for sensor in engine if sensor.channel == k) for engine in engines]
    assert sum(value > 1 for value in ends) >= 90
