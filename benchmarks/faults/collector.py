"""Clients that ask all the time: collectors, whose every acknowledged flight must be there later, and dashboards.

A flight that was not acknowledged is sent again, unchanged, as a data collector does.
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
WELL_SECONDS = 60.0  # that a service may take to become well
PAUSE_SECONDS = 0.05  # of a client after a failure
SETTLED_SECONDS = 2.0  # without any failure, until which nothing is called well
REFUSED = "503"


class Event(NamedTuple):
    """An answer, or its failure: when, which call, which of the clients that make it, and the status or what broke."""

    when: float
    call: str
    client: int
    status: str


class Untried(Exception):
    """A fault that cannot be made on this machine; the message says why."""


class FaultReport(NamedTuple):
    """What a fault says of itself, and whether it was there and met what is promised: else its line proves nothing."""

    description: str
    proven: bool


class Outcome(NamedTuple):
    """What became of a fault. `well`: seconds from its end until everybody is answered again; None if never."""

    saw: str
    acknowledged: int
    lost: int
    well: float | None
    proven: bool = True

    def passed(self) -> bool:
        """Whether the fault was one, nothing acknowledged was lost, and all became well without help."""
        return self.proven and self.lost == 0 and self.well is not None and self.acknowledged > 0


class Clients:
    """They ask from a thread of their own until the block of `asking` ends."""

    def __init__(self, port: int) -> None:
        self.port, self.events = port, list[Event]()
        self.acknowledged = [0] * COLLECTORS  # the cycles below it are acknowledged
        self._stop = threading.Event()
        self._readings = golden()[0][0].tolist()

    def run(self) -> None:
        """Send requests until stopped."""
        asyncio.run(self._run_clients())

    def stop(self) -> None:
        """Ask no more."""
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
    """Return what clients see during a fault, which ends when `fault` returns. `fault` may return a remark.

    `refused`: flights must have been refused meanwhile, or there was no fault.
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
    """Seconds from the end of the fault until each client was answered; None while one is not, or something fails."""
    since = max((event.when for event in events if event.status != "200"), default=ended)
    since = max(since, ended)
    first = {(event.call, event.client): event.when for event in reversed(events) if event.when > since}
    settled = now > since + SETTLED_SECONDS
    return max(first.values()) - ended if settled and len(first) == COLLECTORS + DASHBOARDS else None


def _summarise_events(events: list[Event], begun: float) -> str:
    """Each kind of failure with its number, and the longest time without an answer, by call."""
    parts = []
    for call in ("predict", "cycles"):
        failures = Counter(event.status for event in events if event.call == call and event.status != "200")
        good = [event.when for event in events if event.call == call and event.status == "200"]
        silent = max((b - a for a, b in itertools.pairwise([begun, *good])), default=0.0)
        failure_text = ", ".join(f"{n:,} x {status}" for status, n in failures.most_common()) or "no failure"
        parts.append(f"{call}: {failure_text}, longest silence {silent:.1f} s")
    return "; ".join(parts)


def _count_lost(port: int, acknowledged: list[int]) -> int:
    """How many acknowledged flights are not there, once each."""
    lost = 0
    for k, cycles in enumerate(acknowledged):
        status, answer = get(f"{base(port)}/v1/engines/collector%20{k}")
        stored = Counter(row["cycle"] for row in json.loads(answer)["history"]) if status == 200 else Counter()
        lost += sum(stored[cycle] != 1 for cycle in range(cycles))
    return lost
