"""Evaluate the artefact on disturbed readings: missing, biased, noisy, unknown conditions, short histories.

    python -m model.evaluation.robustness [artefact]       # a part of `make evaluate`

Each scenario disturbs every cycle of the official test engines in one way. Uncertainty must rise where accuracy falls.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model.contract import CHANNELS, SENSORS, SETTINGS, Conditions, Manifest
from model.data import cmapss
from model.evaluation import conformal
from model.evaluation.evaluate import MakeWindows, format_cells, format_header, onnx_runner, predict_histories
from model.evaluation.evaluation_metrics import class_metrics, concatenate_rows, rul_metrics, set_metrics
from model.evaluation.occlusion import ConditionBaselines
from model.windows import Readings, every_window

STRONGEST = ("sensor_11", "sensor_4")  # sensors with the largest effect in the attribution table
COLUMNS = {
    "accuracy": 3,
    "macro-F1": 3,
    "cross-entropy": 3,
    "entropy": 3,
    "ECE": 3,
    "two-step errors": 4,
    "coverage": 3,
    "set size": 2,
    "RUL RMSE": 1,
}
HELD_ROWS = 20  # newest cycles in which a sensor is missing


class Disturbances:
    """Disturbances of histories, in standard deviations of operating conditions."""

    def __init__(self, conditions: Conditions, seed: int = 0) -> None:
        self._baselines = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
        self._deviations = np.array(conditions.deviations)
        self._random = np.random.default_rng(seed)

    def row_deviations(self, telemetry: Readings) -> npt.NDArray[np.float64]:
        """Return the standard deviation of each sensor (T, S) in the operating condition of each row."""
        return np.asarray(self._deviations[self._baselines.nearest(telemetry)])

    def hold_sensors(self, sensors: tuple[str, ...]) -> MakeWindows:
        """Hold the last value of sensors through the newest HELD_ROWS cycles of every window."""
        columns = [CHANNELS.index(name) for name in sensors]

        def make(telemetry: Readings, window: int) -> Readings:
            windows = np.array(every_window(telemetry, window))
            windows[:, -HELD_ROWS:, columns] = windows[:, [-HELD_ROWS - 1]][..., columns]
            return windows

        return make

    def bias_sensors(self, sensors: tuple[str, ...], deviations: float) -> MakeWindows:
        """Add a bias in standard deviations to sensors."""

        def make(telemetry: Readings, window: int) -> Readings:
            shifted, unit = telemetry.copy(), self.row_deviations(telemetry)
            for name in sensors:
                shifted[:, CHANNELS.index(name)] += deviations * unit[:, SENSORS.index(name)]
            return every_window(shifted, window)

        return make

    def double_noise(self, telemetry: Readings, window: int) -> Readings:
        """Double the noise of each sensor, which is estimated from differences of consecutive cycles."""
        unit = self.row_deviations(telemetry)
        standardised = (telemetry - self._baselines.matching_rows(telemetry))[:, len(SETTINGS) :] / unit
        noise = np.diff(standardised, axis=0).std(axis=0) / np.sqrt(2)  # (S,) deviations
        noisy = telemetry.copy()
        noisy[:, len(SETTINGS) :] += np.sqrt(3) * noise * unit * self._random.standard_normal(unit.shape)
        return every_window(noisy, window)

    def change_conditions(self, share: float) -> MakeWindows:
        """Move a share of the flights, settings and sensors, half-way to another operating condition."""
        rows = self._baselines.rows

        def make(telemetry: Readings, window: int) -> Readings:
            shifted, condition = telemetry.copy(), self._baselines.nearest(telemetry)
            affected = self._random.random(len(telemetry)) < share
            offset = (np.roll(rows, 1, axis=0) - rows)[condition[affected]] / 2
            shifted[affected] += offset.astype(np.float32)
            return every_window(shifted, window)

        return make


def keep_newest(rows: int) -> MakeWindows:
    """Shorten every window to its newest rows, at any age of the engine."""

    def make(telemetry: Readings, window: int) -> Readings:
        windows = np.array(every_window(telemetry, window))
        windows[:, :-rows] = windows[:, -rows, None]
        return windows

    return make


def build_scenarios(conditions: Conditions) -> dict[str, MakeWindows]:
    """Return all disturbances by their names in the table."""
    disturbances = Disturbances(conditions)
    pair = " and ".join(STRONGEST)
    return {
        "as measured": every_window,
        f"{STRONGEST[0]} missing for {HELD_ROWS} cycles, held": disturbances.hold_sensors(STRONGEST[:1]),
        f"{pair} biased by 1 deviation": disturbances.bias_sensors(STRONGEST, 1.0),
        f"{pair} biased by 2 deviations": disturbances.bias_sensors(STRONGEST, 2.0),
        "noise doubled": disturbances.double_noise,
        "one flight in six in an unknown operating condition": disturbances.change_conditions(1 / 6),
        "all flights in an unknown operating condition": disturbances.change_conditions(1.0),
        **{f"only the newest {rows} cycles": keep_newest(rows) for rows in (20, 10, 5)},
    }


def robustness_table(folder: Path, session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    """Yield the lines of the robustness table in Markdown, after temperature scaling."""
    if manifest.conditions is None or manifest.conformal is None:
        return
    yield from format_header("readings", COLUMNS)
    engines = [history for subset in cmapss.SUBSETS for history in cmapss.read_test(folder, subset)]
    for name, make in build_scenarios(manifest.conditions).items():
        evaluated = concatenate_rows(
            predict_histories(onnx_runner(session), manifest.window or 1, engines, make=make), last_only=False
        )
        sets = conformal.prediction_sets(evaluated.logits, manifest.temperature, manifest.conformal.threshold)
        line = (
            class_metrics(evaluated, manifest.temperature)
            | rul_metrics(evaluated)
            | set_metrics(evaluated.labels, sets)
        )
        yield f"| {name} | {format_cells(line, COLUMNS)} |"
