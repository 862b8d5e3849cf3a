import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.evaluation.evaluate import ARTEFACT
from model.windows import Readings
from service.inference.cpu import _quota_cpus
from tests.support.models import edited, slow_classifier
from tests.support.processes import (
    ADMIN,
    LOAD,
    Service,
    children,
    one,
    prediction_status,
    running,
    shared_folder,
    start,
    until,
)


def test_concurrent_callers_get_their_predictions(service: Service, windows: Readings) -> None:
    """200 concurrent callers with different windows get the same responses as alone."""
    scaled = [windows[k % 4] * np.float32(1 + k / 1e4) for k in range(200)]
    alone = [service.predict([{"telemetry": w.tolist()}])["predictions"][0]["logits"] for w in scaled]
    with ThreadPoolExecutor(32) as pool:
        together = pool.map(lambda w: service.predict([{"telemetry": w.tolist()}])["predictions"][0]["logits"], scaled)
    np.testing.assert_allclose(alone, list(together), atol=1e-5)
    assert len({tuple(row) for row in alone}) > 190


def test_keys_permit_their_calls_only(windows: Readings) -> None:
    """An unknown key gets 401, and a reader's key on an admin call 403; probes need no key, and no key is logged."""
    with running(
        ENGINE_HEALTH_API_KEYS="read, other", ENGINE_HEALTH_ADMIN_KEYS="wheel", ENGINE_HEALTH_LOG_LEVEL="info"
    ) as guarded:
        post = guarded.client.post
        cases: tuple[tuple[dict[str, Any], int], ...] = (
            ({}, 401),
            ({"Authorization": "Bearer unknown"}, 401),
            ({"Authorization": "Basic read"}, 401),
            ({"X-API-Key": b"\xe9"}, 401),
            ({"Authorization": "Bearer read"}, 200),
            ({"X-API-Key": "other"}, 200),
            (ADMIN, 200),
        )
        for headers, status in cases:
            answer = post("/v1/predict", json=one(windows[0]), headers=headers)
            assert status == answer.status_code, headers
            assert ("www-authenticate" in answer.headers) == (status == 401)
        assert 401 == guarded.client.get("/v1/model").status_code
        assert 401 == guarded.client.get("/v2/models/engine-health").status_code
        for path in ("/livez", "/readyz", "/metrics", "/v2/health/ready"):
            assert 200 == guarded.client.get(path).status_code
        assert [401, 403, 200] == [
            post(LOAD, headers=headers).status_code for headers in ({}, {"X-API-Key": "read"}, ADMIN)
        ]
        guarded.process.terminate()
        _, log = guarded.process.communicate(timeout=30)
        assert '"path":"/v1/predict"' in log
        assert "wheel" not in log
        assert "Bearer" not in log
    with running() as unguarded:
        assert 403 == unguarded.client.post(LOAD, headers=ADMIN).status_code
        assert 403 == unguarded.client.put("/v1/calibration/temperature", json={"temperature": 5}).status_code


@pytest.mark.parametrize("tail", ["%0A", "%0D", "%00", "%0a%0a", "%7F", "/", "%2F", ";a", "%20"])
def test_path_variants_do_not_bypass_admin_keys(tail: str) -> None:
    """Suffixes of an admin path never change anything without the admin key."""
    with running(ENGINE_HEALTH_API_KEYS="read", ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        before = service.client.get("/v1/model", headers={"X-API-Key": "read"}).json()["temperature"]
        for headers in ({"X-API-Key": "read"}, {}):
            for method, path in (("PUT", "/v1/calibration/temperature"), ("POST", LOAD)):
                url = f"{service.client.base_url}".rstrip("/") + path + tail
                answer = service.client.request(
                    method, url, json={"temperature": 5}, headers=headers, follow_redirects=True
                )
                assert answer.status_code in (401, 403, 404, 405), answer.text
        assert before == service.client.get("/v1/model", headers={"X-API-Key": "read"}).json()["temperature"]
        infer = service.client.post(f"/v2/models/engine-health/infer{tail}", content=b"{}", headers=ADMIN)
        assert infer.status_code < 500


def test_every_request_logs_one_line_with_its_ids(windows: Readings) -> None:
    """Each request logs one JSON object with the id of its response and the trace of the caller."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with running(ENGINE_HEALTH_LOG_LEVEL="info") as service:
        given = service.client.get("/livez", headers={"X-Request-Id": "abc-1", "traceparent": trace})
        valid = service.client.post("/v1/predict", json=one(windows[0]))
        wrong = service.client.post("/v1/predict", json={}, headers={"X-Request-Id": "new\tline", "traceparent": "x"})
        service.process.terminate()
        _, log = service.process.communicate(timeout=30)
    lines = [json.loads(line) for line in log.splitlines()]
    requests = {line["request_id"]: line for line in lines if line["event"] == "request"}
    assert "abc-1" == given.headers["x-request-id"]
    assert ("/livez", 200) == (requests["abc-1"]["path"], requests["abc-1"]["status"])
    assert ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7") == (
        requests["abc-1"]["trace_id"],
        requests["abc-1"]["span_id"],
    )
    assert 200 == requests[valid.headers["x-request-id"]]["status"]
    assert 422 == requests[wrong.headers["x-request-id"]]["status"]
    assert "trace_id" not in requests[wrong.headers["x-request-id"]]


def test_configured_origins_get_cors_headers(windows: Readings) -> None:
    """A page of a configured origin may read responses and their exposed headers, and another may not.

    A preflight request needs no key, and is counted and identified as any request.
    """
    keys = {"ENGINE_HEALTH_API_KEYS": "read", "ENGINE_HEALTH_ADMIN_KEYS": "wheel"}
    change = "/v1/calibration/temperature"
    with running(ENGINE_HEALTH_CORS_ORIGINS="http://a.test, http://c.test", **keys) as service:
        for origin, allowed in (
            ("http://a.test", "http://a.test"),
            ("http://c.test", "http://c.test"),
            ("http://b", None),
        ):
            for key, status in (("read", 200), ("wrong", 401)):
                headers = {"Origin": origin, "X-API-Key": key}
                answer = service.client.post("/v1/predict", json=one(windows[0]), headers=headers)
                assert status == answer.status_code
                assert allowed == answer.headers.get("access-control-allow-origin")
                shown = answer.headers["access-control-expose-headers"].split(", ")
                assert {"Inference-Header-Content-Length", "Retry-After", "X-Request-Id"} == set(shown)
            preflight = {"Origin": origin, "Access-Control-Request-Method": "PUT", "X-Request-Id": "preflight"}
            before = service.client.options(change, headers=preflight)
            assert (200 if allowed else 400) == before.status_code
            assert allowed == before.headers.get("access-control-allow-origin")
            assert "preflight" == before.headers["x-request-id"]
        assert "application/problem+json" == before.headers["content-type"]
        counted = f'engine_health_http_requests_total{{method="OPTIONS",route="{change}",status="200"}}'
        assert 2 == service.metrics()[counted]


def test_reload_replaces_the_model_only_if_verified(tmp_path: Path, windows: Readings) -> None:
    """A reload activates a verified file; an invalid file gets 409 and changes nothing, also with SIGHUP."""
    path = tmp_path / "model.onnx"
    shutil.copy(ARTEFACT, path)
    with running(ENGINE_HEALTH_MODEL=str(path), ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        first = service.predict(one(windows[0])["instances"])["model"]["digest"]
        path.write_bytes(b"no model")
        answer = service.client.post(LOAD, headers=ADMIN)
        assert 409 == answer.status_code
        assert "not a usable ONNX file" in answer.text
        service.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert first == service.predict(one(windows[0])["instances"])["model"]["digest"]
        edited(path, {"temperature": 3.0})
        second = service.client.post(LOAD, headers=ADMIN).json()["digest"]
        reloaded = service.predict(one(windows[0])["instances"])
        assert first != second == reloaded["model"]["digest"]
        assert 3.0 == reloaded["temperature"]
        assert second == service.client.get("/readyz").json()["digest"]
        infos = [name for name in service.metrics() if "model_info" in name]
        assert 1 == len(infos)
        assert second in infos[0]
        edited(path, {"temperature": 4.0})
        service.process.send_signal(signal.SIGHUP)
        until(lambda: service.predict(one(windows[0])["instances"])["temperature"] == 4.0)


def _survives_sighup(pid: int) -> bool:
    """Return whether a process ignores or handles SIGHUP."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(status.partition(name)[2].split()[0], 16) & 1 for name in ("SigIgn:", "SigCgt:"))


@pytest.mark.parametrize("workers", [1, 2])
def test_early_sighup_ends_no_worker(workers: int) -> None:
    """Repeated SIGHUP while processes start ends none of them."""
    process = start(
        "serve", "--port", "0", "--workers", str(workers), ENGINE_HEALTH_LOG_LEVEL="info", ENGINE_HEALTH_DATABASE_URL=""
    )
    log: list[str] = []
    with process, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: log.extend(process.stderr or ()))  # reads until the process ends
        seen = set[int]()

        def ready() -> bool:
            process.send_signal(signal.SIGHUP)
            seen.update(children(process))
            return sum("ready:" in line for line in log) == workers

        try:
            until(lambda: _survives_sighup(process.pid))
            until(ready)
            process.terminate()
            assert 0 == process.wait(timeout=30)
        finally:
            process.kill()
    assert len(seen) == (workers if workers > 1 else 0)


def test_reloads_under_load_fail_no_request(tmp_path: Path, windows: Readings) -> None:
    """While models are replaced, every request gets the result of the digest in its response."""
    path = tmp_path / "model.onnx"
    temperatures: dict[str, float] = {}
    edited(path, {"temperature": 1.0})
    with running(ENGINE_HEALTH_MODEL=str(path), ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        temperatures[service.client.get("/readyz").json()["digest"]] = 1.0
        stop, seen = threading.Event(), []

        def ask() -> None:
            with httpx.Client(base_url=service.client.base_url, timeout=60, trust_env=False) as client:
                while not stop.is_set():
                    answer = client.post("/v1/predict", json={"instances": one(windows[0])["instances"] * 40})
                    assert answer.status_code == 200, answer.text
                    seen.append((answer.json()["model"]["digest"], answer.json()["temperature"]))

        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(ask) for _ in range(4)]
            for k in range(8):
                names = [["normal", "degrading", "critical"], ["fine", "worn", "bad"]][k % 2]
                edited(path, {"temperature": 1.0 + k % 3, "classes": names})
                digest = service.client.post(LOAD, headers=ADMIN).json()["digest"]
                temperatures[digest] = 1.0 + k % 3
            stop.set()
            for task in tasks:
                task.result()
    assert {digest for digest, _ in seen} <= set(temperatures)
    assert all(temperatures[digest] == t for digest, t in seen)
    assert len({digest for digest, _ in seen}) > 1


def test_sigterm_makes_unready_and_drains(windows: Readings) -> None:
    """After SIGTERM /readyz is 503, requests in the drain time are answered, and the exit code is 0."""
    with running(ENGINE_HEALTH_DRAIN_SECONDS="3") as service:
        service.process.terminate()
        until(lambda: service.client.get("/readyz").status_code == 503)
        service.predict(one(windows[0])["instances"])
        assert 200 == service.client.get("/livez").status_code
        assert 0 == service.process.wait(timeout=20)


def test_slow_client_gets_408(windows: Readings) -> None:
    """Late headers or bodies get 408 or a closed connection, and other clients are answered."""
    with running(ENGINE_HEALTH_REQUEST_SECONDS="1") as service:
        address = (service.client.base_url.host, service.client.base_url.port or 80)
        announced = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
        starts = (b"", b"POST /v1/predict HT", announced, announced + b"{")
        for sent, expected in zip(starts, (b"", b"408", b"408", b"408"), strict=True):
            with socket.create_connection(address, timeout=20) as slow:
                slow.sendall(sent)
                service.predict(one(windows[0])["instances"])
                received = b""
                while part := slow.recv(4096):
                    received += part
                assert expected in received.split(b"\r\n")[0]
        with socket.create_connection(address, timeout=20) as wordy:
            wordy.sendall(b"GET /livez HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000)
            assert b"431" in wordy.recv(4096)


@pytest.mark.slow
def test_live_while_a_large_body_is_read(service: Service, windows: Readings) -> None:
    """`/livez` responds while 30 MB are parsed and scored."""
    rows = windows[0].tolist()
    large = json.dumps({"instances": [{"telemetry": rows * 8}] * 130}).encode()
    assert 25 * 2**20 < len(large) < 32 * 2**20
    done, waits = threading.Event(), []

    def ask() -> None:
        answer = service.client.post("/v1/predict", content=large, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        done.set()

    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=service.client.base_url, trust_env=False) as client:
        task = pool.submit(ask)
        while not done.is_set() and not task.done():
            started = time.perf_counter()
            assert 200 == client.get("/livez").status_code
            waits.append(time.perf_counter() - started)
        task.result()
    assert len(waits) > 5  # a blocked event loop would give one or two


def test_full_queue_gets_429_and_counts_exactly(tmp_path: Path) -> None:
    """Requests beyond the limit of the queue get 429 with Retry-After, the others 200; both are counted exactly."""
    rows, requests = 60, 48
    limits = {"ENGINE_HEALTH_MAX_QUEUE_ROWS": "100", "ENGINE_HEALTH_MAX_QUEUE_SECONDS": "600"}
    with running(ENGINE_HEALTH_MODEL=str(slow_classifier(tmp_path / "slow.onnx")), **limits) as service:
        body = json.dumps({"instances": [{"telemetry": [0.1, 0.2, 0.3]}] * rows}).encode()
        headers = {"Content-Type": "application/json"}
        with ThreadPoolExecutor(24) as pool:
            answers = list(
                pool.map(lambda _: service.client.post("/v1/predict", content=body, headers=headers), range(requests))
            )
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {200, 429} == {answer.status_code for answer in answers}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all("inference queue is full" in answer.json()["detail"] for answer in refused)
        metrics = service.metrics()
        assert len(refused) == metrics['engine_health_rejected_total{reason="overloaded"}']
        assert rows * (requests - len(refused)) == metrics["engine_health_confidence_count"]
        assert 200 == service.client.post("/v1/predict", content=body, headers=headers).status_code


@pytest.mark.parametrize("deterministic", ["1", "0"])
def test_window_has_equal_bits_in_any_batch(windows: Readings, deterministic: str) -> None:
    """A window of the bundled model has equal bits alone and at any position of any batch."""
    with running(ENGINE_HEALTH_DETERMINISTIC=deterministic) as service:
        model = service.client.get("/v1/model").json()
        assert (bool(int(deterministic)), 0.0) == (model["deterministic"], model["batch_max_difference"])
        random = np.random.default_rng(7)
        some = [windows[k % 4] * random.normal(1, 0.01, windows[0].shape).astype(np.float32) for k in range(150)]
        alone = [service.predict([{"telemetry": w.tolist()}])["predictions"][0] for w in some]
        for n in (2, 3, 7, 64, 65, 150):
            for begin in range(0, 150 - n + 1, n):
                rows = service.predict([{"telemetry": w.tolist()} for w in some[begin : begin + n]])["predictions"]
                for row, expected in zip(rows, alone[begin : begin + n], strict=True):
                    assert (expected["logits"], expected["rul"]) == (row["logits"], row["rul"])


def test_counters_of_workers_survive_kill(windows: Readings) -> None:
    """While workers are killed, every response is counted once, in at most as many files as workers.

    A worker killed at work may have counted one response that no client received; an idle one none.
    """
    with running(ENGINE_HEALTH_WORKERS="2") as service:
        until(lambda: len(children(service.process)) == 2)
        seen = Counter[int | None]()

        def ask(_: int = 0) -> bool:
            seen[status := prediction_status(service, windows[0])] += 1
            return status == 200

        def replaced(victim: int) -> bool:
            return len(now := children(service.process)) == 2 and victim not in now

        for _ in range(4):
            victim = children(service.process)[0]
            with ThreadPoolExecutor(4) as pool:
                tasks = [pool.submit(ask) for _ in range(60)]
                os.kill(victim, signal.SIGKILL)
                assert 60 == len([task.result() for task in tasks])
            until(lambda gone=victim: replaced(gone))
            until(lambda: all(ask() for _ in range(4)))
        counted = counted_predictions(service)
        assert seen[200] > 150
        assert seen[200] <= counted <= seen[200] + seen[None]
        rows = service.metrics()["engine_health_confidence_count"]
        assert counted <= rows <= seen[200] + seen[None]
        for victim in children(service.process):
            os.kill(victim, signal.SIGKILL)
            until(lambda gone=victim: replaced(gone))
            before = seen[200]
            until(lambda: all(ask() for _ in range(10)))
            counted += seen[200] - before
            assert counted == counted_predictions(service)
        folder = shared_folder(children(service.process)[0])
        assert folder
        names = sorted(path.name for path in folder.glob("counter_*.db"))
        assert names in (["counter_0.db", "counter_1.db"], ["counter_0.db"], ["counter_1.db"])


def counted_predictions(service: Service) -> float:
    """Return the number of predictions with status 200 in the metrics."""
    answered = 'engine_health_http_requests_total{method="POST",route="/v1/predict",status="200"}'
    return service.metrics()[answered]


def test_workers_follow_a_new_model_and_stop_together(tmp_path: Path, windows: Readings) -> None:
    """A reload reaches every worker, also one that starts later from a broken path; the service exits with 0."""
    path = tmp_path / "model.onnx"
    edited(path, {"temperature": 1.0})
    with running(ENGINE_HEALTH_MODEL=str(path), ENGINE_HEALTH_ADMIN_KEYS="wheel", ENGINE_HEALTH_WORKERS="2") as service:
        until(lambda: len(children(service.process)) == 2)
        edited(path, {"temperature": 2.0})
        assert 200 == service.client.post(LOAD, headers=ADMIN).status_code
        path.write_bytes(b"broken")
        for victim in (*children(service.process), None):
            until(lambda: temperatures(service, windows[0]) == {2.0})
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                until(lambda gone=victim: len(now := children(service.process)) == 2 and gone not in now)
        service.process.terminate()
        _, log = service.process.communicate(timeout=30)
        assert 0 == service.process.returncode
        assert "UserWarning" not in log
        assert all(json.loads(line)["event"] for line in log.splitlines())


def temperatures(service: Service, window: Readings) -> set[float]:
    """Return the temperatures of several responses over new connections; empty while some fail."""
    values = set()
    for _ in range(8):
        try:
            answer = httpx.post(f"{service.client.base_url}/v1/predict", json=one(window), timeout=30, trust_env=False)
        except httpx.TransportError:
            return set()
        values.add(answer.json().get("temperature"))
    return values


def test_workers_with_a_bad_model_stop_with_one_line(tmp_path: Path) -> None:
    """An invalid artefact ends the service with one line with the reason, for any number of workers."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"broken")
    process = start("serve", "--port", "0", "--workers", "2", ENGINE_HEALTH_MODEL=str(path))
    _, log = process.communicate(timeout=60)
    assert 1 == process.returncode
    assert 1 == log.count("not a usable ONNX file")
    assert "Traceback" not in log


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("max 100000", None), ("20000 100000", 1)])
def test_cpus_are_limited_by_the_control_group(tmp_path: Path, text: str, cores: int | None) -> None:
    """A quota of 1.5 cores is 2 threads, and no quota is no limit."""
    (tmp_path / "cpu.max").write_text(text)
    assert cores == _quota_cpus(tmp_path)
