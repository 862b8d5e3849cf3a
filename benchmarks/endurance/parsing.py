"""Bodies of 30 MB in every number format: a probe of the service is answered while one is parsed."""

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import chain

import numpy as np

from benchmarks import load
from benchmarks.endurance.client import Answer, Connection, ask_once, request
from benchmarks.endurance.stage import EVALUATE, PREDICT, Line, Running, service
from benchmarks.peers import INFER

BYTES = 30_000_000
LIVE_SECONDS = 0.15
PAUSE = 0.002  # between two probes


def lines() -> Iterator[Line]:
    """Yield one line per kind of body, each sent three times."""
    with service() as running:
        for description, request_bytes in bodies():
            yield probed(running, description, request_bytes)


def bodies() -> Iterator[tuple[str, bytes]]:
    """Yield descriptions and requests."""
    rows = load.windows(1)[0].tolist()
    long = rows * (BYTES // len(json.dumps(rows)))
    holes = [list(row) for row in long]
    for k, row in enumerate(holes[1:]):
        row[k % len(row)] = None
    names = [f"op_setting_{k}" for k in (1, 2, 3)] + [
        f"sensor_{k}" for k in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
    ]
    columns = {name: [row[k] for row in long] for k, name in enumerate(names)}
    logits = np.random.default_rng(0).normal(0, 3, (BYTES // 60, 3)).tolist()
    tensor = {"name": "telemetry", "datatype": "FP32", "shape": [1, len(long), len(names)]}
    flat = {"inputs": [tensor | {"data": list(chain.from_iterable(long))}]}
    nested = {"inputs": [tensor | {"data": [long]}]}
    for description, path, body in (
        ("one history, rows", PREDICT, {"instances": [{"telemetry": long}]}),
        ("1,700 windows", PREDICT, {"instances": [{"telemetry": rows}] * (len(long) // len(rows))}),
        ("one history with a missing value per row", PREDICT, {"instances": [{"telemetry": holes}], "missing": "hold"}),
        ("one history, columns by name", PREDICT, {"instances": [{"telemetry": columns}]}),
        ("logits to evaluate", EVALUATE, {"logits": logits, "labels": [0] * len(logits)}),
        ("a tensor, flat", INFER, flat),
        ("a tensor, nested", INFER, nested),
    ):
        yield description, request(path, json.dumps(body).encode(), load.JSON_HEADERS)


def probed(running: Running, description: str, request_bytes: bytes) -> Line:
    """Send one kind of body and measure the latency of a probe meanwhile."""
    results = [asyncio.run(_probe_during(running.port, request_bytes)) for _ in range(3)]
    waits = np.concatenate([waits for _, waits in results])
    p99, slowest = float(np.quantile(waits, 0.99)), float(waits.max())
    statuses = {answer.status for answer, _ in results}
    latency = f"/livez p99 {p99 * 1e3:.0f} ms, slowest {slowest * 1e3:.0f} ms"
    return Line(
        f"{len(request_bytes) / 1e6:.0f} MB: {description}",
        f"{', '.join(map(str, statuses))} after {results[-1][0].seconds:.2f} s; {latency}",
        f"/livez answers within {LIVE_SECONDS * 1e3:.0f} ms (p99)",
        p99 <= LIVE_SECONDS and statuses <= {200, 400, 422},
        {"statuses": sorted(statuses), "p99": p99, "slowest": slowest},
    )


async def _probe_during(port: int, request_bytes: bytes) -> tuple[Answer, list[float]]:
    """Return the response, and the latency of each probe in s from the moment the body was sent."""
    live, probe = request("/livez", method="GET"), await Connection.to(port)
    await probe.ask(live)
    task, waits = asyncio.create_task(ask_once(port, request_bytes)), []
    while not task.done():
        begun = time.perf_counter()
        await probe.ask(live)
        waits.append(time.perf_counter() - begun)
        await asyncio.sleep(PAUSE)
    probe.close()
    return task.result(), waits
