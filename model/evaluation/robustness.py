"""How the artefact answers when readings are not what they should be: silent, biased, noisy, unknown, too few.

    python -m model.evaluation.robustness [artefact]       # a part of `make evaluate`

Every cycle of the official test engines, disturbed one way at a time. Uncertainty must grow where accuracy falls.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from model.contract import CHANNELS, SENSORS, SETTINGS, Conditions, Manifest
from model.data import cmapss
from model.evaluation import conformal
from model.evaluation.evaluate import MakeWindows, answers, cells, header, runner
from model.evaluation.evaluation_metrics import of_classes, of_rul, of_sets, rows_of
from model.evaluation.occlusion import Usual
from model.windows import Readings, every_window

STRONGEST = ("sensor_11", "sensor_4")  # of the attribution table, the two that move answers most
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
HELD_ROWS = 20  # cycles that a sensor has been missing for


class Disturbances:
    """Ways to disturb histories, in units of what is usual."""

    def __init__(self, conditions: Conditions, seed: int = 0) -> None:
        self._usual = Usual.of(conditions.setting_scales, conditions.usual)
        self._deviations = np.array(conditions.deviations)
        self._random = np.random.default_rng(seed)

    def deviation(self, telemetry: Readings) -> npt.NDArray[np.float64]:
        """One deviation of each sensor (T, S) in each row's operating condition."""
        return np.asarray(self._deviations[self._usual.condition(telemetry)])

    def held(self, sensors: tuple[str, ...]) -> MakeWindows:
        """Sensors missing for the newest twenty cycles of every window: their last value held."""
        columns = [CHANNELS.index(name) for name in sensors]

        def make(telemetry: Readings, window: int) -> Readings:
            windows = np.array(every_window(telemetry, window))
            windows[:, -HELD_ROWS:, columns] = windows[:, [-HELD_ROWS - 1]][..., columns]
            return windows

        return make

    def biased(self, sensors: tuple[str, ...], deviations: float) -> MakeWindows:
        """Sensors off by so many deviations."""

        def make(telemetry: Readings, window: int) -> Readings:
            shifted, unit = telemetry.copy(), self.deviation(telemetry)
            for name in sensors:
                shifted[:, CHANNELS.index(name)] += deviations * unit[:, SENSORS.index(name)]
            return every_window(shifted, window)

        return make

    def noise_doubled(self, telemetry: Readings, window: int) -> Readings:
        """As much noise again as each sensor has: that of the differences of neighbouring cycles."""
        unit = self.deviation(telemetry)
        normal = (telemetry - self._usual.like(telemetry))[:, len(SETTINGS) :] / unit
        noise = np.diff(normal, axis=0).std(axis=0) / np.sqrt(2)  # (S,) deviations
        noisy = telemetry.copy()
        noisy[:, len(SETTINGS) :] += np.sqrt(3) * noise * unit * self._random.standard_normal(unit.shape)
        return every_window(noisy, window)

    def unknown_condition(self, share: float) -> MakeWindows:
        """A share of the flights in an operating condition half-way to another: settings and sensors moved alike."""
        rows = self._usual.rows

        def make(telemetry: Readings, window: int) -> Readings:
            moved, usual = telemetry.copy(), self._usual.condition(telemetry)
            flown = self._random.random(len(telemetry)) < share
            half = (np.roll(rows, 1, axis=0) - rows)[usual[flown]] / 2
            moved[flown] += half.astype(np.float32)
            return every_window(moved, window)

        return make


def only_newest(rows: int) -> MakeWindows:
    """Histories of so many rows, whatever the age of the engine."""

    def make(telemetry: Readings, window: int) -> Readings:
        windows = np.array(every_window(telemetry, window))
        windows[:, :-rows] = windows[:, -rows, None]
        return windows

    return make


def scenarios(conditions: Conditions) -> dict[str, MakeWindows]:
    """Every disturbance by the name that the table gives it."""
    d = Disturbances(conditions)
    pair = " and ".join(STRONGEST)
    return {
        "as measured": every_window,
        f"{STRONGEST[0]} missing for {HELD_ROWS} cycles, held": d.held(STRONGEST[:1]),
        f"{pair} biased by 1 deviation": d.biased(STRONGEST, 1.0),
        f"{pair} biased by 2 deviations": d.biased(STRONGEST, 2.0),
        "noise doubled": d.noise_doubled,
        "one flight in six in an unknown operating condition": d.unknown_condition(1 / 6),
        "all flights in an unknown operating condition": d.unknown_condition(1.0),
        **{f"only the newest {rows} cycles": only_newest(rows) for rows in (20, 10, 5)},
    }


def table(folder: Path, session: ort.InferenceSession, manifest: Manifest) -> Iterator[str]:
    """The robustness table as lines of Markdown, after temperature."""
    if manifest.conditions is None or manifest.conformal is None:
        return
    yield from header("readings", COLUMNS)
    engines = [history for subset in cmapss.SUBSETS for history in cmapss.read_test(folder, subset)]
    for name, make in scenarios(manifest.conditions).items():
        found = rows_of(answers(runner(session), manifest.window or 1, engines, make=make), last_only=False)
        sets = conformal.sets(found.logits, manifest.temperature, manifest.conformal.threshold)
        line = of_classes(found, manifest.temperature) | of_rul(found) | of_sets(found.labels, sets)
        yield f"| {name} | {cells(line, COLUMNS)} |"
