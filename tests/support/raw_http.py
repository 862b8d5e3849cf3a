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


def predicting(windows: Readings, *headers: bytes) -> bytes:
    """Return the bytes of a prediction request."""
    body = json.dumps(one(windows[0])).encode()
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def talking(service: Service) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """Open a connection; yield it and its input stream."""
    with connected(service) as connection, connection.makefile("rb") as ear:
        yield connection, ear


@asynccontextmanager
async def asking(application: Any, state: dict[str, Any]) -> AsyncIterator[tuple[StreamReader, StreamWriter]]:
    """Return a connection to an application in this process with this lifespan state."""
    config = uvicorn.Config(application, lifespan="off", log_config=None)
    config.load()
    made = partial(BoundedProtocol, config, ServerState(), state)
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1")
    answers, asks = await asyncio.open_connection(*server.sockets[0].getsockname())
    yield answers, asks
    asks.close()
    server.close()


def hear(ear: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """Return the next response: status, headers and body."""
    status = int(ear.readline().split()[1])
    lines = iter(lambda: ear.readline().decode().rstrip(), "")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return status, headers, ear.read(int(headers["content-length"]))


def ends(ear: BinaryIO) -> bool:
    """Whether nothing more comes, and the other side has hung up."""
    try:
        return ear.read(1) == b""
    except ConnectionResetError:  # it did not read all that was sent
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


def as_sent(windows: Readings) -> bytes:
    """Return the bytes of a request of the Open Inference Protocol."""
    body, headers = binary(windows)
    lines = [f"POST {INFER} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body
