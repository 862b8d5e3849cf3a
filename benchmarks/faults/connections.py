"""Faults of clients: idle connections, one byte per second, half-closed sockets."""

import socket
import time

from benchmarks.endurance.client import HOST
from benchmarks.endurance.stage import Running, windows_json
from benchmarks.faults.collector import FaultReport, Outcome, observed
from benchmarks.faults.processes import remembering

LEFT, SLOW, HALF = 1000, 200, 500
REQUEST_SECONDS = 5.0  # shorter than the default, so that the timeout is observed
HEARD_SECONDS = 30.0


def left() -> Outcome:
    """Open connections and send nothing."""
    return _hold_connections(LEFT, b"", b"")


def slow() -> Outcome:
    """Send request headers at 1 byte per second, without an end."""
    return _hold_connections(SLOW, b"POST /v1/predict HTTP/1.1\r\nX-Slow: ", b"x")


def _hold_connections(number: int, first: bytes, then: bytes) -> Outcome:
    with remembering(request_seconds=REQUEST_SECONDS) as running:

        def fault() -> FaultReport:
            before, begun = running.descriptors(), time.monotonic()
            held = [socket.create_connection((HOST, running.port)) for _ in range(number)]
            for connection in held:
                connection.sendall(first)
            time.sleep(2)  # until they are accepted
            opened = running.descriptors() - before
            while running.descriptors() > before and time.monotonic() < begun + HEARD_SECONDS:
                time.sleep(1)
                for connection in held:
                    try:
                        connection.sendall(then)
                    except OSError:  # closed by the service, as required
                        continue
            remaining, seconds = max(0, running.descriptors() - before), time.monotonic() - begun
            for connection in held:
                connection.close()
            description = f"{opened} held, {remaining} left after {seconds:.0f} s (limit {REQUEST_SECONDS:g} s)"
            return FaultReport(description, opened > 0.9 * number and remaining == 0)

        return observed(running.port, fault)


def half_closed() -> Outcome:
    """Half-close sockets after a complete request (half of them) or within a request (the others)."""
    with remembering() as running:

        def fault() -> FaultReport:
            before, request_bytes = running.descriptors(), windows_json(1)
            whole, torn = (
                [_send_and_half_close(running, request_bytes[:end]) for _ in range(HALF // 2)] for end in (None, -1)
            )
            answered = sum(_receive_all(connection).startswith(b"HTTP/1.1 200 ") for connection in whole)
            refused = sum(not _receive_all(connection).startswith(b"HTTP/1.1 200 ") for connection in torn)
            time.sleep(1)
            remaining = max(0, running.descriptors() - before)
            truncated = f"{len(torn) - refused} of {len(torn)} truncated ones"
            answered_text = f"{answered} of {len(whole)} whole requests answered, {truncated}"
            return FaultReport(f"{answered_text}; {remaining} left open", refused == len(torn) and remaining == 0)

        return observed(running.port, fault)


def _send_and_half_close(running: Running, data: bytes) -> socket.socket:
    connection = socket.create_connection((HOST, running.port), timeout=HEARD_SECONDS)
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)
    return connection


def _receive_all(connection: socket.socket) -> bytes:
    """Return all bytes until the other side closes."""
    received = b""
    with connection:
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except OSError:  # reset or timeout
            pass
    return received
