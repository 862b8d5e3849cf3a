"""Malformed requests and invalid HTTP: each gets a 4xx and has no effect on later requests."""

import asyncio
import gzip
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from benchmarks import load
from benchmarks.endurance.client import HOST, Connection, request
from benchmarks.endurance.stage import EVALUATE, PREDICT, Line, Running, service
from benchmarks.peers import INFER
from tests.support.bodies import BODIES, CASES, EVALUATIONS, binary, contradictory_requests
from tests.support.processes import as_json

DEEP = 250_000
Case = tuple[str, bytes, dict[str, str]]


def lines() -> Iterator[Line]:
    """Yield lines for malformed requests, each of which is followed by a valid one."""
    with service() as running:
        yield requests(running)
        yield wires(running)


def requests(running: Running) -> Line:
    """Send malformed bodies as well-formed HTTP, each on a new connection, and a golden window after each."""
    cases = corpus()
    statuses, changed = asyncio.run(_send_cases(running.port, cases))
    faults = sum(n for status, n in statuses.items() if not isinstance(status, int) or status >= 500)
    return Line(
        f"{len(cases)} malformed requests on {len({path for path, *_ in cases})} routes, a golden window after each",
        f"{format_statuses(statuses)}; {changed} golden responses changed",
        "no 5xx, no restart, every golden response bit-equal",
        faults == 0 and changed == 0 and running.alive(),
        {"statuses": {str(k): v for k, v in statuses.items()}, "changed": changed},
    )


def corpus() -> list[Case]:
    """Return the invalid bodies of the tests on every route with a body, and worst cases for a parser."""
    windows = load.golden()[0].astype(np.float32)
    bodies = [as_json(body) for body, *_ in CASES] + [body for body, _ in BODIES] + [as_json(b) for b, _ in EVALUATIONS]
    bodies += [b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b'{"instances":' + b"[" * DEEP, b"\xff" * 1000]
    instance = json.dumps({"telemetry": windows[0].tolist()}).encode()
    bodies += [
        b'{"instances": [%s], "instances": [%s]}' % (instance, instance),
        b'{"instances": [{"telemetry": [[1]], "telemetry": %s}]}' % instance[14:-1],
        b'{"instances": [%s' % instance,
        b'{"instances": [%s]}' % instance.replace(b"[[", b"[[1e39, ", 1),
        instance.replace(b".", b"\xff", 5),
        b'{"logits": [[1, 2, 3]], "labels": [0], "labels": [1]}',
        b'{"inputs": [], "inputs": []}',
    ]
    cases: list[Case] = [(path, body, load.JSON_HEADERS) for path in (PREDICT, EVALUATE, INFER) for body in bodies]
    for lie, headers in contradictory_requests(windows):
        if isinstance(lie, np.ndarray):
            lie, headers = binary(lie)
        cases.append((INFER, lie if isinstance(lie, bytes) else as_json(lie), headers))
    squeezed = gzip.compress(as_json({"instances": []}))
    packed = {**load.JSON_HEADERS, "Content-Encoding": "gzip"}
    broken = (squeezed[:-4], squeezed[:10], b"\x1f\x8b", squeezed + b"x", b"", gzip.compress(squeezed))
    return cases + [(PREDICT, body, packed) for body in broken]


async def _send_cases(port: int, cases: list[Case]) -> tuple[Counter[int | str], int]:
    golden = request(INFER, *load.oip_binary(load.golden()[0]))
    statuses: Counter[int | str] = Counter()
    right = await Connection.to(port)
    expected, changed = (await right.ask(golden)).body, 0
    for path, body, headers in cases:
        wrong = await Connection.to(port)
        try:
            statuses[(await wrong.ask(request(path, body, headers))).status] += 1
        except (OSError, TimeoutError) as error:
            statuses[type(error).__name__] += 1
        wrong.close()
        if not right.open:
            right = await Connection.to(port)
        changed += (await right.ask(golden)).body != expected
    return statuses, changed


def wires(running: Running) -> Line:
    """Send bytes that are not HTTP and wrong lengths: 4xx or a closed connection, then a golden window."""
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    messages = (
        b"\x00" * 4096,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/predict\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n{}",
        head + b"Content-Length: 99999999999999999999\r\n\r\n{}",
        head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        head + b"Content-Length: 1\r\n\r\n{}{}{}",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n",
        head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        head + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n",
        head + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08",
        head + b"Inference-Header-Content-Length: 5\r\nContent-Length: 2\r\n\r\n{}",
    )
    golden = request(INFER, *load.oip_binary(load.golden()[0]))
    expected = _exchange_bytes(running.port, golden)
    statuses: Counter[int | str] = Counter()
    changed = 0
    for wrong in messages:
        received = _exchange_bytes(running.port, wrong)
        statuses[int(received[9:12]) if received.startswith(b"HTTP/1.1 ") else "closed"] += 1
        changed += _exchange_bytes(running.port, golden).partition(b"\r\n\r\n")[2] != expected.partition(b"\r\n\r\n")[2]
    faults = sum(n for status, n in statuses.items() if isinstance(status, int) and status >= 500)
    return Line(
        f"{len(messages)} messages that are not HTTP or have wrong lengths",
        f"{format_statuses(statuses)}; {changed} golden responses changed",
        "4xx or closed, no restart, every golden response bit-equal",
        faults == 0 and 200 not in statuses and changed == 0 and running.alive(),
        {"statuses": {str(k): v for k, v in statuses.items()}, "changed": changed},
    )


def _exchange_bytes(port: int, data: bytes) -> bytes:
    """Send bytes and return the response; stop after 2 s without data."""
    received = b""
    with socket.create_connection((HOST, port), timeout=2) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                received += part
                if _is_complete(received):
                    break
        except (TimeoutError, ConnectionError):
            time.sleep(0)
    return received


def _is_complete(received: bytes) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    sizes = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(separator) and len(body) >= int(sizes[0] if sizes else 0)


def format_statuses(statuses: Counter[int | str]) -> str:
    """Format the count of each status."""
    return ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items(), key=str))
