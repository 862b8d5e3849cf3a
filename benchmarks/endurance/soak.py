"""200,000 requests of random size: memory and descriptors do not grow."""

import asyncio
import random
from collections.abc import Iterator

import numpy as np

from benchmarks.endurance.client import RequestOutcomes, in_turn
from benchmarks.endurance.stage import Line, Running, say, service, windows_binary, windows_json

REQUESTS, STEP, CONNECTIONS = 200_000, 10_000, 8
JSON_SHARE = 0.1
GROWTH_MB = 1.0  # per step of requests


def lines() -> Iterator[Line]:
    """Yield the line of the soak. Most requests are binary, to send many; some are JSON."""
    with service() as running:
        yield asyncio.run(_run_soak(running))


async def _run_soak(running: Running) -> Line:
    sizes = range(1, 65)
    binary, text = [windows_binary(n) for n in sizes], [windows_json(n) for n in sizes]
    chance = random.Random(0)
    memory, descriptors, outcomes = [], set(), RequestOutcomes()
    for step in range(REQUESTS // STEP):
        requests = (chance.choice(text if chance.random() < JSON_SHARE else binary) for _ in range(STEP))
        step_outcomes = await in_turn(running.port, requests, CONNECTIONS)
        outcomes.due += step_outcomes.due
        outcomes.broken += step_outcomes.broken
        for status, seconds in step_outcomes.seconds.items():
            outcomes.seconds.setdefault(status, []).extend(seconds)
        await asyncio.sleep(1)
        memory.append(running.memory() * 2**20 / 1e6)
        descriptors.add(running.descriptors())
        say(f"{(step + 1) * STEP}: {memory[-1]:.1f} MB, {descriptors}")
    last = memory[len(memory) // 2 :]
    slope = float(np.polyfit(range(len(last)), last, 1)[0])
    return Line(
        f"{outcomes.due:,} requests of 1 to 64 windows, 90 % binary",
        f"{outcomes.count(200):,} answered, {outcomes.due - outcomes.count(200)} not; memory over the last half "
        f"{slope:+.2f} MB per {STEP:,}, {last[0]:.0f} to {last[-1]:.0f} MB; "
        f"{min(descriptors)} to {max(descriptors)} descriptors",
        f"all answered; less than {GROWTH_MB:g} MB per {STEP:,}; constant number of descriptors",
        outcomes.count(200) == outcomes.due and slope < GROWTH_MB and len(descriptors) == 1,
        {"memory_mb": memory, "slope_mb": slope, "descriptors": sorted(descriptors)},
    )
