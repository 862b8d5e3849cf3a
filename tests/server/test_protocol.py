import asyncio
import gc
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO
from weakref import ref

import pytest

from model.windows import Readings
from service.api.problems import HTTP_CODES
from tests.support.processes import Service, one, running, until, until_all_are_ready
from tests.support.raw_http import (
    HEAD,
    JSON,
    LIVEZ,
    connect_to_application,
    connected,
    is_closed,
    open_stream,
    prediction_request,
    read_response,
)

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("trailers", [b"X-A: b\r\n" * 20_000, b"X-A: " + b"b" * 200_000])
def test_trailers_are_ignored_and_limited(service: Service, windows: Readings, trailers: bytes) -> None:
    """Trailers are ignored, and trailers above the limit of headers get 431."""
    body = json.dumps(one(windows[0])).encode()
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n"
    with open_stream(service) as (connection, reader):
        for _ in range(2):
            connection.sendall(chunked + b"X-Request-Id: late\r\n\r\n")
            status, headers, _ = read_response(reader)
            assert 200 == status
            assert "late" != headers["x-request-id"]
        connection.sendall(chunked)
        connection.sendall(trailers)
        assert 431 == read_response(reader)[0]
        assert is_closed(reader)


@pytest.mark.parametrize("offer", [OFFER, b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"])
def test_upgrade_request_is_answered_as_http_1_1(service: Service, windows: Readings, offer: bytes) -> None:
    """A request that offers h2c or a websocket is answered as HTTP/1.1, and so is the next one."""
    plain = service.predict(one(windows[0])["instances"])["predictions"][0]["logits"]
    request = prediction_request(windows, offer)
    chunked = HEAD + offer + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    with open_stream(service) as (connection, reader):
        for at in (len(request), len(request) // 2, 40):
            connection.sendall(request[:at])
            time.sleep(0.1)
            connection.sendall(request[at:] + LIVEZ.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n"))
            status, _, body = read_response(reader)
            assert (200, plain) == (status, json.loads(body)["predictions"][0]["logits"])
            assert 200 == read_response(reader)[0]
        connection.sendall(chunked)
        assert 422 == read_response(reader)[0]


def test_pipelined_upgrade_requests_are_all_answered(service: Service) -> None:
    """Any number of pipelined requests with an Upgrade header are all answered."""
    many = 1500
    with open_stream(service) as (connection, reader):
        connection.sendall(LIVEZ.replace(b"\r\n\r\n", b"\r\n" + OFFER + b"\r\n") * many)
        assert [200] * many == [read_response(reader)[0] for _ in range(many)]


def test_headers_after_a_large_body_are_counted_alone(service: Service, windows: Readings) -> None:
    """Headers that share a packet with the end of a large body are counted without the body, and get no 431."""
    request = prediction_request(windows)
    body = json.dumps(one(windows[0])).encode().ljust(400_000)
    large = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with open_stream(service) as (connection, reader):
        connection.sendall(large + request[:30])
        assert 200 == read_response(reader)[0]
        connection.sendall(request[30:])
        assert 200 == read_response(reader)[0]


@pytest.mark.parametrize(("size", "status"), [(60_000, 200), (70_000, 431)])
@pytest.mark.parametrize("lines", [1, 100])
def test_header_limit_is_the_published_limit(service: Service, size: int, status: int, lines: int) -> None:
    """Headers up to the published limit are read and longer ones rejected, in one piece or in many."""
    assert 65536 == service.client.get("/v1/model").json()["limits"]["header_bytes"]
    request = LIVEZ[:-2] + (b"X-A: " + b"b" * (size // lines) + b"\r\n") * lines + b"\r\n"
    for pieces in (1, 7):
        with open_stream(service) as (connection, reader):
            step = len(request) // pieces + 1
            for begin in range(0, len(request), step):
                connection.sendall(request[begin : begin + step])
                time.sleep(0.01)
            assert status == read_response(reader)[0]


REFUSED = {
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,
    b"GET /livez HTTP/1.1\r\nNo colon\r\n\r\n": 400,
    b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\n\r\n": 400,
    b"POST /v1/predict HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n": 400,
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n": 400,
    b"GET /v1/model?key=secret HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000: 431,
    b"GET /v2/models HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000: 431,
    b"GET /v1/model HTTP/1.1\r\nX-A: b\r\n": 408,
}


def test_malformed_http_gets_a_problem_document() -> None:
    """Malformed, endless and late headers get a problem document with a request id, are counted and logged."""
    statuses = {}
    with running(ENGINE_HEALTH_REQUEST_SECONDS="1", ENGINE_HEALTH_LOG_LEVEL="info") as service:
        for sent, status in REFUSED.items():
            with open_stream(service) as (connection, reader):
                connection.sendall(sent)
                received, headers, body = read_response(reader)
                assert status == received, sent[:50]
                assert is_closed(reader)
            problem, protocol = json.loads(body), b"/v2" in sent
            assert "close" == headers["connection"]
            assert ("application/json" if protocol else "application/problem+json") == headers["content-type"]
            assert (["error"] if protocol else ["type", "title", "status", "detail", "code"]) == list(problem)
            assert protocol or HTTP_CODES[status] == problem["code"]
            statuses[headers["x-request-id"]] = status
        counted = service.metrics()
        service.process.terminate()
        _, log = service.process.communicate(timeout=30)
    prefix = 'engine_health_http_requests_total{method="other",route="unmatched",status='
    assert [5, 2, 1] == [counted[f'{prefix}"{status}"}}'] for status in (400, 431, 408)]
    lines = [line for line in map(json.loads, log.splitlines()) if line.get("request_id") in statuses]
    assert statuses == {line["request_id"]: line["status"] for line in lines}
    assert "secret" not in log


def test_earlier_requests_are_answered_before_a_rejection(service: Service, windows: Readings) -> None:
    """Requests before malformed bytes are all answered, and the connection is then closed."""
    request = prediction_request(windows)
    with open_stream(service) as (connection, reader):
        connection.sendall(request * 2 + b"nonsense\r\n\r\n")
        assert [200, 200] == [read_response(reader)[0] for _ in range(2)]
        assert is_closed(reader)


def test_stopping_workers_refuse_new_connections(windows: Readings) -> None:
    """After SIGTERM workers answer connected clients and refuse new connections."""
    request = prediction_request(windows)
    with running(ENGINE_HEALTH_WORKERS="2") as service, open_stream(service) as (connection, reader):
        until_all_are_ready(service, 2)
        connection.sendall(request[:-9])
        service.process.terminate()

        def refused() -> bool:
            try:
                with connected(service):
                    return False
            except ConnectionRefusedError:
                return True

        until(refused)
        connection.sendall(request[-9:])
        assert 200 == read_response(reader)[0]
        assert 0 == service.process.wait(timeout=20)


def test_incomplete_request_gets_503_on_shutdown(windows: Readings) -> None:
    """A request that is incomplete at the end of the grace time gets 503, and is not a failure."""
    with running() as service, open_stream(service) as (connection, reader):
        connection.sendall(prediction_request(windows)[:-9])
        service.metrics()  # reading has started
        service.process.terminate()
        status, headers, body = read_response(reader)
        assert (503, "1") == (status, headers["retry-after"])
        assert 503 == json.loads(body)["status"]
        _, log = service.process.communicate(timeout=20)
        assert 0 == service.process.returncode
    assert "Traceback" not in log


def test_blanks_around_header_values_are_ignored() -> None:
    """Request ids, keys and lengths may be followed by blanks."""
    with running(ENGINE_HEALTH_API_KEYS="read") as service:
        for key in (b"X-API-Key: read \t\r\n", b"Authorization: Bearer  read \r\n"):
            with open_stream(service) as (connection, reader):
                connection.sendall(b"GET /v1/model HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc \t\r\n" + key + b"\r\n")
                status, headers, _ = read_response(reader)
                assert (200, "abc") == (status, headers["x-request-id"])


@contextmanager
def large_response(service: Service) -> Iterator[BinaryIO]:
    """Yield the stream of a response of about 20 MB, of which the kernel buffers little."""
    body = json.dumps({"logits": [[k % 7 / 3 for k in range(300)]] * 4096, "labels": [0] * 4096}).encode()
    head = HEAD.replace(b"predict", b"evaluate") + b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(30)
        connection.connect((service.client.base_url.host, service.client.base_url.port or 80))
        connection.sendall(head + body)
        assert b"HTTP" == connection.recv(4)
        with connection.makefile("rb") as reader:
            yield reader


def test_client_that_does_not_read_is_disconnected() -> None:
    """A client that does not read its response is disconnected, and one that reads late is not."""
    with running(ENGINE_HEALTH_REQUEST_SECONDS="3") as service:
        descriptors = f"/proc/{service.process.pid}/fd"
        with large_response(service) as reader:
            time.sleep(1)
            assert read_response(reader)[2].endswith(b"}")
        service.client.get("/livez")
        before = len(os.listdir(descriptors))
        with large_response(service) as reader:
            assert before + 1 == len(os.listdir(descriptors))
            until(lambda: len(os.listdir(descriptors)) == before)
            _, headers, body = read_response(reader)
            assert len(body) < int(headers["content-length"])


def test_pipelined_requests_under_load_keep_their_order(windows: Readings) -> None:
    """Three requests in one write get three responses in order while other requests are rejected."""
    body = json.dumps({"instances": one(windows[0])["instances"] * 60}).encode()
    request = prediction_request(windows) + LIVEZ + prediction_request(windows)
    with running(ENGINE_HEALTH_MAX_QUEUE_ROWS="64") as service, open_stream(service) as (connection, reader):
        flood: list[int] = []

        def send(_: int) -> None:
            answer = service.client.post("/v1/predict", content=body, headers=JSON)
            flood.append(answer.status_code)

        with ThreadPoolExecutor(24) as pool:
            sent = pool.map(send, range(400))
            statuses = []
            for _ in range(40):
                connection.sendall(request)
                statuses += [[read_response(reader)[0] for _ in range(3)]]
            list(sent)
        assert {200, 429} == set(flood)
        assert {200, 429} >= {first for first, _, _ in statuses} | {last for _, _, last in statuses}
        assert {200} == {live for _, live, _ in statuses}
        connection.sendall(prediction_request(windows))
        assert 200 == read_response(reader)[0]


def test_request_state_is_freed_with_the_next_request() -> None:
    """The state of a request has no reference cycle, so that it is freed without garbage collection."""
    requests: list[Any] = []

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        requests.append(ref(receive.__self__))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def ask(times: int) -> None:
        async with connect_to_application(application, {}) as (reader, writer):
            for _ in range(times):
                writer.write(LIVEZ)
                await reader.readuntil(b"\r\n\r\n")

    gc.disable()
    try:
        asyncio.run(ask(3))
        assert [True, True] == [request() is None for request in requests[:2]]
    finally:
        gc.enable()
