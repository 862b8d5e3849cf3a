"""Clients that send requests continuously: collectors, whose acknowledged flights must be stored, and dashboards.

A collector sends a flight again until it is acknowledged, as a data collector does. Independent of the faults.
"""

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.endurance.client import Connection, request
from benchmarks.endurance.stage import PREDICT
from benchmarks.load import JSON_HEADERS, get, golden
from benchmarks.serving import base

COLLECTORS, DASHBOARDS = 4, 2
WELL_SECONDS = 60.0  # maximum time to recovery
PAUSE_SECONDS = 0.05  # pause of a client after a failure
SETTLED_SECONDS = 2.0  # time without a failure that is required for recovery
REFUSED = "503"


class Event(NamedTuple):
    """A response or failure: time, call, client index, and the status or the exception name."""

    when: float
    call: str
    client: int
    status: str


class Untried(Exception):
    """A fault that cannot be injected on this machine. The message states the reason."""


class FaultReport(NamedTuple):
    """Description of an injected fault, and whether it took effect and met its requirement."""

    description: str
    proven: bool


class Outcome(NamedTuple):
    """The effect of a fault. `well`: seconds from its end until every client gets responses again; None if never."""

    saw: str
    acknowledged: int
    lost: int
    well: float | None
    proven: bool = True

    def passed(self) -> bool:
        """Return whether the fault took effect, no acknowledged flight was lost, and the service recovered."""
        return self.proven and self.lost == 0 and self.well is not None and self.acknowledged > 0


class Clients:
    """Clients that send requests from a separate thread until `stop`."""

    def __init__(self, port: int) -> None:
        self.port, self.events = port, list[Event]()
        self.acknowledged = [0] * COLLECTORS  # all lower cycles are acknowledged
        self._stop = threading.Event()
        self._readings = golden()[0][0].tolist()

    def run(self) -> None:
        """Send requests until `stop` is called."""
        asyncio.run(self._run_clients())

    def stop(self) -> None:
        """Stop sending requests."""
        self._stop.set()

    async def _run_clients(self) -> None:
        collectors = [self._run_client("cycles", self._build_flight_request, k) for k in range(COLLECTORS)]
        await asyncio.gather(
            *collectors, *(self._run_client("predict", self._build_predict_request, k) for k in range(DASHBOARDS))
        )

    async def _run_client(self, call: str, body: Callable[[int], bytes], k: int) -> None:
        connection: Connection | None = None
        while not self._stop.is_set():
            try:
                if connection is None or not connection.open:
                    connection = await Connection.to(self.port)
                status = str((await connection.ask(body(k))).status)
            except (OSError, TimeoutError) as error:
                status, connection = type(error).__name__, None
            self.events.append(Event(time.monotonic(), call, k, status))
            if status == "200" and call == "cycles":
                self.acknowledged[k] += 1
            await asyncio.sleep(0.005 if status == "200" else PAUSE_SECONDS)

    def _build_flight_request(self, k: int) -> bytes:
        cycle = self.acknowledged[k]
        row = {"engine_id": f"collector {k}", "cycle": cycle, "telemetry": self._readings[cycle % len(self._readings)]}
        return request("/v1/cycles", json.dumps({"cycles": [row]}).encode(), JSON_HEADERS)

    def _build_predict_request(self, _: int) -> bytes:
        return request(PREDICT, json.dumps({"instances": [{"telemetry": self._readings}]}).encode(), JSON_HEADERS)


def observed(port: int, fault: Callable[[], FaultReport | None], refused: bool = False) -> Outcome:
    """Run clients during a fault, which ends when `fault` returns, and return the outcome.

    Args:
        port: of the service.
        fault: injects and ends the fault; its report is added to the summary.
        refused: whether flights must be rejected with 503 meanwhile; otherwise the fault had no effect.
    """
    clients = Clients(port)
    thread = threading.Thread(target=clients.run)
    thread.start()
    time.sleep(SETTLED_SECONDS)
    begun = time.monotonic()
    try:
        report = fault()
        ended = time.monotonic()
        well = _wait_until_well(clients, ended)
    finally:
        clients.stop()
        thread.join()
    events = [event for event in clients.events if event.when >= begun]
    proven = not refused or any(event.call == "cycles" and event.status == REFUSED for event in events)
    summary = "; ".join((_summarise_events(events, begun), *([report.description] if report else [])))
    acknowledged = sum(clients.acknowledged)
    return Outcome(
        summary,
        acknowledged,
        _count_lost(port, clients.acknowledged),
        well,
        proven and (report is None or report.proven),
    )


def _wait_until_well(clients: Clients, ended: float) -> float | None:
    while time.monotonic() < ended + WELL_SECONDS:
        time.sleep(0.1)
        if (seconds := well(clients.events, ended, time.monotonic())) is not None:
            return seconds
    return None


def well(events: Sequence[Event], ended: float, now: float) -> float | None:
    """Return seconds from the end of the fault until every client got a response; None while one has not."""
    since = max((event.when for event in events if event.status != "200"), default=ended)
    since = max(since, ended)
    first = {(event.call, event.client): event.when for event in reversed(events) if event.when > since}
    settled = now > since + SETTLED_SECONDS
    return max(first.values()) - ended if settled and len(first) == COLLECTORS + DASHBOARDS else None


def _summarise_events(events: list[Event], begun: float) -> str:
    """Format the counts of failures and the longest time without a response, by call."""
    parts = []
    for call in ("predict", "cycles"):
        failures = Counter(event.status for event in events if event.call == call and event.status != "200")
        good = [event.when for event in events if event.call == call and event.status == "200"]
        silent = max((b - a for a, b in itertools.pairwise([begun, *good])), default=0.0)
        failure_text = ", ".join(f"{n:,} x {status}" for status, n in failures.most_common()) or "no failure"
        parts.append(f"{call}: {failure_text}, longest silence {silent:.1f} s")
    return "; ".join(parts)


def _count_lost(port: int, acknowledged: list[int]) -> int:
    """Return the number of acknowledged flights that are not stored exactly once."""
    lost = 0
    for k, cycles in enumerate(acknowledged):
        status, answer = get(f"{base(port)}/v1/engines/collector%20{k}")
        stored = Counter(row["cycle"] for row in json.loads(answer)["history"]) if status == 200 else Counter()
        lost += sum(stored[cycle] != 1 for cycle in range(cycles))
    return lost
