"""Estimate what simulated engines are drawn from: the training engines of C-MAPSS to model/data/simulator/fleet.json. numpy only.

    python -m model.data.simulator.fit                    # reads CMAPSS_DIR or data/cmapss

A sensor of an engine is, in one operating condition, baseline + response x (offset + full x exp(-RUL / time constant))
+ noise. Time constant, offset and full response are fitted to each engine, all conditions together; baseline and
response of each condition then follow from all engines, and both steps are repeated. Engines of each mode of wear are a
Gaussian of these traits, of which the largest few directions are kept: the others are error of the fits.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.data import cmapss
from model.data.simulator import statistics
from model.data.cmapss import DataError, History
from model.contract import RUL_THRESHOLDS, SENSORS
from model.data.simulator.statistics import SETTING_COUNT, Fleet, Floats, Integers, Mode

SUBSET = "FD004"  # the one with six conditions and both modes
GROUNDED = ("FD001", "FD003")  # in the first condition only, where they are as those of FD004 are
TIME_CONSTANTS = np.geomspace(10, 300, 120)  # cycles; those of the engines lie from 20 to 150
ROUNDS = 5  # after which no response moves by a thousandth
FACTORS = 4  # of 30: 92 % of what differs between engines of a mode, the next one is as small as the rest
LATE = 20  # cycles before failure, where the mode of wear shows
TOLD_BY = SENSORS.index("sensor_12")  # phi falls when the compressor wears (FD001), and rises when the fan does
MODES = ("HPC", "fan")


class Flights(NamedTuple):
    """All flights of a fleet: settings (N, 3), sensors (N, S), true RUL, engine and condition (N,)."""

    settings: Floats
    sensors: Floats
    rul: Floats
    engine: Integers
    condition: Integers

    def of(self, some: npt.NDArray[np.bool_]) -> "Flights":
        """Some of the flights."""
        return Flights(self.settings[some], self.sensors[some], self.rul[some], self.engine[some], self.condition[some])

    def by_condition(self, values: Floats) -> list[Floats]:
        """Values (N, ...) of each condition."""
        return [values[self.condition == k] for k in range(self.condition.max() + 1)]


def estimate(subsets: Mapping[str, Sequence[History]]) -> Fleet:
    """Statistics of the run-to-failure histories of each subset."""
    engines = subsets[SUBSET]
    level = np.concatenate([e.telemetry for name in GROUNDED for e in subsets[name]])[:, :SETTING_COUNT]
    level_middle, level_half = level.mean(axis=0, dtype=np.float64), level.std(axis=0, dtype=np.float64)
    flights = flights_of(engines)
    deviation = np.stack([part.std(axis=0) for part in flights.by_condition(flights.sensors)])
    young = flights.rul > RUL_THRESHOLDS[0]
    baseline = np.stack([part.mean(axis=0) for part in flights.of(young).by_condition(flights.sensors[young])])
    response = deviation.copy()
    for _ in range(ROUNDS):
        normal = (flights.sensors - baseline[flights.condition]) / response[flights.condition]
        traits, fitted = _fit(flights, normal)
        residual = normal - fitted
        moved, gain = _regressed(flights, normal, fitted)
        baseline, response = baseline + moved * response, response * gain
    noise = np.stack([part.std(axis=0) for part in flights.by_condition(residual)])
    mode = _modes(flights, normal)
    settings = flights.by_condition(flights.settings)
    middle, half = (np.stack([of(part, axis=0) for part in settings]) for of in (np.mean, np.std))
    lengths = np.bincount(flights.engine)
    return Fleet(
        shares=np.bincount(flights.condition) / len(flights.condition),
        settings_low=middle - np.sqrt(3) * half,  # as far as evenly spread values of that deviation reach
        settings_high=middle + np.sqrt(3) * half,
        grounded=sum(len(subsets[name]) for name in GROUNDED) / sum(map(len, subsets.values())),
        grounded_low=level_middle - np.sqrt(3) * level_half,
        grounded_high=level_middle + np.sqrt(3) * level_half,
        baseline=baseline,
        response=response,
        noise=noise * response / gain,
        mixing=np.linalg.cholesky(np.corrcoef((residual / noise[flights.condition]).T)),
        deviation=deviation,
        decimals=_decimals(np.concatenate([flights.settings, flights.sensors], axis=1)),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        modes=tuple(_mode(name, traits[mode == k], len(traits)) for k, name in enumerate(MODES)),
    )


def flights_of(engines: Sequence[History]) -> Flights:
    """Histories as columns. A condition is an altitude, in whole thousands of feet."""
    rows = np.concatenate([history.telemetry for history in engines]).astype(np.float64)
    number = np.repeat(np.arange(len(engines)), [len(history.cycle) for history in engines])
    rul = np.concatenate([history.known_rul() for history in engines])
    condition = np.unique(np.round(rows[:, 0]), return_inverse=True)[1]
    return Flights(rows[:, :SETTING_COUNT], rows[:, SETTING_COUNT:], rul, number, condition)


def _fit(flights: Flights, normal: Floats) -> tuple[Floats, Floats]:
    """The traits of each engine (E, P), and what they say of each flight (N, S), by least squares."""
    same = np.diff(flights.engine) == 0
    noise = np.diff(normal, axis=0)[same].std(axis=0) / np.sqrt(2)
    traits, fitted = [], np.empty_like(normal)
    for number in range(flights.engine.max() + 1):
        own = flights.engine == number
        rul, rows = flights.rul[own], normal[own]
        wear = np.exp(-rul / TIME_CONSTANTS[:, None])
        centred = wear - wear.mean(axis=1, keepdims=True)  # (time constants, flights)
        full = centred @ rows / (centred**2).sum(axis=1, keepdims=True)
        explained = ((full / noise) ** 2).sum(axis=1) * (centred**2).sum(axis=1)
        best = int(explained.argmax())
        offset = rows.mean(axis=0) - full[best] * wear[best].mean()
        fitted[own] = offset + wear[best][:, None] * full[best]
        traits.append(np.concatenate([[np.log(TIME_CONSTANTS[best]), np.log(len(rul))], offset, full[best]]))
    return np.array(traits), fitted


def _regressed(flights: Flights, normal: Floats, fitted: Floats) -> tuple[Floats, Floats]:
    """Intercept and slope (K, S) of each condition's readings on what the engines' traits say of them."""
    moved, gain = [], []
    for rows, said in zip(flights.by_condition(normal), flights.by_condition(fitted), strict=True):
        around = said - said.mean(axis=0)
        gain.append((around * rows).sum(axis=0) / (around**2).sum(axis=0))
        moved.append(rows.mean(axis=0) - gain[-1] * said.mean(axis=0))
    return np.array(moved), np.array(gain)


def _modes(flights: Flights, normal: Floats) -> Integers:
    """The mode of each engine (E,): which side of the direction in which ends differ most it lies on."""
    late = flights.rul < LATE
    ends = np.array([normal[late & (flights.engine == k)].mean(axis=0) for k in range(flights.engine.max() + 1)])
    around = ends - ends.mean(axis=0)
    direction = np.linalg.svd(around, full_matrices=False)[2][0]
    return np.asarray(around @ direction * np.sign(direction[TOLD_BY]) > 0, dtype=np.int64)


def _mode(name: str, traits: Floats, engines: int) -> Mode:
    mean, spread = traits.mean(axis=0), traits.std(axis=0)
    _, sizes, directions = np.linalg.svd((traits - mean) / spread, full_matrices=False)
    factors = sizes[:FACTORS, None] / np.sqrt(len(traits)) * directions[:FACTORS] * spread
    return Mode(name, len(traits) / engines, mean, factors)


def _decimals(rows: Floats) -> Integers:
    """The fewest decimals with which each column is written: data read as float32 are exact to seven digits."""
    exact = np.array([np.isclose(np.round(rows, n), rows, rtol=1e-6, atol=1e-7).all(axis=0) for n in range(5)])
    return np.asarray(exact.argmax(axis=0), dtype=np.int64)


def main() -> None:
    """Write the table of the training engines."""
    try:
        subsets = {name: cmapss.read_train(cmapss.data_folder(), name) for name in cmapss.SUBSETS}
    except DataError as error:
        sys.exit(f"estimate: {error}")
    engines = f"{len(subsets[SUBSET])} training engines of {SUBSET}, settings at sea level of {', '.join(GROUNDED)}"
    statistics.write(estimate(subsets), f"C-MAPSS, {engines}; by model.data.simulator.fit")


if __name__ == "__main__":
    main()
