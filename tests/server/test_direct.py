import re
from collections.abc import Callable

import pytest

from model.windows import Readings
from tests.support.processes import Service, running
from tests.support.raw_http import HEAD, LIVEZ, is_closed, open_stream, prediction_request, read_response

OWN = (
    rb"(?<=^date: )[^\r]*|(?<=^x-request-id: )[^\r]*",
    rb"^(vary|access-control-[^:]*): [^\n]*\n",
    rb'(?<="prediction_id":")[^"]*',
)


def raw_responses(service: Service, request: bytes) -> bytes:
    """Return all responses until the connection closes, without the fields that differ between responses."""
    with open_stream(service) as (connection, reader):
        connection.sendall(request)
        return re.sub(b"|".join(OWN), b"", reader.read(), flags=re.MULTILINE)


def last(request: bytes) -> bytes:
    """Return a request with `Connection: close`."""
    return request.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n", 1)


def old(request: bytes) -> bytes:
    """Return a request of HTTP/1.0."""
    return request.replace(b"HTTP/1.1", b"HTTP/1.0", 1)


def wrong(request: bytes) -> bytes:
    """Return a request whose body is not JSON."""
    return last(request).replace(b"[[", b"[ ", 1)


def other(request: bytes) -> bytes:
    """Return a request with an unsupported media type."""
    return last(request).replace(b"application/json", b"application/pdf_", 1)


@pytest.mark.parametrize("ask", [last, old, wrong, other, lambda request: request + LIVEZ + wrong(request)])
def test_response_with_and_without_asgi_messages_is_equal(
    service: Service, windows: Readings, ask: Callable[[bytes], bytes]
) -> None:
    """Status, headers and body are equal to those of a service that inspects each ASGI message."""
    request = ask(prediction_request(windows))
    with running(ENGINE_HEALTH_CORS_ORIGINS="https://ops.example") as inspecting:
        assert raw_responses(service, request) == raw_responses(inspecting, request)


def test_continue_precedes_an_early_rejection() -> None:
    """100 Continue is never sent after the final response, also when both are due in one turn."""
    chunk = b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b" " * 2000 + b"\r\n"
    with running(ENGINE_HEALTH_MAX_BODY_BYTES="1000") as small:
        for closing in (b"", b"Connection: close\r\n"):
            with open_stream(small) as (connection, reader):
                connection.sendall(HEAD + closing + b"Expect: 100-continue\r\n" + chunk)
                assert b"HTTP/1.1 100 Continue\r\n\r\n" == reader.readline() + reader.readline()
                assert 413 == read_response(reader)[0]
                if not closing:
                    connection.sendall(b"0\r\n\r\n" + LIVEZ)
                    assert 200 == read_response(reader)[0]


def test_expect_continue_with_sent_body_is_answered(service: Service, windows: Readings) -> None:
    """A body that arrives with its headers gets one response without 100 Continue, and the next request is read."""
    with open_stream(service) as (connection, reader):
        connection.sendall(
            prediction_request(windows, b"Expect: 100-continue\r\n")
            + LIVEZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        assert 200 == read_response(reader)[0]
        assert 200 == read_response(reader)[0]
        assert is_closed(reader)
