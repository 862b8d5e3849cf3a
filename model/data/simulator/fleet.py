"""Simulate a fleet with the statistics of C-MAPSS, for the demo, tests and injected drift. numpy only, no torch.

    python -m model.data.simulator.fleet --engines 20 --seed 0          # histories, CSV on standard output

An engine starts new or slightly worn, wears exponentially in one of two modes, and fails at the end of its life. Each
flight is in one of six operating conditions. `model.data.simulator.statistics` defines the statistics.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from math import ceil

import numpy as np

from model.contract import CHANNELS
from model.data.cmapss import History
from model.data.simulator import statistics as fleet
from model.data.simulator.statistics import SETTING_COUNT, FleetStatistics, Floats, Integers
from model.windows import Readings

MAX_TRAIT_DEVIATION = 1.7  # standard deviations; traits of real engines are rarely farther from the mean


class SimulatedEngine:
    """One simulated engine. Its flights depend only on seed and number, not on how they are divided into calls.

    `remaining` is the number of cycles of wear left after the past flights. In a `mixed` fleet, some engines fly at sea
    level only, as in half of the C-MAPSS subsets. Their distribution then matches the drift reference of the model.
    """

    def __init__(
        self, number: int, seed: int = 0, mixed: bool = False, statistics: FleetStatistics | None = None
    ) -> None:
        self._fleet = statistics or _default_statistics()
        streams = np.random.SeedSequence((seed, number)).spawn(4)
        birth, self._condition_random, self._settings_random, self._noise_random = map(np.random.default_rng, streams)
        shares = np.array([mode.share for mode in self._fleet.modes])
        self.mode = self._fleet.modes[int(birth.choice(len(shares), p=shares / shares.sum()))]
        draws = np.clip(birth.standard_normal(len(self.mode.factors)), -MAX_TRAIT_DEVIATION, MAX_TRAIT_DEVIATION)
        traits = self.mode.mean + draws @ self.mode.factors
        self._time_constant = np.exp(traits[0])
        self._offset, self._full = np.split(traits[2:], 2)
        self.remaining = float(np.clip(np.rint(np.exp(traits[1])), self._fleet.shortest, self._fleet.longest))
        self._grounded = mixed and birth.random() < self._fleet.grounded

    @property
    def failed(self) -> bool:
        """Whether the engine has reached the end of its life."""
        return self.remaining <= 0

    def fly(self, flights: int = 1, wear_rate: float = 1.0) -> Readings:
        """Return the next flights (n, 17), oldest first. There are fewer than `flights` if the engine fails.

        Args:
            flights: maximum number of flights.
            wear_rate: cycles of wear per flight; at 2, the engine wears twice as fast.
        """
        n = max(0, min(flights, ceil(self.remaining / wear_rate)))
        remaining = self.remaining - wear_rate * np.arange(1.0, n + 1.0)
        self.remaining -= wear_rate * n
        condition, low, high = self._conditions(self._condition_random.random(n))
        settings = low + self._settings_random.random((n, SETTING_COUNT)) * (high - low)
        return self._fleet.round_rows(np.concatenate([settings, self._sensors(condition, remaining)], axis=1))

    def _conditions(self, draws: Floats) -> tuple[Integers, Floats, Floats]:
        """Map N uniform draws to conditions (N,), and return the lower and upper settings (N, 3) of each."""
        statistics = self._fleet
        if self._grounded:
            zeros = np.zeros_like(draws)[:, None]
            return (
                np.zeros(len(draws), dtype=np.int64),
                zeros + statistics.grounded_low,
                zeros + statistics.grounded_high,
            )
        k = np.searchsorted(np.cumsum(statistics.shares)[:-1], draws, side="right")
        return k, statistics.settings_low[k], statistics.settings_high[k]

    def _sensors(self, condition: Integers, remaining: Floats) -> Floats:
        """Return baseline + response x (offset + wear x full response) + noise for N flights (N, 14)."""
        statistics = self._fleet
        wear = np.exp(-np.maximum(remaining, 0.0) / self._time_constant)[:, None]
        noise = self._noise_random.standard_normal((len(remaining), len(statistics.mixing))) @ statistics.mixing.T
        response = statistics.response[condition] * (self._offset + wear * self._full)
        return np.asarray(statistics.baseline[condition] + response + statistics.noise[condition] * noise)


@cache
def _default_statistics() -> FleetStatistics:
    return fleet.read_statistics()


def simulate_histories(engines: int, seed: int = 0, mixed: bool = False) -> Iterator[History]:
    """Yield run-to-failure histories of simulated engines. RUL is 0 at the last cycle."""
    for number in range(engines):
        engine = SimulatedEngine(number, seed, mixed)
        rul = np.arange(engine.remaining)[::-1]
        yield History(engine_id(number, seed), np.arange(1, len(rul) + 1), engine.fly(len(rul)), rul)


def engine_id(number: int, seed: int) -> str:
    """Return the id of a simulated engine. Engines of different seeds have different ids."""
    return f"sim{seed}-{number}"


def main() -> None:
    """Print run-to-failure histories of simulated engines as CSV."""
    parser = argparse.ArgumentParser(description="Simulated engines, from their first flight to failure, as CSV.")
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    print("engine_id", "cycle", *CHANNELS, "rul", sep=",")
    try:
        for history in simulate_histories(flags.engines, flags.seed):
            for cycle, row, rul in zip(history.cycle, history.telemetry, history.require_rul(), strict=True):
                print(history.engine_id, cycle, *row, int(rul), sep=",")
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
