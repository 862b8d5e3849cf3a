"""kill -9 at random moments while flights and labels are sent: acknowledged ones must be stored exactly once.

    python -m benchmarks.kills [--kills 100] [--seed 0] [--database sqlite|postgresql]      # = make kills

Several clients send flights and labels until a random SIGKILL ends the service. It is then started again with the same
database. Cycles that were not acknowledged are sent again, as a data collector does.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load import free_port, get, golden

ENGINES, CLIENTS, MAX_LIFE_SECONDS = 40, 8, 1.5
LABELS = ("normal", "degrading", "critical")


class Survived(NamedTuple):
    """Results of a number of kills. `lost` and `twice` must be 0."""

    kills: int
    flights: int  # acknowledged
    labels: int  # acknowledged
    lost: int  # acknowledged, but not stored or stored with another label
    twice: int  # stored more than once
    restart_seconds: float  # longest time from start to ready

    def passed(self) -> bool:
        """Return whether nothing is lost or duplicate, and labels were acknowledged."""
        return self.lost == self.twice == 0 and self.labels > 0


class Life:
    """A service process from start to SIGKILL."""

    def __init__(self, database_url: str) -> None:
        self.base = f"http://127.0.0.1:{(port := free_port())}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ENGINE_HEALTH_")}
        environment |= {"ENGINE_HEALTH_DATABASE_URL": database_url, "ENGINE_HEALTH_LOG_LEVEL": "error"}
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        started = time.monotonic()
        self.process = subprocess.Popen(command, env=environment)
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > started + 60:
                raise RuntimeError("the service did not become ready")
            time.sleep(0.02)
        self.seconds = time.monotonic() - started

    def _is_ready(self) -> bool:
        with suppress(OSError):
            return get(self.base + "/readyz")[0] == 200
        return False

    def post(self, path: str, body: Any) -> Any:
        """Return the response, or None without one."""
        request = urllib.request.Request(
            self.base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except (OSError, ValueError, EOFError):  # killed meanwhile
            return None

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def survive(database_url: str, kills: int, seed: int = 0) -> Survived:
    """Send flights and labels while the service is killed `kills` times, and count the stored ones at the end."""
    chance, next_cycle = random.Random(seed), [0] * ENGINES
    flights: set[tuple[int, int]] = set()
    labels: set[tuple[int, int]] = set()
    slowest = 0.0
    for _ in range(kills):
        life = Life(database_url)
        slowest = max(slowest, life.seconds)
        stop = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for client in range(CLIENTS):
                pool.submit(
                    _send_flights_and_labels, life, range(client, ENGINES, CLIENTS), next_cycle, flights, labels, stop
                )
            time.sleep(chance.uniform(0.02, MAX_LIFE_SECONDS))
            life.kill()
            stop.set()
    return _count_stored(database_url, kills, flights, labels, slowest)


def _send_flights_and_labels(
    life: Life,
    engines: range,
    next_cycle: list[int],
    flights: set[tuple[int, int]],
    labels: set[tuple[int, int]],
    stop: threading.Event,
) -> None:
    """Send a flight of each engine and then its label, until the service is gone."""
    rows = golden()[0][0].tolist()
    while not stop.is_set():
        for engine in engines:
            cycle = next_cycle[engine]
            flight_id = {"engine_id": f"engine {engine}", "cycle": cycle}
            if life.post("/v1/cycles", {"cycles": [flight_id | {"telemetry": rows[cycle % len(rows)]}]}) is None:
                return
            flights.add((engine, cycle))
            next_cycle[engine] += 1
            if life.post("/v1/labels", {"labels": [flight_id | {"label": _choose_label(engine, cycle)}]}) is None:
                return
            labels.add((engine, cycle))


def _choose_label(engine: int, cycle: int) -> str:
    return LABELS[(engine + cycle) % len(LABELS)]


def _count_stored(
    database_url: str, kills: int, flights: set[tuple[int, int]], labels: set[tuple[int, int]], slowest: float
) -> Survived:
    life, lost, twice = Life(database_url), 0, 0
    try:
        for engine in range(ENGINES):
            status, answer = get(f"{life.base}/v1/engines/engine%20{engine}")
            history = json.loads(answer)["history"] if status == 200 else []
            label_by_cycle = {row["cycle"]: row["label"] for row in history}
            twice += len(history) - len(label_by_cycle)
            lost += sum(cycle not in label_by_cycle for e, cycle in flights if e == engine)
            lost += sum(label_by_cycle.get(cycle) != _choose_label(engine, cycle) for e, cycle in labels if e == engine)
    finally:
        life.kill()
    return Survived(kills, len(flights), len(labels), lost, twice, max(slowest, life.seconds))


def main() -> None:
    """Print a table. The exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="kill -9 while flights and labels are sent.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), help="default: both")
    chosen = parser.parse_args()
    print("| database | kills | flights acknowledged | labels acknowledged | lost | twice | slowest start, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    passed = True
    for name in (chosen.database,) if chosen.database else ("sqlite", "postgresql"):
        survived = survive_in(name, chosen.kills, chosen.seed)
        cells = " | ".join(f"{value:,}" for value in survived[:-1])
        print(f"| {name} | {cells} | {survived.restart_seconds:.1f} |", flush=True)
        passed &= survived.passed()
    sys.exit(0 if passed else 1)


def survive_in(database: str, kills: int, seed: int) -> Survived:
    """Call `survive` with a new database."""
    if database == "sqlite":
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            return survive(f"sqlite:///{folder}/memory.db", kills, seed)
    from tests.support.postgres import postgres

    with postgres() as cluster:
        return survive(cluster.url("kills"), kills, seed)


if __name__ == "__main__":
    main()
