"""A simulated fleet with the statistics of C-MAPSS: demo, tests, planted drift. numpy only, no torch.

    python -m model.data.simulator.fleet --engines 20 --seed 0          # run-to-failure histories, CSV on standard output

An engine begins somewhere between new and slightly worn, wears exponentially in one of two ways, and fails when its
life is used up. Each flight is in one of six operating conditions. `model.data.simulator.statistics` holds the statistics.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from math import ceil

import numpy as np

from model.data.simulator import statistics as fleet
from model.data.cmapss import History
from model.contract import CHANNELS
from model.data.simulator.statistics import SETTING_COUNT, Fleet, Floats, Integers
from model.windows import Readings

EXTREME = 1.7  # deviations; real engines hardly go beyond, and readings of one that does are like those of no engine


class Engine:
    """One engine, flown flight by flight: seed and number decide all of it, however many flights are asked for at once.

    `remaining` says how many cycles of wear are left, after the flights that were flown. In a `mixed` fleet some
    engines fly at sea level only, as in half of C-MAPSS's subsets: then readings are those that the model's
    reference of drift is made of.
    """

    def __init__(self, number: int, seed: int = 0, mixed: bool = False, statistics: Fleet | None = None) -> None:
        self._fleet = statistics or _committed()
        streams = np.random.SeedSequence((seed, number)).spawn(4)
        birth, self._where, self._how, self._noise = map(np.random.default_rng, streams)
        shares = np.array([mode.share for mode in self._fleet.modes])
        self.mode = self._fleet.modes[int(birth.choice(len(shares), p=shares / shares.sum()))]
        drawn = np.clip(birth.standard_normal(len(self.mode.factors)), -EXTREME, EXTREME)
        traits = self.mode.mean + drawn @ self.mode.factors
        self._time_constant = np.exp(traits[0])
        self._offset, self._full = np.split(traits[2:], 2)
        self.remaining = float(np.clip(np.rint(np.exp(traits[1])), self._fleet.shortest, self._fleet.longest))
        self._grounded = mixed and birth.random() < self._fleet.grounded

    @property
    def failed(self) -> bool:
        """Whether the last flight was flown."""
        return self.remaining <= 0

    def fly(self, flights: int = 1, pace: float = 1.0) -> Readings:
        """The next flights (n, 17), oldest first; fewer than asked for if the engine fails meanwhile.

        Args:
            flights: how many.
            pace: cycles of wear in one flight; 2 is an engine that wears twice as fast.
        """
        n = max(0, min(flights, ceil(self.remaining / pace)))
        left = self.remaining - pace * np.arange(1.0, n + 1.0)
        self.remaining -= pace * n
        condition, low, high = self._conditions(self._where.random(n))
        settings = low + self._how.random((n, SETTING_COUNT)) * (high - low)
        return self._fleet.rounded(np.concatenate([settings, self._sensors(condition, left)], axis=1))

    def _conditions(self, drawn: Floats) -> tuple[Integers, Floats, Floats]:
        """The conditions (N,) that N even draws mean, and between which settings (N, 3) they lie."""
        of = self._fleet
        if self._grounded:
            level = np.zeros_like(drawn)[:, None]
            return np.zeros(len(drawn), dtype=np.int64), level + of.grounded_low, level + of.grounded_high
        k = np.searchsorted(np.cumsum(of.shares)[:-1], drawn, side="right")
        return k, of.settings_low[k], of.settings_high[k]

    def _sensors(self, condition: Integers, left: Floats) -> Floats:
        """Baseline + response x (offset + wear x full response) + noise, for n flights (n, 14)."""
        of = self._fleet
        wear = np.exp(-np.maximum(left, 0.0) / self._time_constant)[:, None]
        noise = self._noise.standard_normal((len(left), len(of.mixing))) @ of.mixing.T
        response = of.response[condition] * (self._offset + wear * self._full)
        return np.asarray(of.baseline[condition] + response + of.noise[condition] * noise)


@cache
def _committed() -> Fleet:
    return fleet.read()


def histories(engines: int, seed: int = 0, mixed: bool = False) -> Iterator[History]:
    """Whole lives of simulated engines, the RUL of each cycle known; 0 at the last."""
    for number in range(engines):
        engine = Engine(number, seed, mixed)
        rul = np.arange(engine.remaining)[::-1]
        yield History(engine_id(number, seed), np.arange(1, len(rul) + 1), engine.fly(len(rul)), rul)


def engine_id(number: int, seed: int) -> str:
    """What a simulated engine is called: other seeds are other engines."""
    return f"sim{seed}-{number}"


def main() -> None:
    """Print the lives of some engines."""
    parser = argparse.ArgumentParser(description="Simulated engines, from their first flight to failure, as CSV.")
    parser.add_argument("--engines", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    print("engine_id", "cycle", *CHANNELS, "rul", sep=",")
    try:
        for history in histories(flags.engines, flags.seed):
            for cycle, row, rul in zip(history.cycle, history.telemetry, history.known_rul(), strict=True):
                print(history.engine_id, cycle, *row, int(rul), sep=",")
    except BrokenPipeError:  # `| head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
