"""A long mixed load: predictions, tensors, flights, labels, failures, fits, reloads, scrapes, crashing clients.

    python -m benchmarks.mixture [--minutes 30]      # = make soak MINUTES=30

The service runs on one core with a store on disk, its clients on the other. The exit code is 1 if a request failed,
memory or descriptors grew, or a metric differs from the counts of the clients. The figures are written to
build/mixture.json.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks import load
from benchmarks.endurance.client import HOST, Answer, Connection, request
from benchmarks.endurance.stage import PREDICT, Line, Running, say, service, windows_binary, windows_json
from benchmarks.load import JSON_HEADERS
from benchmarks.peers import BUILD

ADMIN = {"Authorization": "Bearer soak"}
LOAD = request("/v2/repository/models/engine-health/load", headers=ADMIN)
LABELS = ("normal", "degrading", "critical")
ENGINES, END_CYCLE = 200, 150  # number of engines; an engine is replaced after END_CYCLE flights
SIZES = range(1, 65)
# Expired rows are deleted every 10 min. With a short retention the store hardly grows after the first deletion.
# Otherwise the memory of fits would grow for 20 min even without a leak.
RETENTION_DAYS = 1 / 1440
SAMPLE_SECONDS, PART_SECONDS = 10.0, 300.0  # the first and the last part are compared
GROWTH_MB, STEP = 1.0, 10_000  # as in `endurance.soak`
SELDOM = {  # seconds between requests
    ("GET", "/metrics"): 5.0,
    ("GET", "/v1/calibration"): 10.0,
    ("GET", "/v1/engines"): 5.0,
    ("POST", "/v1/calibration/fits"): 20.0,  # below the idle timeout of 30 s
}
FITTED = {200, 201, 409, 422}  # a fit without a gain is refused, which is a valid response
CROWD = 16  # parallel readers; the service has four database connections for them
BROKEN_OFF = "/v1/evaluate"  # the only call that clients break off, so that the counts of all others are exact


@dataclass
class ClientCounts:
    """The responses that all clients received."""

    answers: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # method, route, status
    broken: Counter[str] = field(default_factory=Counter)
    rows: int = 0  # predictions
    seconds: deque[tuple[float, float]] = field(default_factory=deque)  # of /v1/predict: time and latency
    samples: list[tuple[int, float, int]] = field(default_factory=list)  # requests, MB, descriptors

    def requests(self) -> int:
        """Return the number of responses so far."""
        return self.answers.total()


class Mixture:
    """The clients. Each keeps a connection and sends requests until the time is over."""

    def __init__(self, running: Running, minutes: float) -> None:
        self.running, self.counts, self.chance = running, ClientCounts(), random.Random(0)
        self.begun = time.monotonic()
        self.end = self.begun + minutes * 60
        self.json, self.binary = [windows_json(n) for n in SIZES], [windows_binary(n) for n in SIZES]
        self.lines, self.flight = load.golden()[0][0].tolist(), 0

    async def run(self) -> None:
        """Run all clients until the time is over."""
        often = [
            self._run_client(turn, 0.01)
            for turn in (self._send_predict_request, self._send_tensors, self._send_flight)
            for _ in range(2)
        ]
        seldom = [self._run_client(self._build_turn(*call), pause) for call, pause in SELDOM.items()]
        await asyncio.gather(
            *often,
            *seldom,
            self._run_client(self._reload_model, 15.0),
            self._break_off_requests(),
            self._sample_memory(),
        )

    async def crowd(self) -> None:
        """Read from many connections in parallel, so that every database connection is open."""
        turn = self._build_turn("GET", "/v1/calibration")
        for _ in range(3):
            await asyncio.gather(*[self._run_once(turn) for _ in range(CROWD)])

    async def _run_once(self, turn: Callable[[Connection], Awaitable[None]]) -> None:
        connection = await Connection.to(self.running.port)
        await turn(connection)
        connection.close()

    async def _run_client(self, turn: Callable[[Connection], Awaitable[None]], pause: float) -> None:
        connection = await Connection.to(self.running.port)
        while time.monotonic() < self.end:
            try:
                if not connection.open:  # the service closes idle connections
                    connection = await Connection.to(self.running.port)
                await turn(connection)
            except (OSError, TimeoutError) as error:
                self.counts.broken[type(error).__name__] += 1
            await asyncio.sleep(pause)
        connection.close()

    async def _send_request(
        self, connection: Connection, method: str, route: str, request_bytes: bytes, rows: int = 0
    ) -> Answer:
        answer = await connection.ask(request_bytes)
        self.counts.answers[method, route, answer.status] += 1
        self.counts.rows += rows if answer.status == 200 else 0
        return answer

    async def _send_predict_request(self, connection: Connection) -> None:
        n = self.chance.choice(SIZES) if self.chance.random() < 0.1 else self.chance.randint(1, 4)
        answer = await self._send_request(connection, "POST", PREDICT, self.json[n - 1], n)
        self.counts.seconds.append((time.monotonic(), answer.seconds))

    async def _send_tensors(self, connection: Connection) -> None:
        n = self.chance.choice(SIZES)
        await self._send_request(connection, "POST", "/v2/models/{name}/infer", self.binary[n - 1], n)

    async def _send_flight(self, connection: Connection) -> None:
        """Send a flight, a label for half of the flights, and the failure of an engine at the end of its life."""
        turn, k = divmod(self.flight, ENGINES)
        self.flight += 1
        life, cycle = divmod(turn, END_CYCLE)
        flight_id = {"engine_id": f"soak {k}-{life}", "cycle": cycle}
        row = flight_id | {"telemetry": self.lines[cycle % len(self.lines)]}
        await self._send_request(connection, "POST", "/v1/cycles", _build_post("/v1/cycles", {"cycles": [row]}), 1)
        if self.chance.random() < 0.5:
            label = flight_id | {"label": self.chance.choice(LABELS)}
            await self._send_request(connection, "POST", "/v1/labels", _build_post("/v1/labels", {"labels": [label]}))
        if cycle == END_CYCLE - 1:
            end = {"engine_id": flight_id["engine_id"], "failed_at_cycle": END_CYCLE + self.chance.randint(0, 200)}
            await self._send_request(connection, "POST", "/v1/outcomes", _build_post("/v1/outcomes", end))

    async def _reload_model(self, connection: Connection) -> None:
        await self._send_request(connection, "POST", "/v2/repository/models/{name}/load", LOAD)

    def _build_turn(self, method: str, path: str) -> Callable[[Connection], Awaitable[None]]:
        async def turn(connection: Connection) -> None:
            await self._send_request(connection, method, path, request(path, method=method))

        return turn

    async def _break_off_requests(self) -> None:
        """Send half a request or a complete one, and reset the connection without reading, as crashing clients do."""
        whole = _build_post(BROKEN_OFF, {"logits": [[1.0, 2.0, 3.0]] * 500, "labels": [2] * 500})
        while time.monotonic() < self.end:
            with socket.create_connection((HOST, self.running.port)) as connection:
                connection.sendall(whole[: self.chance.randint(1, len(whole))] if self.chance.random() < 0.5 else whole)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await asyncio.sleep(0.25)

    async def _sample_memory(self) -> None:
        while time.monotonic() < self.end:
            await asyncio.sleep(SAMPLE_SECONDS)
            megabytes = self.running.memory() * 2**20 / 1e6
            self.counts.samples.append((self.counts.requests(), megabytes, self.running.descriptors()))
            say(f"{self.counts.requests():,} requests, {megabytes:.0f} MB, {self.counts.samples[-1][2]} descriptors")


def _build_post(path: str, body: object) -> bytes:
    return request(path, json.dumps(body).encode(), JSON_HEADERS)


def lines(mixture: Mixture, before: int, after: int, counted: dict[str, float]) -> list[Line]:
    """Return one line per requirement."""
    counts = mixture.counts
    return [
        _check_answers(counts),
        _check_latency(mixture),
        _check_memory(counts),
        _check_descriptors(before, after),
        _check_counters(counts, counted),
    ]


def _check_answers(counts: ClientCounts) -> Line:
    wrong = {
        key: n for key, n in counts.answers.items() if key[2] not in (FITTED if key[1].endswith("/fits") else {200})
    }
    seen = f"{counts.requests():,} responses; unexpected { ({' '.join(map(str, k)): n for k, n in wrong.items()}) }"
    return Line("errors", f"{seen}; broken {dict(counts.broken)}", "none", not wrong and not counts.broken)


def _check_latency(mixture: Mixture) -> Line:
    part = min(PART_SECONDS, (mixture.end - mixture.begun) / 6)
    first = [s for when, s in mixture.counts.seconds if when < mixture.begun + part]
    last = [s for when, s in mixture.counts.seconds if when >= mixture.end - part]
    p99 = [float(np.percentile(latencies, 99)) * 1e3 for latencies in (first, last)]
    seen = f"{p99[0]:.0f} ms in the first {part / 60:.1f} min, {p99[1]:.0f} ms in the last"
    return Line("p99 of /v1/predict", seen, "at the end at most twice as long", p99[1] < 2 * p99[0])


def _check_memory(counts: ClientCounts) -> Line:
    half = counts.samples[len(counts.samples) // 2 :]
    slope = float(np.polyfit([n for n, _, _ in half], [mb for _, mb, _ in half], 1)[0]) * STEP
    seen = f"{slope:+.2f} MB per {STEP:,} requests of the last half, {half[0][1]:.0f} to {half[-1][1]:.0f} MB"
    return Line("memory", seen, f"less than {GROWTH_MB:g} MB", slope < GROWTH_MB)


def _check_descriptors(before: int, after: int) -> Line:
    return Line("descriptors", f"{before} before, {after} after, without clients", "equal", before == after)


def _check_counters(counts: ClientCounts, counted: dict[str, float]) -> Line:
    prefix = "engine_health_http_requests_total"
    wrong = {}
    for (method, route, status), n in counts.answers.items():
        name = f'{prefix}{{method="{method}",route="{route}",status="{status}"}}'
        if round(counted.get(name, 0)) != n:
            wrong[name.removeprefix(prefix)] = (n, counted.get(name, 0))
    rows = round(counted["engine_health_confidence_count"])
    if rows != counts.rows:
        wrong["predictions"] = (counts.rows, rows)
    seen = f"{len(counts.answers)} series and {rows:,} predictions equal the counts of clients; different {wrong}"
    return Line("counters", seen, "exact", not wrong)


def main() -> int:
    """Run the load, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Run a long mixed load.")
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    BUILD.mkdir(exist_ok=True)
    os.sched_setaffinity(0, {load.CLIENT_CORE})
    with (
        tempfile.TemporaryDirectory(prefix="soak-", dir=BUILD) as folder,
        service(
            None, database_url=f"sqlite:///{folder}/memory.db", admin_keys="soak", retention_days=RETENTION_DAYS
        ) as running,
    ):
        results = asyncio.run(_run_mixture(running, minutes))
    print(f"{load.machine()}; {minutes:g} minutes\n\n| subject | observation | requirement | met |")
    print("| --- | --- | --- | --- |")
    for line in results:
        print(f"| {line.done} | {line.seen} | {line.promised} | {'yes' if line.kept else '**no**'} |")
    figures = {"machine": load.machine(), "minutes": minutes, "lines": [vars(line) for line in results]}
    (BUILD / "mixture.json").write_text(json.dumps(figures, indent=1))
    return 0 if all(line.kept for line in results) else 1


async def _run_mixture(running: Running, minutes: float) -> list[Line]:
    warm = Mixture(running, 10 / 60)  # opens everything that is opened once
    await warm.run()
    await warm.crowd()
    await asyncio.sleep(1)
    before, mixture = running.descriptors(), Mixture(running, minutes)
    mixture.counts.answers, mixture.counts.rows, mixture.flight = warm.counts.answers, warm.counts.rows, warm.flight
    await mixture.run()
    await asyncio.sleep(2)
    return lines(mixture, before, running.descriptors(), running.counted())


if __name__ == "__main__":
    sys.exit(main())
