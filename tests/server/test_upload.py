import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request

from model.windows import Readings
from service.server import upload
from service.server.body import read_large
from service.server.body_budget import MAX_SPARE_BYTES, BodyBudget, BodyReservation
from service.server.event_loop import BatchAcceptLoop
from service.server.scope import context_of
from tests.support.bodies import INFER, binary
from tests.support.processes import Service, resident, running, until
from tests.support.raw_http import (
    HEAD,
    LIVEZ,
    MIB,
    connect_to_application,
    connected,
    inference_request,
    is_closed,
    open_stream,
    read_response,
)

ROWS = 400  # windows of more than 1 MiB of floats


@pytest.fixture(scope="module")
def many(windows: Readings) -> Readings:
    """Return windows with random deviations, so that almost all of them differ."""
    random, some = np.random.default_rng(5), windows[np.arange(ROWS) % 4]
    return (some * (1 + 1e-3 * random.standard_normal(some.shape))).astype(np.float32)


def pieces(data: bytes, seed: int) -> Iterator[bytes]:
    """Yield the bytes in pieces of random length."""
    random, at = np.random.default_rng(seed), 0
    while at < len(data):
        size = int(np.exp(random.uniform(0, 13)))
        yield data[at : at + size]
        at += size


def logits(body: bytes) -> bytes:
    """Return the predictions of a response without ids."""
    return body[body.index(b'"outputs"') :]


def wait_until_read(service: Service) -> None:
    """Send enough requests that the event loop reads all earlier bytes."""
    for _ in range(50):
        service.client.get("/livez")


@pytest.mark.parametrize("seed", range(4))
def test_large_body_in_any_pieces_is_read_unchanged(service: Service, many: Readings, seed: int) -> None:
    """Windows have the same predictions in one piece or in many, and the next pipelined request is read."""
    request = inference_request(many)
    with open_stream(service) as (connection, reader):
        connection.sendall(request)
        status, _, whole = read_response(reader)
        assert 200 == status
        for piece in pieces(request + LIVEZ + request, seed):
            connection.sendall(piece)
        responses = [read_response(reader) for _ in range(3)]
    assert [200] * 3 == [status for status, _, _ in responses]
    assert logits(whole) == logits(responses[0][2]) == logits(responses[2][2])
    assert b'{"status":"live"}' == responses[1][2]


def test_concurrent_large_bodies_are_not_mixed_up(service: Service, many: Readings) -> None:
    """Bodies of different lengths get the same responses concurrently, one after the other, and alone."""
    bodies = [binary(many[k:]) for k in range(0, 40, 5)]

    def ask(k: int) -> bytes:
        body, headers = bodies[k % len(bodies)]
        answer = service.client.post(INFER, content=body, headers=headers)
        assert answer.status_code == 200
        return logits(answer.content)

    alone = [ask(k) for k in range(len(bodies))]
    assert len(bodies) == len(set(alone))
    with ThreadPoolExecutor(6) as pool:
        assert alone * 5 == list(pool.map(ask, range(5 * len(bodies))))


def test_large_body_with_expect_gets_one_continue(service: Service, many: Readings) -> None:
    """`Expect: 100-continue` gets one 100 response before the first byte of the body."""
    head, _, body = inference_request(many).partition(b"\r\n\r\n")
    with open_stream(service) as (connection, reader):
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert b"HTTP/1.1 100 Continue\r\n" == reader.readline()
        assert b"\r\n" == reader.readline()
        connection.sendall(body)
        assert 200 == read_response(reader)[0]


def test_large_body_that_is_late_gets_408(many: Readings) -> None:
    """A body that is incomplete after the time limit gets 408 and a closed connection; other clients are answered."""
    request = inference_request(many)
    with running(ENGINE_HEALTH_REQUEST_SECONDS="1") as hasty, open_stream(hasty) as (connection, reader):
        connection.sendall(request[: len(request) // 2])
        assert 408 == read_response(reader)[0]
        assert is_closed(reader)
        with open_stream(hasty) as (other, answer):
            other.sendall(request)
            assert 200 == read_response(answer)[0]


def test_large_body_beyond_the_budget_gets_429(many: Readings) -> None:
    """A body that exceeds the budget halfway gets 429, its rest is discarded, and its bytes are released."""
    request = inference_request(many)
    room = len(request) * 3 // 2
    with running(ENGINE_HEALTH_MAX_BUFFERED_BYTES=str(room)) as tight, open_stream(tight) as (first, reader):
        with open_stream(tight) as (second, other):
            for connection in (first, second):
                connection.sendall(request[:100_000])
            wait_until_read(tight)
            for connection in (first, second):
                connection.sendall(request[100_000:-1])
                wait_until_read(tight)
            assert 429 == read_response(other)[0]
            second.sendall(request[-1:] + LIVEZ)
            assert 200 == read_response(other)[0]
            first.sendall(request[-1:])
            assert 200 == read_response(reader)[0]
        for _ in range(2):
            first.sendall(request)
            assert 200 == read_response(reader)[0]


@pytest.mark.parametrize("how", [socket.SHUT_RDWR, socket.SHUT_WR])
def test_disconnect_during_upload_releases_the_budget(many: Readings, how: int) -> None:
    """A client that disconnects or half-closes counts as disconnected, and its memory is released."""
    request = inference_request(many)
    with running(ENGINE_HEALTH_MAX_BUFFERED_BYTES=str(len(request))) as tight:
        with open_stream(tight) as (leaves, _):
            leaves.sendall(request[:-1])
            wait_until_read(tight)
            until(lambda: tight.client.post(INFER, content=request[-900_000:]).status_code == 429)
            leaves.shutdown(how)
            until(lambda: tight.metrics()['engine_health_rejected_total{reason="client_gone"}'] == 1)
        with open_stream(tight) as (stays, reader):
            stays.sendall(request)
            assert 200 == read_response(reader)[0]


def test_body_with_two_lengths_is_rejected(service: Service) -> None:
    """A body with Content-Length and chunked encoding gets 400, because its length is ambiguous."""
    with open_stream(service) as (connection, reader):
        connection.sendall(HEAD + b"Content-Length: 2000000\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert 400 == read_response(reader)[0]


@pytest.mark.slow
def test_disconnects_during_uploads_leave_no_memory() -> None:
    """After many disconnects during uploads at most the memory of one body remains."""
    most = HEAD + b"Content-Length: %d\r\n\r\n" % MAX_SPARE_BYTES + bytes(MAX_SPARE_BYTES - 1)
    with running() as service:
        before = resident(service)
        for gone in (8, 16, 24):
            with ExitStack() as leaving:
                for _ in range(8):
                    leaving.enter_context(connected(service)).sendall(most)
            until(lambda gone=gone: gone == service.metrics()['engine_health_rejected_total{reason="client_gone"}'])
        assert resident(service) - before < 4 * MAX_SPARE_BYTES / MIB


def test_announced_bytes_are_not_charged_before_arrival(many: Readings) -> None:
    """Announced large bodies are charged only for bytes that arrived, so that another large body is answered."""
    request = inference_request(many)
    with running(ENGINE_HEALTH_MAX_BUFFERED_BYTES=str(8 * MIB)) as tight, ExitStack() as slow:
        for _ in range(12):
            waits = slow.enter_context(connected(tight))
            waits.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % (2 * MIB))
            wait_until_read(tight)
            waits.sendall(b"{")
        wait_until_read(tight)
        with open_stream(tight) as (connection, reader):
            connection.sendall(request)
            assert 200 == read_response(reader)[0]


def test_fast_upload_is_read_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one step of a body is read before other callbacks of the event loop run."""
    step, length, taken = 1 << 12, 2 * MIB, [0]
    monkeypatch.setattr(upload, "MAX_STEP", step)
    monkeypatch.setattr(upload, "MIN_STEP", step)

    async def application(scope: Any, receive: Any, _send: Any) -> None:
        context = context_of(scope)
        held = context.reservation = BodyReservation(BodyBudget(length))
        context.headers, context.content_length = dict(scope["headers"]), length
        await asyncio.sleep(0.1)  # until much of the body is in the socket

        def record() -> None:
            taken.append(held.bytes)
            asyncio.get_running_loop().call_soon(record)

        record()
        assert length == len(await read_large(Request(scope, receive), length, 30))
        whole.set()

    async def send_fast() -> None:
        async with connect_to_application(application, {}) as (_, sends):
            sends.write(HEAD + b"Content-Length: %d\r\n\r\n" % length)
            sends.write(bytes(length))
            await whole.wait()

    whole = asyncio.Event()
    with asyncio.Runner(loop_factory=BatchAcceptLoop) as runner:
        runner.run(send_fast())
    assert length == taken[-1]
    assert step >= max(after - before for before, after in pairwise(taken) if before)


def test_body_view_after_release_raises() -> None:
    """A view of a released body raises an error, and never shows the bytes of the next body."""
    budget = BodyBudget(4 * MIB)
    first, second = BodyReservation(budget), BodyReservation(budget)
    view = first.allocate(2 * MIB)
    view[:4] = b"mine"
    spare = first.mapping
    first.release()
    with pytest.raises(ValueError, match="released"):
        bytes(view[:4])
    assert MIB == len(second.allocate(MIB))
    assert spare is second.mapping


def test_body_view_in_use_keeps_its_bytes_after_release() -> None:
    """Memory that an array still uses is not reused, and its bytes are unchanged."""
    budget = BodyBudget(4 * MIB)
    first, second = BodyReservation(budget), BodyReservation(budget)
    view = first.allocate(MIB)
    view[:4] = b"mine"
    array = np.frombuffer(view, np.uint8)
    first.release()
    second.allocate(MIB)[:4] = b"next"
    assert b"mine" == array[:4].tobytes()


def test_mapping_above_the_spare_limit_is_closed() -> None:
    """A body above the limit of the spare mapping is closed on release, and its view is invalid."""
    budget = BodyBudget(4 * MAX_SPARE_BYTES)
    held = BodyReservation(budget)
    view = held.allocate(MAX_SPARE_BYTES + 1)
    held.release()
    assert budget.spare is None
    with pytest.raises(ValueError, match="released"):
        len(view)
