"""Clients that ask all the time: collectors, whose every acknowledged flight must be there later, and dashboards.

A flight that was not acknowledged is told again, the same one, as a data collector does. Knows no fault.
"""

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.endurance.client import Connection, request
from benchmarks.endurance.stage import PREDICT
from benchmarks.load import JSON_HEADERS, get, golden
from benchmarks.serving import base

COLLECTORS, DASHBOARDS = 4, 2
WELL_SECONDS = 60.0  # that a service may take to become well
PAUSE_SECONDS = 0.05  # of a client after a failure
SETTLED_SECONDS = 2.0  # without any failure, until which nothing is called well
Event = tuple[float, str, str]  # when, which call, and its status or what broke


class Untried(Exception):
    """A fault that cannot be made on this machine; the message says why."""


class Outcome(NamedTuple):
    """What became of a fault. `well`: seconds from its end until everybody is answered again; None if never."""

    saw: str
    acknowledged: int
    lost: int
    well: float | None

    def kept(self) -> bool:
        """Whether nothing acknowledged was lost, and all became well without help."""
        return self.lost == 0 and self.well is not None and self.acknowledged > 0


class Clients:
    """They ask from a thread of their own until the block of `asking` ends."""

    def __init__(self, port: int) -> None:
        self.port, self.events = port, list[Event]()
        self.told = [0] * COLLECTORS  # the cycles below it are acknowledged
        self._stop = threading.Event()
        self._lines = golden()[0][0].tolist()

    def run(self) -> None:
        """Ask until told to stop."""
        asyncio.run(self._all())

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()

    async def _all(self) -> None:
        collectors = [self._one("cycles", self._flight, k) for k in range(COLLECTORS)]
        await asyncio.gather(*collectors, *(self._one("predict", self._window, k) for k in range(DASHBOARDS)))

    async def _one(self, name: str, body: Callable[[int], bytes], k: int) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            try:
                if connection is None or not connection.open:
                    connection = await Connection.to(self.port)
                status = str((await connection.ask(body(k))).status)
            except (OSError, TimeoutError) as error:
                status, connection = type(error).__name__, None
            self.events.append((time.monotonic(), name, status))
            if status == "200" and name == "cycles":
                self.told[k] += 1
            await asyncio.sleep(0.005 if status == "200" else PAUSE_SECONDS)

    def _flight(self, k: int) -> bytes:
        cycle = self.told[k]
        row = {"engine_id": f"collector {k}", "cycle": cycle, "telemetry": self._lines[cycle % len(self._lines)]}
        return request("/v1/cycles", json.dumps({"cycles": [row]}).encode(), JSON_HEADERS)

    def _window(self, _: int) -> bytes:
        return request(PREDICT, json.dumps({"instances": [{"telemetry": self._lines}]}).encode(), JSON_HEADERS)


def observed(port: int, fault: Callable[[], str | None]) -> Outcome:
    """What clients see of a fault, which is over when `fault` returns; it may give something to add."""
    clients = Clients(port)
    thread = threading.Thread(target=clients.run)
    thread.start()
    time.sleep(SETTLED_SECONDS)
    begun = time.monotonic()
    try:
        more = fault()
        ended = time.monotonic()
        well = _until_well(clients, ended)
    finally:
        clients.stop()
        thread.join()
    said = _saw([event for event in clients.events if event[0] >= begun], begun)
    return Outcome(f"{said}{f'; {more}' if more else ''}", sum(clients.told), _lost(port, clients.told), well)


def _until_well(clients: Clients, ended: float) -> float | None:
    """Seconds from the end of the fault to the first of the answers after which nothing failed for a while."""
    while time.monotonic() < ended + WELL_SECONDS:
        time.sleep(0.1)
        failed = max((when for when, _, status in clients.events if status != "200"), default=0.0)
        good = {name: when for when, name, status in reversed(clients.events) if when > max(failed, ended)}
        if len(good) == 2 and time.monotonic() > max(failed, ended) + SETTLED_SECONDS:
            return max(good.values()) - ended
    return None


def _saw(events: list[Event], begun: float) -> str:
    """Each kind of failure with its number, and the longest time without an answer, by call."""
    parts = []
    for call in ("predict", "cycles"):
        failures = Counter(status for _, name, status in events if name == call and status != "200")
        good = [when for when, name, status in events if name == call and status == "200"]
        silent = max((b - a for a, b in itertools.pairwise([begun, *good])), default=0.0)
        told = ", ".join(f"{n:,} x {status}" for status, n in failures.most_common()) or "no failure"
        parts.append(f"{call}: {told}, longest silence {silent:.1f} s")
    return "; ".join(parts)


def _lost(port: int, told: list[int]) -> int:
    """How many acknowledged flights are not there, once each."""
    lost = 0
    for k, cycles in enumerate(told):
        status, answer = get(f"{base(port)}/v1/engines/collector%20{k}")
        there = Counter(row["cycle"] for row in json.loads(answer)["history"]) if status == 200 else Counter()
        lost += sum(there[cycle] != 1 for cycle in range(cycles))
    return lost
