"""Estimate the fleet statistics of the simulator from the training engines of C-MAPSS. numpy only.

    python -m model.data.simulator.fit                    # reads CMAPSS_DIR or data/cmapss, writes fleet.json here

In one operating condition, a sensor is modelled as baseline + response x (offset + full x exp(-RUL / time constant))
+ noise. Time constant, offset and full response are fitted to each engine over all conditions. Baseline and response of
each condition are then fitted to all engines. Both steps are repeated. The traits of the engines of each mode of wear
are modelled as a Gaussian in its largest few directions; the other directions are errors of the fits.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.contract import RUL_THRESHOLDS, SENSORS
from model.data import cmapss
from model.data.cmapss import DataError, History
from model.data.simulator import statistics
from model.data.simulator.statistics import SETTING_COUNT, FleetStatistics, Floats, Integers, WearMode

SUBSET = "FD004"  # the subset with six conditions and both modes of wear
SEA_LEVEL_SUBSETS = ("FD001", "FD003")  # fly in the first condition only, with the same statistics as FD004
TIME_CONSTANTS = np.geomspace(10, 300, 120)  # cycles; fitted values are from 20 to 150
ROUNDS = 5  # afterwards no response changes by 0.1 %
FACTORS = 4  # of 30; they explain 92 % of the variance between engines of a mode
LATE_CYCLES = 20  # before failure, where the mode of wear is visible
MODE_SENSOR = SENSORS.index("sensor_12")  # phi falls with compressor wear (FD001) and rises with fan wear
MODES = ("HPC", "fan")


class FlightTable(NamedTuple):
    """All flights of a fleet: settings (N, 3), sensors (N, S), true RUL (N,), engine (N,) and condition (N,)."""

    settings: Floats
    sensors: Floats
    rul: Floats
    engine: Integers
    condition: Integers

    def select(self, mask: npt.NDArray[np.bool_]) -> "FlightTable":
        """Return the flights where mask (N,) is true."""
        return FlightTable(
            self.settings[mask], self.sensors[mask], self.rul[mask], self.engine[mask], self.condition[mask]
        )

    def by_condition(self, values: Floats) -> list[Floats]:
        """Split values (N, ...) by condition."""
        return [values[self.condition == k] for k in range(self.condition.max() + 1)]


def estimate_statistics(subsets: Mapping[str, Sequence[History]]) -> FleetStatistics:
    """Estimate fleet statistics from the run-to-failure histories of each subset."""
    engines = subsets[SUBSET]
    sea_level = np.concatenate([e.telemetry for name in SEA_LEVEL_SUBSETS for e in subsets[name]])[:, :SETTING_COUNT]
    sea_level_mean, sea_level_std = sea_level.mean(axis=0, dtype=np.float64), sea_level.std(axis=0, dtype=np.float64)
    flights = build_flight_table(engines)
    deviation = np.stack([part.std(axis=0) for part in flights.by_condition(flights.sensors)])
    early = flights.rul > RUL_THRESHOLDS[0]
    baseline = np.stack([part.mean(axis=0) for part in flights.select(early).by_condition(flights.sensors[early])])
    response = deviation.copy()
    for _ in range(ROUNDS):
        normal = (flights.sensors - baseline[flights.condition]) / response[flights.condition]
        traits, fitted = _fit_traits(flights, normal)
        residual = normal - fitted
        shift, gain = _regress_conditions(flights, normal, fitted)
        baseline, response = baseline + shift * response, response * gain
    noise = np.stack([part.std(axis=0) for part in flights.by_condition(residual)])
    mode = _assign_modes(flights, normal)
    settings = flights.by_condition(flights.settings)
    mean, std = (np.stack([statistic(part, axis=0) for part in settings]) for statistic in (np.mean, np.std))
    lengths = np.bincount(flights.engine)
    return FleetStatistics(
        shares=np.bincount(flights.condition) / len(flights.condition),
        settings_low=mean - np.sqrt(3) * std,  # range of a uniform distribution with this standard deviation
        settings_high=mean + np.sqrt(3) * std,
        grounded=sum(len(subsets[name]) for name in SEA_LEVEL_SUBSETS) / sum(map(len, subsets.values())),
        grounded_low=sea_level_mean - np.sqrt(3) * sea_level_std,
        grounded_high=sea_level_mean + np.sqrt(3) * sea_level_std,
        baseline=baseline,
        response=response,
        noise=noise * response / gain,
        mixing=np.linalg.cholesky(np.corrcoef((residual / noise[flights.condition]).T)),
        deviation=deviation,
        decimals=_count_decimals(np.concatenate([flights.settings, flights.sensors], axis=1)),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        modes=tuple(_summarise_mode(name, traits[mode == k], len(traits)) for k, name in enumerate(MODES)),
    )


def build_flight_table(engines: Sequence[History]) -> FlightTable:
    """Concatenate histories. Conditions are distinguished by altitude, rounded to 1000 ft."""
    rows = np.concatenate([history.telemetry for history in engines]).astype(np.float64)
    number = np.repeat(np.arange(len(engines)), [len(history.cycle) for history in engines])
    rul = np.concatenate([history.require_rul() for history in engines])
    condition = np.unique(np.round(rows[:, 0]), return_inverse=True)[1]
    return FlightTable(rows[:, :SETTING_COUNT], rows[:, SETTING_COUNT:], rul, number, condition)


def _fit_traits(flights: FlightTable, normal: Floats) -> tuple[Floats, Floats]:
    """Fit the traits of each engine (E, P) by least squares, and return them with the fitted sensors (N, S)."""
    same = np.diff(flights.engine) == 0
    noise = np.diff(normal, axis=0)[same].std(axis=0) / np.sqrt(2)
    traits, fitted = [], np.empty_like(normal)
    for number in range(flights.engine.max() + 1):
        mask = flights.engine == number
        rul, rows = flights.rul[mask], normal[mask]
        wear = np.exp(-rul / TIME_CONSTANTS[:, None])
        centred = wear - wear.mean(axis=1, keepdims=True)  # (time constants, flights)
        full = centred @ rows / (centred**2).sum(axis=1, keepdims=True)
        explained = ((full / noise) ** 2).sum(axis=1) * (centred**2).sum(axis=1)
        best = int(explained.argmax())
        offset = rows.mean(axis=0) - full[best] * wear[best].mean()
        fitted[mask] = offset + wear[best][:, None] * full[best]
        traits.append(np.concatenate([[np.log(TIME_CONSTANTS[best]), np.log(len(rul))], offset, full[best]]))
    return np.array(traits), fitted


def _regress_conditions(flights: FlightTable, normal: Floats, fitted: Floats) -> tuple[Floats, Floats]:
    """Regress the readings of each condition on the fitted ones, and return intercepts and slopes (K, S)."""
    shift, gain = [], []
    for rows, fitted_rows in zip(flights.by_condition(normal), flights.by_condition(fitted), strict=True):
        centred_rows = fitted_rows - fitted_rows.mean(axis=0)
        gain.append((centred_rows * rows).sum(axis=0) / (centred_rows**2).sum(axis=0))
        shift.append(rows.mean(axis=0) - gain[-1] * fitted_rows.mean(axis=0))
    return np.array(shift), np.array(gain)


def _assign_modes(flights: FlightTable, normal: Floats) -> Integers:
    """Return the mode of each engine (E,): the sign along the main direction of variation of late readings."""
    late = flights.rul < LATE_CYCLES
    late_means = np.array([normal[late & (flights.engine == k)].mean(axis=0) for k in range(flights.engine.max() + 1)])
    centred_rows = late_means - late_means.mean(axis=0)
    direction = np.linalg.svd(centred_rows, full_matrices=False)[2][0]
    return np.asarray(centred_rows @ direction * np.sign(direction[MODE_SENSOR]) > 0, dtype=np.int64)


def _summarise_mode(name: str, traits: Floats, engines: int) -> WearMode:
    mean, spread = traits.mean(axis=0), traits.std(axis=0)
    _, sizes, directions = np.linalg.svd((traits - mean) / spread, full_matrices=False)
    factors = sizes[:FACTORS, None] / np.sqrt(len(traits)) * directions[:FACTORS] * spread
    return WearMode(name, len(traits) / engines, mean, factors)


def _count_decimals(rows: Floats) -> Integers:
    """Return the smallest number of decimals that represents each column; float32 is exact to seven digits."""
    is_exact = np.array([np.isclose(np.round(rows, n), rows, rtol=1e-6, atol=1e-7).all(axis=0) for n in range(5)])
    return np.asarray(is_exact.argmax(axis=0), dtype=np.int64)


def main() -> None:
    """Write the statistics of the training engines to model/data/simulator/fleet.json."""
    try:
        subsets = {name: cmapss.read_train(cmapss.data_folder(), name) for name in cmapss.SUBSETS}
    except DataError as error:
        sys.exit(f"estimate: {error}")
    engines = (
        f"{len(subsets[SUBSET])} training engines of {SUBSET}, settings at sea level of {', '.join(SEA_LEVEL_SUBSETS)}"
    )
    statistics.write_statistics(estimate_statistics(subsets), f"C-MAPSS, {engines}; by model.data.simulator.fit")


if __name__ == "__main__":
    main()
