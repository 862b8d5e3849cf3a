"""Raw HTTP connections for tests of the server."""

import asyncio
import json
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, BinaryIO

import uvicorn
from uvicorn.server import ServerState

from model.windows import Readings
from service.server.protocol import BoundedProtocol
from tests.support.bodies import INFER, binary
from tests.support.processes import Service, one

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def prediction_request(windows: Readings, *headers: bytes) -> bytes:
    """Return the bytes of a prediction request."""
    body = json.dumps(one(windows[0])).encode()
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def open_stream(service: Service) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """Open a connection; yield it and its input stream."""
    with connected(service) as connection, connection.makefile("rb") as reader:
        yield connection, reader


@asynccontextmanager
async def connect_to_application(
    application: Any, state: dict[str, Any]
) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    """Serve an application in this process with a lifespan state; yield the streams of a connection."""
    config = uvicorn.Config(application, lifespan="off", log_config=None)
    config.load()
    protocol = partial(BoundedProtocol, config, ServerState(), state)
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1")
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    yield reader, writer
    writer.close()
    server.close()


def read_response(reader: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """Return the next response: status, headers and body."""
    status = int(reader.readline().split()[1])
    lines = iter(lambda: reader.readline().decode().rstrip(), "")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return status, headers, reader.read(int(headers["content-length"]))


def is_closed(reader: BinaryIO) -> bool:
    """Return whether the other side closed the connection without further bytes."""
    try:
        return reader.read(1) == b""
    except ConnectionResetError:  # the other side closed with unread bytes
        return True


JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
MIB = 2**20


@contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    """Open a raw connection to the service, for bytes that no client library sends."""
    address = (service.client.base_url.host, service.client.base_url.port or 80)
    with socket.create_connection(address, timeout=30) as connection:
        yield connection


def inference_request(windows: Readings) -> bytes:
    """Return the bytes of a request of the Open Inference Protocol."""
    body, headers = binary(windows)
    lines = [f"POST {INFER} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body
