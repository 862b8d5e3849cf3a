"""Limits of memory, queue and connections under load: the short forms of `python -m benchmarks.endurance`."""

import gzip
import json
import os
import random
import signal
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from model.windows import Readings
from tests.support.bodies import INFER, binary
from tests.support.models import edited
from tests.support.processes import (
    ADMIN,
    LOAD,
    Service,
    children,
    one,
    predicted,
    resident,
    running,
    shared_folder,
    until,
    until_all_are_ready,
)
from tests.support.raw_http import HEAD, JSON, MIB, connected, inference_request

OVERLOADED = 'engine_health_rejected_total{reason="overloaded"}'


def receive_response(connection: socket.socket) -> bytes:
    """Receive one whole response."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
        head, end, body = received.partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if end and len(body) >= size:
            break
    return received


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "begin", "value", "end", "most"),
    [
        ("/v1/cycles", b'{"cycles":[', b"{}", b"]}", 8),
        ("/v1/evaluate", b'{"logits":[[0,0,0]],"labels":[', b"{}", b"]}", 8),
        ("/v1/predict", b'{"instances":[{"telemetry":[', b"[]", b"]}]}", 40),  # lists locate the faults
    ],
)
def test_rejected_body_is_bounded_in_memory(path: str, begin: bytes, value: bytes, end: bytes, most: int) -> None:
    """Millions of empty values are located with a few times their bytes of memory."""
    with running() as service:
        status = Path(f"/proc/{service.process.pid}/status")
        body = begin + b",".join([value] * (16 * MIB // 3)) + end
        before = resident(service)
        Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")  # resets the peak
        assert 422 == service.client.post(path, content=body, headers=JSON).status_code
        peak = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) / 1024
        assert peak - before < most * len(body) / MIB


def test_early_rejection_keeps_the_connection() -> None:
    """A body above the limit, announced or chunked, gets 413 at any length, and the next request is read."""
    with running(ENGINE_HEALTH_MAX_BODY_BYTES="100000") as small, connected(small) as connection:
        large = b" " * 20_000_000
        for _ in range(2):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(large))
            connection.sendall(large)
            assert receive_response(connection).startswith(b"HTTP/1.1 413")
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            connection.sendall((b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 100 + b"0\r\n\r\n")
            assert receive_response(connection).startswith(b"HTTP/1.1 413")
            connection.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
            assert receive_response(connection).startswith(b"HTTP/1.1 422")


def test_idle_client_is_disconnected_after_rejection() -> None:
    """The rest of a rejected body must arrive in time, and empty lines do not keep a connection open."""
    with running(ENGINE_HEALTH_REQUEST_SECONDS="1", ENGINE_HEALTH_MAX_BODY_BYTES="1000") as hasty:
        with connected(hasty) as half:
            half.sendall(HEAD + b"Content-Length: 5000\r\n\r\n{")
            assert receive_response(half).startswith(b"HTTP/1.1 413")
            half.sendall(b" ")
            assert b"" == half.recv(100)
        with connected(hasty) as idle:
            idle.sendall(b"\r\n")
            assert b"" == idle.recv(100)


def test_bodies_in_memory_share_a_limit(windows: Readings) -> None:
    """While other bodies use up the shared limit, the next body gets 429; a body alone is always read."""
    body = json.dumps(one(windows[0]) | {"missing": "reject"}).encode().ljust(700_000)
    with running(ENGINE_HEALTH_MAX_BUFFERED_BYTES="1000000") as tight:
        assert 1_000_000 == tight.client.get("/v1/model").json()["limits"]["max_buffered_bytes"]
        with connected(tight) as slow:
            slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body[:600_000])
            for _ in range(50):  # turns of the event loop in which the service reads those bytes
                tight.client.get("/livez")
            until(lambda: tight.client.post("/v1/predict", content=body, headers=JSON).status_code == 429)
            refused = tight.client.post("/v1/predict", content=iter([body[:500_000], body[500_000:]]), headers=JSON)
            assert 429 == refused.status_code
            assert int(refused.headers["retry-after"]) >= 1
            bomb = gzip.compress(body)
            packed = tight.client.post("/v1/predict", content=bomb, headers=JSON | {"Content-Encoding": "gzip"})
            assert 429 == packed.status_code
            tight.predict(one(windows[0])["instances"])
            slow.sendall(body[600_000:])
            assert receive_response(slow).startswith(b"HTTP/1.1 200")
        assert tight.metrics()[OVERLOADED] >= 3
        for _ in range(3):
            assert 200 == tight.client.post("/v1/predict", content=body.ljust(3_000_000), headers=JSON).status_code


@pytest.mark.slow
def test_rejected_bodies_leave_no_memory() -> None:
    """Bodies above the limit, in many chunks, or inflated beyond the limit leave no memory behind."""
    tiny = b"1\r\n[\r\n" * 100_000 + b"0\r\n\r\n"
    whole = b" " * (32 * 2**20 + 1)
    bomb = gzip.compress(b" " * (100 * 2**20), 1)

    def round_of_them(service: Service) -> list[int]:
        statuses = [
            service.client.post("/v1/predict", content=whole, headers=JSON).status_code,
            service.client.post("/v1/predict", content=iter([whole]), headers=JSON).status_code,
            service.client.post("/v1/predict", content=bomb, headers=JSON | {"Content-Encoding": "gzip"}).status_code,
        ]
        with connected(service) as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tiny)
            return [*statuses, int(receive_response(connection)[9:12])]

    with running() as fresh:  # a service without memory of other tests
        for _ in range(2):
            assert [413, 413, 413, 400] == round_of_them(fresh)
        before = resident(fresh)
        for _ in range(8):
            assert [413, 413, 413, 400] == round_of_them(fresh)
        assert resident(fresh) - before < 20


def test_large_request_is_accepted_among_small_requests(windows: Readings) -> None:
    """A client with 1000 windows and clients with one flight each are all answered: the queue is not full."""
    flight = json.dumps({"instances": [{"telemetry": windows[0][-1:].tolist()}]}).encode()
    many = json.dumps({"instances": one(windows[0])["instances"] * 1000}).encode()
    with running() as service, ThreadPoolExecutor(5) as pool:

        def ask(body: bytes, times: int) -> Counter[int]:
            return Counter(
                service.client.post("/v1/predict", content=body, headers=JSON).status_code for _ in range(times)
            )

        tasks = [pool.submit(ask, flight, 200) for _ in range(4)] + [pool.submit(ask, many, 5)]
        assert Counter({200: 805}) == sum((task.result(timeout=120) for task in tasks), Counter[int]())


def test_explanations_wait_in_the_same_queue(windows: Readings) -> None:
    """Explanations count as rows of the queue: too many get 429, and only responses are counted."""
    body = json.dumps({"instances": [{"telemetry": windows[0][-1:].tolist()}] * 10, "explain": True}).encode()
    with running(ENGINE_HEALTH_MAX_QUEUE_ROWS="100") as service:

        def ask(_: int) -> httpx.Response:
            return service.client.post("/v1/predict", content=body, headers=JSON)

        with ThreadPoolExecutor(16) as pool:
            responses = list(pool.map(ask, range(100)))
        successes = [response for response in responses if response.status_code == 200]
        assert {200, 429} == {response.status_code for response in responses}
        assert all(17 == len(row["explanation"]) for response in successes for row in response.json()["predictions"])
        assert 10 * len(successes) == service.metrics()["engine_health_confidence_count"]


def test_rows_of_a_disconnected_client_are_not_inferred(windows: Readings) -> None:
    """A client that disconnects while it waits is counted as disconnected, and its rows are not inferred."""
    slow = {"ENGINE_HEALTH_MAX_QUEUE_SECONDS": "60", "ENGINE_HEALTH_MAX_BATCH_ROWS": "1"}
    with running(**slow) as service:
        with connected(service) as stays, connected(service) as leaves:
            stays.sendall(inference_request(windows[np.arange(4000) % 4]))
            until(lambda: service.metrics()["engine_health_batch_rows_count"] > 0)
            leaves.sendall(inference_request(windows))
            leaves.close()
            assert receive_response(stays).startswith(b"HTTP/1.1 200")
        until(lambda: service.metrics()['engine_health_rejected_total{reason="client_gone"}'] == 1)
        assert 4000 == service.metrics()["engine_health_batch_rows_sum"]


def test_requests_in_flight_at_sigterm_are_answered(windows: Readings) -> None:
    """Requests in flight that exceed the drain time are answered, and the exit code is 0."""
    limits = {"MAX_QUEUE_SECONDS": "60", "MAX_QUEUE_ROWS": "100000", "DRAIN_SECONDS": "0.5", "MAX_BATCH_ROWS": "4"}
    with running(**{f"ENGINE_HEALTH_{key}": value for key, value in limits.items()}) as service, ExitStack() as stack:
        clients = [stack.enter_context(connected(service)) for _ in range(200)]
        request = inference_request(windows[np.arange(60) % 4])
        for client in clients:
            client.sendall(request)
        service.process.terminate()
        assert [b"HTTP/1.1 200"] * 200 == [receive_response(client)[:12] for client in clients]
        assert 0 == service.process.wait(timeout=20)


@pytest.mark.slow
def test_replaced_model_is_freed(tmp_path: Path, windows: Readings) -> None:
    """Only one model is in memory after many reloads, and large requests in progress are answered."""
    path = tmp_path / "model.onnx"
    edited(path, {"temperature": 1.0})
    with running(ENGINE_HEALTH_MODEL=str(path), ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        body = json.dumps({"instances": one(windows[0])["instances"] * 60}).encode()
        memory = []
        with ThreadPoolExecutor(3) as pool:
            for k in range(12):
                edited(path, {"temperature": 1.0 + k % 2})
                tasks = [
                    pool.submit(lambda: service.client.post("/v1/predict", content=body, headers=JSON).status_code)
                    for _ in range(3)
                ]
                assert 200 == service.client.post(LOAD, headers=ADMIN).status_code
                assert [200] * 3 == [task.result(timeout=30) for task in tasks]
                memory.append(resident(service))
        assert memory[-1] - memory[3] < 30  # eight models would be 64 MiB


def test_restarted_workers_leave_no_files_and_no_503(windows: Readings) -> None:
    """Killed workers are replaced immediately, also while they start, and no client gets a 503."""
    with running(ENGINE_HEALTH_WORKERS="2") as service:
        until_all_are_ready(service, 2)
        folder, seen = shared_folder(children(service.process)[0]), Counter[str]()
        assert folder

        def ask(_: int = 0) -> bool:
            try:
                answer = httpx.post(f"{service.client.base_url}/v1/predict", json=one(windows[0]), timeout=30)
                seen[str(answer.status_code)] += 1
            except httpx.TransportError:
                seen["cut"] += 1
            return True

        with ThreadPoolExecutor(2) as pool:
            for k in range(5):
                victim = children(service.process)[k % 2]
                os.kill(victim, signal.SIGKILL)
                until(lambda gone=victim: ask() and len(now := children(service.process)) == 2 and gone not in now)
                assert all(pool.map(ask, range(20)))
        until(lambda: all(predicted(service, windows[0]) for _ in range(8)))
        assert {"200", "cut"} >= set(seen)
        assert seen["200"] > 100
        assert len({path.name.rpartition("_")[2] for path in folder.glob("*.db")}) <= 2


@pytest.mark.slow
def test_memory_and_descriptors_do_not_grow(service: Service, windows: Readings) -> None:
    """Memory and open files do not grow with requests of random size."""
    chance = random.Random(0)
    bodies = [binary(windows[np.arange(n) % 4]) for n in range(1, 65)]
    limits = httpx.Limits(max_connections=4)
    client = httpx.Client(base_url=service.client.base_url, timeout=60, trust_env=False, limits=limits)

    def ask(_: int) -> int:
        body, headers = chance.choice(bodies)
        return client.post(INFER, content=body, headers=headers).status_code

    held, files = [], []
    with client, ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert {200} == set(pool.map(ask, range(300)))
            held.append(resident(service))
            files.append(len(os.listdir(f"/proc/{service.process.pid}/fd")))
    assert held[-1] - held[1] < 20
    assert files[1] == files[-1]
