"""Inject drift into flights to test its detection, for example `sensor_11:+2sd@600`. numpy only.

    sensor_11:+2sd      a bias of 2 standard deviations of the sensor in the operating condition; `-1sd` likewise
    sensor_11:+0.5      a bias in the unit of the sensor
    sensor_11:x3noise   three times the noise of the sensor; `sensors:x3noise` is for all sensors
    condition:20%       20 % of the flights are in an operating condition that is not in the training data
    wear:x2             engines wear twice as fast; only for a simulated fleet

`@600` is the first flight of the fleet with drift, counted from 0. The default is 0.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.contract import SENSORS
from model.data.simulator import statistics as fleet
from model.data.simulator.statistics import SETTING_COUNT, FleetStatistics, Floats
from model.windows import Readings

Kind = Literal["bias", "deviations", "noise", "condition", "wear"]
NUMBER = r"(\d+\.?\d*|\.\d+)"
FORMS: tuple[tuple[Kind, str, str], ...] = (
    ("deviations", r"sensor_\d+", rf"([+-]{NUMBER})sd"),
    ("bias", r"sensor_\d+", rf"([+-]{NUMBER})"),
    ("noise", r"sensor_\d+|sensors", rf"x({NUMBER})noise"),
    ("condition", "condition", rf"({NUMBER})%"),
    ("wear", "wear", rf"x({NUMBER})"),
)
RANGES: dict[Kind, tuple[float, float]] = {  # accepted amounts
    "bias": (-1e6, 1e6),
    "deviations": (-1e4, 1e4),
    "noise": (1, 1e4),
    "condition": (0, 100),
    "wear": (0.01, 100),
}


class DriftError(ValueError):
    """Invalid drift text. The message is one line."""


@dataclass(frozen=True)
class Drift:
    """One drift: its kind, sensors, amount and first flight."""

    text: str  # the parsed text
    kind: Kind
    sensors: tuple[int, ...]  # indices of sensors
    amount: float
    since: int  # index of the first flight of the fleet with this drift


def parse_drift(text: str) -> Drift:
    """Parse the text of one drift.

    Raises:
        DriftError: the form is unknown, the model has no such sensor, or the amount is out of range.
    """
    target, _, change = text.partition(":")
    change, separator, since = change.partition("@")
    forms = (
        (kind, re.fullmatch(target_form, target) and re.fullmatch(change_form, change))
        for kind, target_form, change_form in FORMS
    )
    kind, match = next(((kind, match) for kind, match in forms if match), (None, None))
    if kind is None or match is None or (separator and not re.fullmatch(r"\d{1,12}", since)):
        examples = "sensor_11:+2sd@600, sensor_11:+0.5, sensor_11:x3noise, sensors:x2noise, condition:20% or wear:x2"
        raise DriftError(f"invalid drift {text[:60]!r}; examples: {examples}")
    if target.startswith("sensor_") and target not in SENSORS:
        raise DriftError(f"drift {text[:60]!r}: {target} is not an input of the model; inputs are {', '.join(SENSORS)}")
    amount, (low, high) = float(match[1]), RANGES[kind]
    if not low <= amount <= high:
        raise DriftError(f"drift {text[:60]!r}: the amount must be from {low:g} to {high:g}, got {amount:g}")
    sensors = (SENSORS.index(target),) if target in SENSORS else tuple(range(len(SENSORS)))
    return Drift(text, kind, sensors, amount, int(since or 0))


class DriftInjector:
    """Applies drifts to flights. Equal flights with equal keys give equal results."""

    def __init__(self, drifts: Iterable[Drift] = (), statistics: FleetStatistics | None = None) -> None:
        self._drifts = tuple(drifts)
        self._fleet = statistics or fleet.read_statistics()

    def wear_rate(self, flight: int) -> float:
        """Return the cycles of wear per flight of an engine."""
        return float(np.prod([d.amount for d in self._drifts if d.kind == "wear" and d.since <= flight]))

    @property
    def changes_wear(self) -> bool:
        """Whether a drift changes wear, which only a simulated fleet supports."""
        return any(drift.kind == "wear" for drift in self._drifts)

    def inject(self, row: Readings, flight: int, key: tuple[int, ...]) -> Readings:
        """Return one flight (17,) with the active drifts.

        Args:
            row: readings without drift.
            flight: index of the flight in the fleet.
            key: seed of random numbers, unique to the flight.
        """
        if not any(drift.since <= flight for drift in self._drifts):
            return row
        random = np.random.default_rng(key)
        values = row.astype(np.float64)
        condition = int(self._fleet.nearest_conditions(values[None, :SETTING_COUNT])[0])
        for drift in self._drifts:
            offset = self._change(drift, condition, random)
            if drift.since <= flight:
                values += offset
        return self._fleet.round_rows(values)

    def _change(self, drift: Drift, condition: int, random: np.random.Generator) -> Floats:
        """Return the change of a flight (17,) by one drift."""
        statistics, offset, indices = self._fleet, np.zeros(SETTING_COUNT + len(SENSORS)), list(drift.sensors)
        sensors = offset[SETTING_COUNT:]
        draws = random.standard_normal(len(SENSORS))
        if drift.kind == "bias":
            sensors[indices] = drift.amount
        elif drift.kind == "deviations":
            sensors[indices] = drift.amount * statistics.deviation[condition, indices]
        elif drift.kind == "noise":
            sensors[indices] = np.sqrt(drift.amount**2 - 1) * (statistics.noise[condition] * draws)[indices]
        elif drift.kind == "condition" and random.random() < drift.amount / 100:
            centres = np.concatenate(
                [(statistics.settings_low + statistics.settings_high) / 2, statistics.baseline], axis=1
            )
            # half-way to another condition, settings and sensors
            offset += (centres[condition - 1] - centres[condition]) / 2
        return offset
