"""Bodies that are too large, too many, in tiny chunks or compressed: each is rejected, and its memory is released."""

import asyncio
import gzip
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from itertools import repeat

from benchmarks import load
from benchmarks.endurance.client import Connection, ask_once, request
from benchmarks.endurance.stage import MIB, PREDICT, Line, Running, service

MAX_BODY_BYTES = 32 * MIB  # the default of ENGINE_HEALTH_MAX_BODY_BYTES
BUFFER = 256 * MIB  # the default of ENGINE_HEALTH_MAX_BUFFERED_BYTES
TIMES, WARM, AT_ONCE = 100, 10, 4
GROWTH_MIB = 5.0
CHUNKS = 1_000_000
CROWD = 64
HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
Ask = Callable[[int], Awaitable[int]]


def lines() -> Iterator[Line]:
    """Yield one line per kind of body, each sent 100 times, then one for many large bodies in parallel."""
    with service() as running:
        large = request(PREDICT, b" " * (MAX_BODY_BYTES + 1), load.JSON_HEADERS)
        packed = gzip.compress(b"[" + b" " * (200 * MIB), 1)
        bomb = request(PREDICT, packed, {**load.JSON_HEADERS, "Content-Encoding": "gzip"})
        yield repeated(
            running, "of one byte over the limit, with Content-Length", 413, lambda port: _send_whole(port, large)
        )
        yield repeated(running, "over the limit, in chunks of 64 KiB", 413, _send_large_chunks)
        yield repeated(running, "of 1,000,000 chunks of 1 byte", 400, _send_tiny_chunks)
        yield repeated(
            running, f"of 200 MiB gzipped to {len(packed) / MIB:.1f} MiB", 413, lambda port: _send_whole(port, bomb)
        )
    yield crowd()


def repeated(running: Running, description: str, status: int, ask: Ask) -> Line:
    """Send a kind of body 10 times to warm up and then 100 times."""
    asyncio.run(_send_repeatedly(running.port, ask, WARM))
    before, begun = running.settled_memory(), time.perf_counter()
    statuses = asyncio.run(_send_repeatedly(running.port, ask, TIMES))
    seconds, growth = time.perf_counter() - begun, running.settled_memory() - before
    passed = statuses == {status: TIMES} and growth < GROWTH_MIB and running.alive()
    return Line(
        f"{TIMES} bodies {description}",
        f"{dict(statuses)}, memory {growth:+.1f} MiB, {seconds / TIMES:.2f} s each",
        f"every client receives {status}; memory grows by less than {GROWTH_MIB:g} MiB",
        passed,
        {"statuses": dict(statuses), "growth_mib": growth, "seconds": seconds},
    )


def crowd() -> Line:
    """Send many large bodies in parallel, together larger than the body budget."""
    with service() as running:
        body = b'{"instances": [' + b" " * (30 * MIB) + b"]}"
        request_bytes = request(PREDICT, body, load.JSON_HEADERS)
        running.forget_peak()
        before = running.memory()
        statuses = asyncio.run(
            _send_repeatedly(running.port, lambda port: _send_whole(port, request_bytes), CROWD, CROWD)
        )
        peak, alive = running.memory("VmHWM") - before, running.alive()
    bound = 1.5 * BUFFER / MIB
    return Line(
        f"{CROWD} bodies of 30 MiB in parallel, 1.9 GiB in total",
        f"{dict(statuses)}; peak {peak:.0f} MiB above the start",
        f"422 or 429; at most {bound:.0f} MiB, 1.5 times the body budget of 256 MiB",
        set(statuses) <= {422, 429} and peak <= bound and alive,
        {"statuses": dict(statuses), "peak_mib": peak},
    )


async def _send_repeatedly(port: int, ask: Ask, times: int, at_once: int = AT_ONCE) -> Counter[int | str]:
    statuses: Counter[int | str] = Counter()
    remaining = iter(repeat(None, times))

    async def send_remaining() -> None:
        for _ in remaining:
            try:
                statuses[await ask(port)] += 1
            except (OSError, TimeoutError) as error:
                statuses[type(error).__name__] += 1

    await asyncio.gather(*(send_remaining() for _ in range(at_once)))
    return statuses


async def _send_whole(port: int, request_bytes: bytes) -> int:
    return (await ask_once(port, request_bytes)).status


async def _send_large_chunks(port: int) -> int:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    return await _send_pieces(port, repeat(piece, MAX_BODY_BYTES // 0x10000 + 1))


async def _send_tiny_chunks(port: int) -> int:
    return await _send_pieces(port, repeat(b"1\r\n[\r\n" * 10_000, CHUNKS // 10_000))


async def _send_pieces(port: int, pieces: Iterator[bytes]) -> int:
    """Send a chunked body. The pieces are already framed as chunks."""
    connection = await Connection.to(port)
    connection.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    try:
        for piece in pieces:
            connection.send(piece)
            await asyncio.sleep(0)
        return (await connection.ask(b"0\r\n\r\n")).status
    finally:
        connection.close()
