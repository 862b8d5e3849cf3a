"""Faults of whoever connects: leaves connections open, sends a byte a second, closes half of a socket."""

import socket
import time

from benchmarks.endurance.client import HOST
from benchmarks.endurance.stage import Running, windows_json
from benchmarks.faults.collector import Outcome, Seen, observed
from benchmarks.faults.processes import remembering

LEFT, SLOW, HALF = 1000, 200, 500
REQUEST_SECONDS = 5.0  # the limit, shorter than shipped so that its end is seen
HEARD_SECONDS = 30.0


def left() -> Outcome:
    """Connections on which nothing is ever sent."""
    return _with(LEFT, b"", b"")


def slow() -> Outcome:
    """A request of which a byte comes each second: headers that do not end."""
    return _with(SLOW, b"POST /v1/predict HTTP/1.1\r\nX-Slow: ", b"x")


def _with(number: int, first: bytes, then: bytes) -> Outcome:
    with remembering(request_seconds=REQUEST_SECONDS) as running:

        def fault() -> Seen:
            before, begun = running.descriptors(), time.monotonic()
            held = [socket.create_connection((HOST, running.port)) for _ in range(number)]
            for one in held:
                one.sendall(first)
            time.sleep(2)  # until they are accepted
            most = running.descriptors() - before
            while running.descriptors() > before and time.monotonic() < begun + HEARD_SECONDS:
                time.sleep(1)
                for one in held:
                    try:
                        one.sendall(then)
                    except OSError:  # hung up, as it should be
                        continue
            rest, seconds = max(0, running.descriptors() - before), time.monotonic() - begun
            for one in held:
                one.close()
            said = f"{most} held, {rest} left after {seconds:.0f} s (limit {REQUEST_SECONDS:g} s)"
            return Seen(said, most > 0.9 * number and rest == 0)

        return observed(running.port, fault)


def half_closed() -> Outcome:
    """Half of them ask whole requests and then close what they send through; the others do so amid a request."""
    with remembering() as running:

        def fault() -> Seen:
            before, asked = running.descriptors(), windows_json(1)
            whole, torn = ([_sent(running, asked[:end]) for _ in range(HALF // 2)] for end in (None, -1))
            answered = sum(_heard(one).startswith(b"HTTP/1.1 200 ") for one in whole)
            refused = sum(not _heard(one).startswith(b"HTTP/1.1 200 ") for one in torn)
            time.sleep(1)
            rest = max(0, running.descriptors() - before)
            both = f"{answered} of {len(whole)} whole requests answered, {len(torn) - refused} of {len(torn)} torn ones"
            return Seen(f"{both}; {rest} left open", refused == len(torn) and rest == 0)

        return observed(running.port, fault)


def _sent(running: Running, data: bytes) -> socket.socket:
    one = socket.create_connection((HOST, running.port), timeout=HEARD_SECONDS)
    one.sendall(data)
    one.shutdown(socket.SHUT_WR)
    return one


def _heard(one: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    heard = b""
    with one:
        try:
            while more := one.recv(65536):
                heard += more
        except OSError:  # reset, or nothing in time
            pass
    return heard
