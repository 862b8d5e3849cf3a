"""Overload: every request is answered or immediately rejected, and answered requests have a bounded latency."""

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator

from benchmarks import load
from benchmarks.endurance.client import Connection, RequestOutcomes, in_turn, offer, request
from benchmarks.endurance.stage import PREDICT, Line, Running, say, service, windows_binary, windows_json
from benchmarks.peers import INFER

SECONDS = 20.0  # of each offer
CAPACITY_SECONDS, CAPACITY_CONNECTIONS = 6.0, 8
QUEUE_SECONDS = 2.0  # the default of ENGINE_HEALTH_MAX_QUEUE_SECONDS
TURN_SECONDS = 0.5  # in the event loop: one iteration to read the request and one to write the response, 62 ms each
EXPLAINED = json.dumps(json.loads(load.predict_json(load.windows(8))) | {"explain": True}).encode()
CASES = (  # rejected bodies are read too, so a client on one core cannot send ten times the capacity of large bodies
    ("64 engines, one flight each, JSON", PREDICT, windows_json(64, 1), (2, 5, 10)),
    ("8 windows, explained, JSON", PREDICT, request(PREDICT, EXPLAINED, load.JSON_HEADERS), (2,)),
    ("64 windows, binary (0.4 MiB)", INFER, windows_binary(64), (2,)),
    ("1,000 windows, binary (6.5 MiB)", INFER, windows_binary(1000), (2,)),
)
CONNECTIONS = 3000  # beyond the 2,048 that a listening socket holds


def lines() -> Iterator[Line]:
    """Yield lines for each kind of request at multiples of the capacity, then for connections that are not accepted."""
    for description, path, request_bytes, times in CASES:
        with service() as running:
            rate, unloaded_p99 = asyncio.run(capacity(running, request_bytes))
            say(f"{description}: {rate:.0f}/s, p99 {unloaded_p99:.2f} s at {CAPACITY_CONNECTIONS} connections")
            for multiple in times:
                yield overloaded(running, description, path, request_bytes, rate, multiple, unloaded_p99)
    yield backlog()


async def capacity(running: Running, request_bytes: bytes) -> tuple[float, float]:
    """Return requests/s of a few connections in a closed loop, and their p99 in s."""
    begun = time.perf_counter()
    until = itertools.takewhile(
        lambda _: time.perf_counter() < begun + CAPACITY_SECONDS, itertools.repeat(request_bytes)
    )
    outcomes = await in_turn(running.port, until, CAPACITY_CONNECTIONS)
    return outcomes.count(200) / (time.perf_counter() - begun), outcomes.percentile(200, 99)


def overloaded(
    running: Running, description: str, path: str, request_bytes: bytes, rate: float, multiple: int, unloaded_p99: float
) -> Line:
    """Send a multiple of the capacity for `SECONDS`, regardless of the responses."""
    route = path.replace("engine-health", "{name}")
    before = running.counted()
    outcomes = asyncio.run(offer(running.port, request_bytes, rate * multiple, SECONDS))
    time.sleep(1)
    after = running.counted()

    def count_increase(name: str) -> int:
        return round(after.get(name, 0) - before.get(name, 0))

    counted = {
        status: count_increase(f'engine_health_http_requests_total{{method="POST",route="{route}",status="{status}"}}')
        for status in (200, 429)
    }
    refused = count_increase('engine_health_rejected_total{reason="overloaded"}')
    bound, p99 = QUEUE_SECONDS + TURN_SECONDS + unloaded_p99, outcomes.percentile(200, 99)
    whole = outcomes.count(200) + outcomes.count(429) == outcomes.due and not outcomes.broken
    agreed = counted == {200: outcomes.count(200), 429: outcomes.count(429)} and refused == outcomes.count(429)
    return Line(
        f"{multiple} x capacity ({rate:.0f}/s) for {SECONDS:g} s: {description}",
        f"{format_outcomes(outcomes)}; p50 {outcomes.percentile(200, 50):.2f} s, p99 {p99:.2f} s; rejections p50 "
        f"{outcomes.percentile(429, 50):.3f} s; client up to {max(outcomes.late):.1f} s late",
        f"answered + rejected = sent, also in the metrics; Retry-After; p99 ≤ 2 s in the queue + {TURN_SECONDS:g} s "
        f"in the event loop + {unloaded_p99:.2f} s of service",
        whole and agreed and not outcomes.unhinted and p99 <= bound,
        {
            "capacity": rate,
            "sent": outcomes.due,
            "answered": outcomes.count(200),
            "refused": outcomes.count(429),
            "broken": dict(outcomes.broken),
            "without_hint": outcomes.unhinted,
            "counted": counted,
            "p50": outcomes.percentile(200, 50),
            "p99": p99,
            "bound": bound,
            "client_late": max(outcomes.late),
            "refused_p50": outcomes.percentile(429, 50),
            "refused_p99": outcomes.percentile(429, 99),
        },
    )


def format_outcomes(outcomes: RequestOutcomes) -> str:
    """Format the counts of sent, answered and rejected requests, and of any others."""
    other = {status: len(s) for status, s in outcomes.seconds.items() if status not in (200, 429)} | dict(
        outcomes.broken
    )
    text = f"{outcomes.due} sent, {outcomes.count(200)} answered, {outcomes.count(429)} rejected"
    return text + (f", {other}" if other else "")


def backlog() -> Line:
    """Open more connections than the listening socket holds, while the process accepts none."""
    with service() as running:
        outcomes, held = asyncio.run(_connect_crowd(running))
    return Line(
        f"{CONNECTIONS} simultaneous connections to a process stopped for 3 s",
        f"{held} were queued by the kernel, the others retried; {format_outcomes(outcomes)}; "
        f"slowest {outcomes.percentile(200, 100):.1f} s",
        "all are answered",
        outcomes.count(200) == CONNECTIONS,
        {"held": held, "answered": outcomes.count(200), "broken": dict(outcomes.broken)},
    )


async def _connect_crowd(running: Running) -> tuple[RequestOutcomes, int]:
    request_bytes = request("/livez", method="GET")
    outcomes, held = RequestOutcomes(), 0

    async def connect_and_ask() -> None:
        nonlocal held
        outcomes.due += 1
        since = time.perf_counter()
        try:
            connection = await Connection.to(running.port)
            held += 1
            outcomes.add(await connection.ask(request_bytes, since))
            connection.close()
        except (OSError, TimeoutError) as error:
            outcomes.broken[type(error).__name__] += 1

    os.kill(running.pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(connect_and_ask()) for _ in range(CONNECTIONS)]
    await asyncio.sleep(3)
    accepted = held
    os.kill(running.pid, signal.SIGCONT)
    await asyncio.gather(*tasks)
    return outcomes, accepted
