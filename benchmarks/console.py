"""Cost of the console: browser time per update with 1,000 engines, and latency of the service meanwhile.

1,000 simulated engines send 200 flights per second (`POST /v1/cycles`, open loop: a late response delays no later
flight, and latency is measured from the due time). The service has one core. Load and browser share the other core,
where the browser has idle priority. In production the browser runs on another machine.
The two cores may be hardware threads of one core, and a busy thread then slows the other. Some rounds therefore send
the requests of the page without a browser. Rounds of each kind alternate, so that other load on the machine affects
all kinds.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import orjson
from playwright.sync_api import Browser, Page

from benchmarks.load import CLIENT_CORE, JSON_HEADERS, SERVER_CORE, free_port, served
from model.data.simulator.fleet import simulate_histories
from tests.support.browser import chromium

ENGINES, SENDERS = 1000, 8
LEFT = 60  # minimum number of flights that an engine has left at its first flight
LOOK_SECONDS = 2.0  # as in fleet.js
KINDS = ("without page", "requests only", "with page")
READY = ".rows .row"
_fleets: list["Fleet"] = []  # in the load process


class Round(NamedTuple):
    """One round: latency of flights in ms; with a page, also the main-thread work per update in ms."""

    p50: float
    p99: float
    failed: int
    work: float | None = None
    updates: int = 0


class Fleet:
    """1,000 engines that fly one after another, each from another point of its life."""

    def __init__(self, port: int, per_second: int) -> None:
        self._port, self._rate, self._sent_count = port, per_second, 0
        self._engines = list(simulate_histories(ENGINES, mixed=True))
        self._first_rows = [(37 * k) % max(1, len(history.cycle) - LEFT) for k, history in enumerate(self._engines)]

    def first(self) -> None:
        """Send three flights of every engine, so that each engine is stored and has a trend."""
        self.fly(3 * ENGINES / self._rate)

    def fly(self, seconds: float) -> tuple[list[float], int]:
        """Return the latencies in ms of the flights with status 200, and the number of the other flights."""
        n, begin = int(seconds * self._rate), time.perf_counter() + 0.2
        taken: list[list[float]] = [[] for _ in range(SENDERS)]
        threads = [
            threading.Thread(target=self._send_flights, args=(taken[k], range(k, n, SENDERS), begin))
            for k in range(SENDERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._sent_count += n
        latencies = [latency for part in taken for latency in part]
        return latencies, n - len(latencies)

    def _send_flights(self, taken: list[float], numbers: range, begin: float) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
        for i in numbers:
            due = begin + i / self._rate
            time.sleep(max(0.0, due - time.perf_counter()))
            connection.request("POST", "/v1/cycles", self._build_body(self._sent_count + i), JSON_HEADERS)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                taken.append((time.perf_counter() - due) * 1e3)
        connection.close()

    def _build_body(self, i: int) -> bytes:
        k, turn = i % ENGINES, i // ENGINES
        engine = self._engines[k]
        row = min(self._first_rows[k] + turn, len(engine.cycle) - 1)  # after the end of its life: the last row
        flight = {
            "engine_id": engine.engine_id,
            "cycle": self._first_rows[k] + turn,
            "telemetry": engine.telemetry[row],
        }
        return orjson.dumps({"cycles": [flight]}, option=orjson.OPT_SERIALIZE_NUMPY)


class Load:
    """A fleet in a separate process, so that the browser does not delay the measurement."""

    def __init__(self, port: int, per_second: int) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, spawned, initializer=_create_fleet, initargs=(port, per_second))

    def fly(self, seconds: float) -> "Future[tuple[list[float], int]]":
        """Send flights for some seconds. Every engine is stored before the first call."""
        return self._process.submit(_fly_fleet, seconds)


def _create_fleet(port: int, per_second: int) -> None:
    _fleets.append(Fleet(port, per_second))
    _fleets[0].first()


def _fly_fleet(seconds: float) -> tuple[list[float], int]:
    return _fleets[0].fly(seconds)


def _set_idle_priority() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def measure_without_page(load: Load, seconds: float) -> Round:
    """Measure a round without a page and without its requests."""
    taken, failed = load.fly(seconds).result()
    return Round(*percentiles(taken), failed)


def measure_with_requests(load: Load, home: str, seconds: float) -> Round:
    """Measure a round with the requests of the Fleet page, but without a browser that renders the responses."""
    flying, since, updates_seen = load.fly(seconds), datetime.now(UTC), 0
    with httpx.Client(base_url=home, trust_env=False) as client:
        while not flying.done():
            now = datetime.now(UTC)
            client.get("v1/engines", params={"limit": ENGINES, "since": since.isoformat()}).raise_for_status()
            since, updates_seen = now, updates_seen + 1
            wait([flying], LOOK_SECONDS)
    taken, failed = flying.result()
    return Round(*percentiles(taken), failed, None, updates_seen)


def measure_with_page(load: Load, browser: Browser, home: str, seconds: float) -> Round:
    """Measure a round with the Fleet page open in a browser."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        updates_seen: list[str] = []
        page.on("response", lambda answer: updates_seen.append(answer.url) if "since=" in answer.url else None)
        page.goto(home)
        page.wait_for_selector(READY)
        session = context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})  # processor time of this thread only

        def busy() -> float:
            metrics = session.send("Performance.getMetrics")["metrics"]
            return next(float(metric["value"]) for metric in metrics if metric["name"] == "TaskDuration")

        before, counted = busy(), len(updates_seen)
        flying = load.fly(seconds)
        while not flying.done():
            page.wait_for_timeout(200)  # process events of the page
        updates, work = len(updates_seen) - counted, (busy() - before) * 1e3
        taken, failed = flying.result()
        return Round(*percentiles(taken), failed, work / max(1, updates), updates)
    finally:
        context.close()


def percentiles(taken: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    p50, p99 = np.percentile(taken, [50, 99])
    return float(p50), float(p99)


def first_paint(browser: Browser, home: str) -> float:
    """Return the time in ms from navigation to the first contents with an empty cache."""
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(home)
        page.wait_for_selector(READY)
        return _read_first_paint(page)
    finally:
        context.close()


def _read_first_paint(page: Page) -> float:
    return float(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))


def main() -> None:
    """Measure all rounds and print one line per figure."""
    parser = argparse.ArgumentParser(description="Cost of the console.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--per-second", type=int, default=200)
    flags = parser.parse_args()
    port = free_port()
    home = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{folder}/memory.db",
            "ENGINE_HEALTH_LOG_LEVEL": "warning",
        }
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        with served(command, environment, SERVER_CORE, home + "readyz", Path.cwd()):
            os.sched_setaffinity(0, {CLIENT_CORE})
            _set_idle_priority()  # inherited by the browser
            with chromium() as browser:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
                report(Load(port, flags.per_second), browser, home, flags.rounds, flags.seconds)


def report(load: Load, browser: Browser, home: str, rounds: int, seconds: float) -> None:
    """Measure all rounds and print the medians over rounds."""
    load.fly(1).result()  # waits until every engine is stored and has a trend
    paints = [first_paint(browser, home) for _ in range(rounds)]
    turns = []
    for k in range(rounds):
        turns.append(
            (
                measure_without_page(load, seconds),
                measure_with_requests(load, home, seconds),
                measure_with_page(load, browser, home, seconds),
            )
        )
        parts = ", ".join(f"{kind} {result}" for kind, result in zip(KINDS, turns[-1], strict=True))
        print(f"round {k + 1}: {parts}", flush=True)
    work = [last.work for *_, last in turns if last.work is not None]
    p99 = [statistics.median(result.p99 for result in kind) for kind in zip(*turns, strict=True)]
    print(f"first paint, ms: {statistics.median(paints):.0f} ({min(paints):.0f} to {max(paints):.0f})")
    print(f"main thread per update, ms: {statistics.median(work):.1f} ({min(work):.1f} to {max(work):.1f})")
    print(
        "p99, ms, medians of rounds: "
        + ", ".join(f"{median:.1f} {kind}" for median, kind in zip(p99, KINDS, strict=True))
    )
    print(f"p99 relative to no page: {p99[1] / p99[0]:.2f} with requests only, {p99[2] / p99[0]:.2f} with the page")
    print(f"flights without status 200: {sum(result.failed for turn in turns for result in turn)}")


if __name__ == "__main__":
    main()
