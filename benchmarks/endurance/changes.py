"""Changes under load: model reloads, killed workers and shutdown. Requests must not fail because of them."""

import asyncio
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.endurance.client import Answer, Connection, ask_once, request
from benchmarks.endurance.stage import PREDICT, Line, Running, say, service, windows_binary, windows_json
from tests.support.models import edited

RELOADS, KILLS, RESTARTS, IN_FLIGHT = 500, 20, 100, 200
RELOAD_MIB = 0.1  # per reload; fragmentation of the allocator, much less than the 8 MiB of a model
KILL_SECONDS = 5.0  # between two kills, enough to replace a worker
SILENCE_SECONDS = 2.0
STOP_SECONDS = 30.0


def reloads() -> Iterator[Line]:
    """Load two artefacts of different temperature alternately, while small and large requests are sent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        contents = [edited(Path(folder, f"{t}"), {"temperature": t}).read_bytes() for t in (1.5, 2.5)]
        path.write_bytes(contents[0])
        with service(model=path, admin_keys="wheel") as running:
            yield asyncio.run(_measure_reloads(running, path, contents))


async def _measure_reloads(running: Running, path: Path, contents: list[bytes]) -> Line:
    load = request("/v2/repository/models/engine-health/load", headers={"Authorization": "Bearer wheel"})
    temperatures: dict[str, float] = {}
    response_counts: Counter[tuple[object, ...]] = Counter()
    stop = asyncio.Event()

    async def ask(request_bytes: bytes) -> None:
        connection = await Connection.to(running.port)
        while not stop.is_set():
            try:
                answer = await connection.ask(request_bytes)
                response_counts[_identify_response(answer)] += 1
            except (OSError, TimeoutError) as error:
                response_counts[(type(error).__name__,)] += 1
                connection = await Connection.to(running.port)

    asking = [asyncio.create_task(ask(windows_json(n))) for n in (1, 1, 64, 100)]
    admin, memory, slowest = await Connection.to(running.port), [], 0.0
    for k in range(RELOADS):
        replacement = path.with_suffix(".next")
        replacement.write_bytes(contents[(k + 1) % 2])
        os.replace(replacement, path)
        answer = await admin.ask(load)
        slowest = max(slowest, answer.seconds)
        temperatures[json.loads(answer.body)["digest"]] = (2.5, 1.5)[k % 2]
        memory.append(running.memory())
    stop.set()
    await asyncio.gather(*asking)
    answered = sum(n for (status, *_), n in response_counts.items() if status == 200)
    fitting = all(key[0] == 200 and temperatures.get(str(key[1])) == key[2] for key in response_counts)
    half = RELOADS // 2
    growth = (sum(memory[-10:]) - sum(memory[half : half + 10])) / 10
    return Line(
        f"{RELOADS} reloads of two alternating models under load",
        f"{answered} answered, {sum(response_counts.values()) - answered} not; {len(temperatures)} digests, each with "
        f"its temperature; memory over the last {half} reloads {growth:+.1f} MiB; slowest reload {slowest:.1f} s",
        f"no failure; one digest per response, with its temperature; less than {RELOAD_MIB:g} MiB per reload",
        fitting and len(temperatures) == 2 and growth < RELOAD_MIB * half,
        {
            "seen": {str(k): n for k, n in response_counts.items()},
            "growth_mib": growth,
            "slowest": slowest,
            "memory": memory[::10],
        },
    )


def _identify_response(answer: Answer) -> tuple[object, ...]:
    if answer.status != 200:
        return (answer.status, answer.body[:200])
    response: dict[str, Any] = json.loads(answer.body)
    return (200, response["model"]["digest"], response["temperature"])


def kills() -> Iterator[Line]:
    """Kill workers under load, then kill each new worker immediately."""
    with service(workers=2) as running:
        folder = _find_shared_folder(running)
        yield asyncio.run(_measure_kills(running))
        yield _measure_restarts(running, folder)


async def _measure_kills(running: Running) -> Line:
    request_bytes = windows_json(1)
    statuses: Counter[object] = Counter()
    last, silence = time.monotonic(), 0.0
    stop = asyncio.Event()

    async def ask() -> None:
        nonlocal last, silence
        while not stop.is_set():
            try:
                statuses[(await ask_once(running.port, request_bytes)).status] += 1
                silence, last = max(silence, time.monotonic() - last), time.monotonic()
            except (OSError, TimeoutError) as error:
                statuses[type(error).__name__] += 1

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    for k in range(KILLS):
        await asyncio.sleep(KILL_SECONDS)
        workers = running.workers()
        os.kill(workers[k % len(workers)], signal.SIGKILL)
    await asyncio.sleep(KILL_SECONDS)
    stop.set()
    await asyncio.gather(*asking)
    counted = running.counted()
    name = f'engine_health_http_requests_total{{method="POST",route="{PREDICT}",status="200"}}'
    answered, cut, total = statuses[200], statuses["ConnectionResetError"], round(counted[name])
    rows = round(counted["engine_health_confidence_count"])
    return Line(
        f"{KILLS} x kill -9 of one of two workers, 8 clients on new connections",
        f"{answered} answered, {cut} reset, {format_other_statuses(statuses)}; {total} counted as answered, "
        f"{rows} predictions; longest time without a response {silence:.1f} s",
        "answered ≤ counted ≤ answered + reset, for requests and predictions; no other failure; "
        f"less than {SILENCE_SECONDS:g} s without a response",
        answered <= total <= rows <= answered + cut
        and set(statuses) <= {200, "ConnectionResetError"}
        and silence < SILENCE_SECONDS,
        {"answered": answered, "cut": cut, "counted": total, "predictions": rows, "silence": silence},
    )


def format_other_statuses(statuses: Counter[object]) -> str:
    """Format the responses other than 200 and reset connections."""
    other = {str(key): n for key, n in statuses.items() if key not in (200, "ConnectionResetError")}
    return f"others {other}" if other else "no other response"


def _measure_restarts(running: Running, folder: Path) -> Line:
    before, begun = sorted(path.name for path in folder.glob("*.db")), time.monotonic()
    for k in range(RESTARTS):
        victim = running.workers()[k % 2]
        os.kill(victim, signal.SIGKILL)
        while victim in (now := running.workers()) or len(now) < 2:
            time.sleep(0.05)
    seconds = (time.monotonic() - begun) / RESTARTS
    time.sleep(KILL_SECONDS)
    after = sorted(path.name for path in folder.glob("*.db"))
    kinds = {name.rpartition("_")[0] for name in after}
    slots = {name.rpartition("_")[2] for name in after}
    alive = asyncio.run(ask_once(running.port, windows_json(1))).status == 200
    return Line(
        f"{RESTARTS} more kills, each as soon as the previous worker is replaced",
        f"{len(after)} counter files, {len(before)} before: {len(kinds)} kinds, {len(slots)} workers; a worker is "
        f"replaced in {seconds:.1f} s",
        "at most one file per worker and kind",
        len(slots) <= 2 and alive,
        {"files": after, "seconds_each": seconds},
    )


def _find_shared_folder(running: Running) -> Path:
    """Return the folder with the files that the workers share."""
    for worker in running.workers():
        for link in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(OSError):
                if "slot-" in (target := os.readlink(link)):
                    return Path(target).parent
    raise FileNotFoundError("no worker has an open slot file")


def stop() -> Iterator[Line]:
    """Send SIGTERM while 200 requests are in flight, which take longer than the drain time."""
    limits: dict[str, object] = {"max_queue_rows": 200_000, "max_queue_seconds": 600, "max_buffered_bytes": 2**30}
    with service(None, **limits) as running:
        yield asyncio.run(_measure_stop(running))


async def _measure_stop(running: Running) -> Line:
    request_bytes = windows_binary(256)
    stopping = asyncio.Event()
    late: Counter[object] = Counter()

    async def ask() -> None:
        connection = await Connection.to(running.port)
        while True:
            try:
                status: object = (await connection.ask(request_bytes)).status
            except (OSError, TimeoutError) as error:
                status = type(error).__name__
            if stopping.is_set():
                late[status] += 1
                return

    asking = [asyncio.create_task(ask()) for _ in range(IN_FLIGHT)]
    await asyncio.sleep(3)
    stopping.set()
    begun = time.monotonic()
    code = asyncio.create_task(asyncio.to_thread(running.stopped, STOP_SECONDS))
    await asyncio.gather(*asking)
    answered = time.monotonic() - begun
    exit_code = await code
    say(f"all answered after {answered:.1f} s, ended after {time.monotonic() - begun:.1f} s")
    return Line(
        f"SIGTERM with {IN_FLIGHT} requests of 256 windows in flight",
        f"{late[200]} answered, {format_other_statuses(late)}, the last {answered:.1f} s later; exit code {exit_code}",
        "all answered, exit code 0",
        late[200] == IN_FLIGHT and exit_code == 0,
        {"answered": late[200], "seconds": answered, "exit_code": exit_code},
    )
