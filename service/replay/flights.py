"""The flights of a fleet in the order in which they are flown: every engine in turn, simulated or from a file.

Knows engines and drift, no HTTP and no clock.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from model.data.cmapss import History
from model.data.simulator.drift_injection import Planted
from model.data.simulator.fleet import Engine, engine_id
from model.windows import Readings

AGE = 1  # what the ages of a fleet are drawn for, beside its seed


class Flight(NamedTuple):
    """One flight of one engine. `failed_at` is the engine's end, where this is the last flight and the end is known.

    A `past` flight was flown before the replay began: it is not waited for.
    """

    engine_id: str
    cycle: int
    telemetry: Readings  # (channels,)
    failed_at: int | None = None
    past: bool = False


@dataclass
class _Flying:
    number: int
    engine: Engine
    cycle: int = 0

    def fly(self, seed: int, row: Readings, past: bool = False) -> Flight:
        self.cycle += 1
        failed_at = self.cycle if self.engine.failed else None
        return Flight(engine_id(self.number, seed), self.cycle, row, failed_at, past)


def simulated(engines: int, seed: int, planted: Planted, endless: bool, retired: int | None) -> Iterator[Flight]:
    """A simulated fleet, some of whose engines fly at sea level only.

    Args:
        engines: how many fly at a time.
        seed: with which the same fleet flies again.
        planted: drift; flights are counted from the first that is not past.
        endless: whether a new engine takes the place of one that failed.
        retired: None for a fleet of new engines; else its engines are of any age, and as many failed before.
    """
    numbers = count()
    if retired is not None:
        for number in (next(numbers) for _ in range(retired)):
            yield from _past(_Flying(number, Engine(number, seed, mixed=True)), seed, None)
    fleet = [_Flying(number, Engine(number, seed, mixed=True)) for number in (next(numbers) for _ in range(engines))]
    ages = np.random.default_rng((seed, AGE)).random(engines)
    for one, age in zip(fleet, ages, strict=True):
        if retired is not None:
            yield from _past(one, seed, int(age * one.engine.remaining))
    flight = 0
    while fleet:
        for one in fleet:
            row = one.engine.fly(1, planted.pace(flight))[0]
            yield one.fly(seed, planted.disturbed(row, flight, (seed, one.number, one.cycle)))
            flight += 1
        failed = sum(one.engine.failed for one in fleet)
        fleet = [one for one in fleet if not one.engine.failed]
        fleet += [
            _Flying(k, Engine(k, seed, mixed=True)) for k in (next(numbers) for _ in range(failed if endless else 0))
        ]


def _past(one: _Flying, seed: int, flights: int | None) -> Iterator[Flight]:
    """So many flights of an engine, or its whole life."""
    while flights is None or one.cycle < flights:
        rows = one.engine.fly(1)
        if not len(rows):
            return
        yield one.fly(seed, rows[0], past=True)


def recorded(engines: Sequence[History], seed: int, planted: Planted) -> Iterator[Flight]:
    """Histories, a flight of each in turn. An engine's end is known where the RUL of its last flight is."""
    flight = 0
    for place in range(max(len(engine.cycle) for engine in engines)):
        for number, engine in enumerate(engines):
            if place < len(engine.cycle):
                cycle, last = int(engine.cycle[place]), place == len(engine.cycle) - 1
                row = planted.disturbed(engine.telemetry[place], flight, (seed, number, cycle))
                yield Flight(engine.engine_id, cycle, row, _end(engine) if last else None)
                flight += 1


def _end(engine: History) -> int | None:
    left = None if engine.rul is None else engine.rul[-1]
    return None if left is None or not np.isfinite(left) else int(engine.cycle[-1]) + round(float(left))
