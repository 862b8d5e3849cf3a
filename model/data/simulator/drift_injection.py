"""Drift that is planted in flights, so that one can see it found: written as `sensor_11:+2sd@600`. numpy only.

    sensor_11:+2sd      a bias of two of the sensor's deviations in the flight's operating condition; `-1sd` likewise
    sensor_11:+0.5      a bias in the sensor's own unit
    sensor_11:x3noise   a sensor three times as noisy; `sensors:x3noise` means all of them
    condition:20%       one flight in five in an operating condition that is in no training data
    wear:x2             engines that wear twice as fast; only a simulated fleet can

`@600` is the flight of the fleet, counted from 0, with which it sets in; without it with the first.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model.data.simulator import statistics as fleet
from model.contract import SENSORS
from model.data.simulator.statistics import SETTING_COUNT, Fleet, Floats
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
RANGES: dict[Kind, tuple[float, float]] = {  # from another sensor's size down to nothing
    "bias": (-1e6, 1e6),
    "deviations": (-1e4, 1e4),
    "noise": (1, 1e4),
    "condition": (0, 100),
    "wear": (0.01, 100),
}


class DriftError(ValueError):
    """A text that means no drift; the message is one line."""


@dataclass(frozen=True)
class Drift:
    """One drift: what it does to which sensors, how much, and from which flight of the fleet on."""

    text: str  # as it was written
    kind: Kind
    sensors: tuple[int, ...]  # places among the sensors
    amount: float
    since: int


def parse(text: str) -> Drift:
    """A drift from its text.

    Raises:
        DriftError: another form, a sensor that the model does not read, or an amount out of range.
    """
    what, _, change = text.partition(":")
    change, at, since = change.partition("@")
    forms = ((kind, re.fullmatch(of, what) and re.fullmatch(by, change)) for kind, of, by in FORMS)
    kind, form = next(((kind, form) for kind, form in forms if form), (None, None))
    if kind is None or form is None or (at and not re.fullmatch(r"\d{1,12}", since)):
        forms_are = "sensor_11:+2sd@600, sensor_11:+0.5, sensor_11:x3noise, sensors:x2noise, condition:20% or wear:x2"
        raise DriftError(f"{text[:60]!r} is no drift; write {forms_are}")
    if what.startswith("sensor_") and what not in SENSORS:
        raise DriftError(f"{text[:60]!r}: the model does not read {what}; it reads {', '.join(SENSORS)}")
    amount, (low, high) = float(form[1]), RANGES[kind]
    if not low <= amount <= high:
        raise DriftError(f"{text[:60]!r}: {amount:g} is not from {low:g} to {high:g}")
    sensors = (SENSORS.index(what),) if what in SENSORS else tuple(range(len(SENSORS)))
    return Drift(text, kind, sensors, amount, int(since or 0))


class Planted:
    """Some drifts at once. The same flight with the same `key` is always disturbed alike."""

    def __init__(self, drifts: Iterable[Drift] = (), statistics: Fleet | None = None) -> None:
        self._drifts = tuple(drifts)
        self._fleet = statistics or fleet.read()

    def pace(self, flight: int) -> float:
        """Cycles of wear in one flight of an engine."""
        return float(np.prod([d.amount for d in self._drifts if d.kind == "wear" and d.since <= flight]))

    @property
    def wears(self) -> bool:
        """Whether only a simulated fleet can do this."""
        return any(drift.kind == "wear" for drift in self._drifts)

    def disturbed(self, row: Readings, flight: int, key: tuple[int, ...]) -> Readings:
        """One flight (17,) as it is read while these drifts last.

        Args:
            row: what an undisturbed engine reads.
            flight: its number among all flights of the fleet.
            key: whatever tells this flight from all others, for what is drawn at random.
        """
        if not any(drift.since <= flight for drift in self._drifts):
            return row
        random = np.random.default_rng(key)
        values = row.astype(np.float64)
        condition = int(self._fleet.conditions(values[None, :SETTING_COUNT])[0])
        for drift in self._drifts:
            move = self._move(drift, condition, random)
            if drift.since <= flight:
                values += move
        return self._fleet.rounded(values)

    def _move(self, drift: Drift, condition: int, random: np.random.Generator) -> Floats:
        """What a drift adds to a flight (17,)."""
        of, move, places = self._fleet, np.zeros(SETTING_COUNT + len(SENSORS)), list(drift.sensors)
        sensors = move[SETTING_COUNT:]
        drawn = random.standard_normal(len(SENSORS))
        if drift.kind == "bias":
            sensors[places] = drift.amount
        elif drift.kind == "deviations":
            sensors[places] = drift.amount * of.deviation[condition, places]
        elif drift.kind == "noise":
            sensors[places] = np.sqrt(drift.amount**2 - 1) * (of.noise[condition] * drawn)[places]
        elif drift.kind == "condition" and random.random() < drift.amount / 100:
            usual = np.concatenate([(of.settings_low + of.settings_high) / 2, of.baseline], axis=1)
            move += (usual[condition - 1] - usual[condition]) / 2  # half-way to another, settings and sensors alike
        return move
