"""Flights of a simulated or recorded fleet, in the order in which they are sent: round robin over the engines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from model.data.cmapss import History
from model.data.simulator.drift_injection import DriftInjector
from model.data.simulator.fleet import SimulatedEngine, engine_id
from model.windows import Readings

AGE_SEED = 1  # added to the seed of a fleet for the draw of its ages


class ReplayFlight(NamedTuple):
    """One flight of one engine.

    `failed_at` is the failure cycle of the engine, if this is its last flight and the cycle is known. A `past` flight
    took place before the replay and is sent without waiting.
    """

    engine_id: str
    cycle: int
    telemetry: Readings  # (channels,)
    failed_at: int | None = None
    past: bool = False


@dataclass
class _SimulatedEngine:
    number: int
    engine: SimulatedEngine
    cycle: int = 0

    def next_flight(self, seed: int, row: Readings, past: bool = False) -> ReplayFlight:
        self.cycle += 1
        failed_at = self.cycle if self.engine.failed else None
        return ReplayFlight(engine_id(self.number, seed), self.cycle, row, failed_at, past)


def simulated_flights(
    engines: int, seed: int, injector: DriftInjector, endless: bool, retired: int | None
) -> Iterator[ReplayFlight]:
    """Yield the flights of a simulated fleet. Some of its engines fly at sea level only.

    Args:
        engines: number of engines that fly at the same time.
        seed: the same seed gives the same fleet.
        injector: injected drift. Its flights are counted from the first that is not past.
        endless: whether a new engine replaces each that failed.
        retired: None for a fleet of new engines. Else the engines are of any age, and this number failed before.
    """
    numbers = count()
    if retired is not None:
        for number in (next(numbers) for _ in range(retired)):
            yield from _past_flights(_SimulatedEngine(number, SimulatedEngine(number, seed, mixed=True)), seed, None)
    fleet = [
        _SimulatedEngine(number, SimulatedEngine(number, seed, mixed=True))
        for number in (next(numbers) for _ in range(engines))
    ]
    ages = np.random.default_rng((seed, AGE_SEED)).random(engines)
    for simulated, age in zip(fleet, ages, strict=True):
        if retired is not None:
            yield from _past_flights(simulated, seed, int(age * simulated.engine.remaining))
    flight = 0
    while fleet:
        for simulated in fleet:
            row = simulated.engine.fly(1, injector.wear_rate(flight))[0]
            yield simulated.next_flight(seed, injector.inject(row, flight, (seed, simulated.number, simulated.cycle)))
            flight += 1
        failed = sum(simulated.engine.failed for simulated in fleet)
        fleet = [simulated for simulated in fleet if not simulated.engine.failed]
        fleet += [
            _SimulatedEngine(k, SimulatedEngine(k, seed, mixed=True))
            for k in (next(numbers) for _ in range(failed if endless else 0))
        ]


def _past_flights(simulated: _SimulatedEngine, seed: int, flights: int | None) -> Iterator[ReplayFlight]:
    """Yield `flights` past flights of an engine, or all until its failure."""
    while flights is None or simulated.cycle < flights:
        rows = simulated.engine.fly(1)
        if not len(rows):
            return
        yield simulated.next_flight(seed, rows[0], past=True)


def recorded_flights(engines: Sequence[History], seed: int, injector: DriftInjector) -> Iterator[ReplayFlight]:
    """Yield the flights of histories, round robin. The last flight has the failure cycle if its RUL is known."""
    flight = 0
    for index in range(max(len(engine.cycle) for engine in engines)):
        for number, engine in enumerate(engines):
            if index < len(engine.cycle):
                cycle, is_last = int(engine.cycle[index]), index == len(engine.cycle) - 1
                row = injector.inject(engine.telemetry[index], flight, (seed, number, cycle))
                yield ReplayFlight(engine.engine_id, cycle, row, _failure_cycle(engine) if is_last else None)
                flight += 1


def _failure_cycle(engine: History) -> int | None:
    rul = None if engine.rul is None else engine.rul[-1]
    return None if rul is None or not np.isfinite(rul) else int(engine.cycle[-1]) + round(float(rul))
