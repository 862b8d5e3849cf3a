"""Count the Python frames of one stored prediction, one anonymous prediction and one flight in a serving process.

python -m docs.trace            print the table; exit with 1 if a target is exceeded (= make trace)
python -m docs.trace --calls    also print the sequence of calls of each request, one line per change of module

The command `serve` runs in a child process with the bundled model and a temporary SQLite database. A profile function
in each of its threads records the calls of functions under service/ and model/ while one request is handled:

* A frame is entered with each `call` event: a call of a function, or a resumption of a generator or coroutine.
* A module change is a frame whose module differs from that of the frame entered before it. Returns do not count.
* A thread change is a frame in another thread than the frame entered before it.
* Python 3.11 enters a frame for each comprehension. Python 3.12 and later inline comprehensions and enter fewer frames.

Each request has its own connection, and its head and body arrive separately, as Python's http.client sends them. The
stored prediction repeats engine and cycle. The last row is the same request with the next cycle in each request.

Requests before the measured ones warm the process up. Of the measured requests the table shows the one with the median
number of frames. Background tasks are rarely in one of them, because each is recorded for about 50 ms.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parent.parent
TRACED = ("service", "model")
WARM_UP, MEASURED = 40, 9  # requests
PAUSE_SECONDS = 0.003  # between head and body, so that the server reads them separately
SETTLE_SECONDS = 0.05  # after the response: the log line and the release of buffers belong to the request
START_SECONDS = 60


class Call(NamedTuple):
    """One frame that was entered."""

    thread: str
    module: str
    function: str


class Measure(NamedTuple):
    """The counts of one request, or the targets for them."""

    frames: int
    modules: int
    module_changes: int
    functions: int = 0
    thread_changes: int = 0


TARGETS = {  # a kind of request without a target is shown but not checked
    "stored prediction": Measure(200, 22, 80),
    "anonymous prediction": Measure(140, 18, 55),
    "flight": Measure(190, 22, 75),
}


def measure(calls: list[Call]) -> Measure:
    """Count frames, modules, module changes, distinct functions and thread changes."""
    pairs = list(itertools.pairwise(calls))
    return Measure(
        len(calls),
        len({call.module for call in calls}),
        sum(before.module != after.module for before, after in pairs),
        len({call[1:] for call in calls}),
        sum(before.thread != after.thread for before, after in pairs),
    )


def serve(port: int) -> None:
    """Run the service, and record calls between the commands `start` and `stop` on standard input."""
    recorded: list[Call] | None = None
    modules: dict[str, str | None] = {}

    def module_of(path: str) -> str | None:
        try:
            relative = Path(path).relative_to(ROOT)
        except ValueError:
            return None
        return ".".join(relative.with_suffix("").parts) if relative.parts[0] in TRACED else None

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and recorded is not None:
            path = frame.f_code.co_filename
            if path not in modules:
                modules[path] = module_of(path)
            module = modules[path]
            if module is not None:
                recorded.append(Call(threading.current_thread().name, module, frame.f_code.co_qualname))

    def control() -> None:
        nonlocal recorded
        for command in sys.stdin:
            if command == "start\n":
                recorded = []
                calls: list[Call] = []
            else:
                calls, recorded = recorded or [], None
            print(json.dumps(calls), flush=True)

    threading.Thread(target=control, daemon=True).start()  # before the profile function is installed: not recorded
    threading.setprofile(profile)
    sys.setprofile(profile)
    from service.cli import main as run_command

    sys.exit(run_command(["serve", "--port", str(port)]))


class Server:
    """The child process, one connection to it, and the recorder in it."""

    def __init__(self, port: int, control: tuple[IO[str], IO[str]]) -> None:
        self._address, self._control = ("127.0.0.1", port), control
        self._connection: socket.socket | None = None

    def wait(self, process: subprocess.Popen[str]) -> None:
        """Wait until the service is ready."""
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if self.send(b"GET /readyz HTTP/1.1\r\nHost: trace\r\n\r\n")[0] == 200:
                    return
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"trace: the service was not ready within {START_SECONDS} s")
            time.sleep(0.1)

    def send(self, *pieces: bytes) -> tuple[int, bytes]:
        """Send a request on a new connection, keep it open, and return status and body of the response."""
        self.close()
        self._connection = socket.create_connection(self._address, START_SECONDS)
        for piece in pieces:
            self._connection.sendall(piece)
            time.sleep(PAUSE_SECONDS)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, body = received.partition(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self._receive()
        return int(head.split()[1]), body

    def close(self) -> None:
        """Close the connection, if one is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def post(self, path: str, document: Any) -> None:
        """Send a JSON document, which must be accepted."""
        body = json.dumps(document).encode()
        headers = f"Host: trace\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        status, response = self.send(f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode(), body)
        if status != 200:
            raise SystemExit(f"trace: {path} returned {status}: {response.decode()[:200]}")

    def record(self, path: str, document: Any) -> list[Call]:
        """Send a JSON document and return the calls that it caused."""
        self.close()
        time.sleep(SETTLE_SECONDS)  # the server notices that the connection before is closed
        self._command("start")
        self.post(path, document)
        time.sleep(SETTLE_SECONDS)
        return [Call(*call) for call in self._command("stop")]

    def _command(self, command: str) -> Any:
        commands, recordings = self._control
        commands.write(command + "\n")
        commands.flush()
        return json.loads(recordings.readline())

    def _receive(self) -> bytes:
        assert self._connection
        received = self._connection.recv(65536)
        if not received:
            raise ConnectionResetError("the service closed the connection")
        return received


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start the service in a child process that records calls."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="engine-health-trace-") as folder:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ENGINE_HEALTH_")}
        environment |= {
            "ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{folder}/trace.db",
            "ENGINE_HEALTH_DRAIN_SECONDS": "0",
        }
        command = [sys.executable, "-m", "docs.trace", "--serve", str(port)]
        pipe = subprocess.PIPE
        log = Path(folder, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True
            )
        assert process.stdin
        assert process.stdout
        server = Server(port, (process.stdin, process.stdout))
        try:
            server.wait(process)
            yield server
        finally:
            server.close()
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdin.close()
            process.stdout.close()


def requests(window: list[list[float]]) -> dict[str, tuple[str, Iterator[Any]]]:
    """Return path and successive documents of each kind of request."""
    count, length = itertools.count, len(window)

    def instance(**stored: Any) -> dict[str, Any]:
        return {"instances": [{**stored, "telemetry": window}]}

    def flight(cycle: int) -> dict[str, Any]:
        return {"cycles": [{"engine_id": "flown", "cycle": cycle, "telemetry": window[cycle % length]}]}

    return {
        "stored prediction": ("/v1/predict", itertools.repeat(instance(engine_id="repeated", cycle=length))),
        "anonymous prediction": ("/v1/predict", itertools.repeat(instance())),
        "flight": ("/v1/cycles", map(flight, count(1))),
        "stored prediction, next cycle": (
            "/v1/predict",
            (instance(engine_id="advancing", cycle=cycle) for cycle in count(length)),
        ),
    }


def recorded(warm_up: int = WARM_UP, measured: int = MEASURED) -> dict[str, list[Call]]:
    """Return the calls of one request of each kind: of several, the one with the median number of frames."""
    from model.evaluation.evaluate import ARTEFACT, open_artefact

    window = [[float(value) for value in row] for row in open_artefact(ARTEFACT)[1].golden[0].telemetry]
    medians = {}
    with serving() as server:
        for kind, (path, documents) in requests(window).items():
            for _ in range(warm_up):
                server.post(path, next(documents))
            traces = sorted((server.record(path, next(documents)) for _ in range(measured)), key=len)
            medians[kind] = traces[measured // 2]
    return medians


def table(measures: dict[str, Measure]) -> Iterator[str]:
    """Yield one line per kind of request: each count, and its target if it has one."""
    yield "| request | frames | modules | module changes | distinct functions | thread changes |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for kind, counts in measures.items():
        limits = TARGETS.get(kind)
        cells = [f"{count} (<= {limits[k]})" if limits else str(count) for k, count in enumerate(counts[:3])]
        yield f"| {kind} | {' | '.join(cells)} | {counts.functions} | {counts.thread_changes} |"


def exceeded(measures: dict[str, Measure]) -> list[str]:
    """Return each count that is above its target."""
    return [
        f"{kind}: {count} {name.replace('_', ' ')}, target <= {limit}"
        for kind, counts in measures.items()
        if kind in TARGETS
        for name, count, limit in list(zip(Measure._fields, counts, TARGETS[kind], strict=True))[:3]
        if count > limit
    ]


def sequence(calls: list[Call]) -> Iterator[str]:
    """Yield one line per change of module or thread: thread, module, and the functions entered there in order."""
    line: list[str] = []
    before: Call | None = None
    for call in calls:
        if before is None or before[:2] != call[:2]:
            if line:
                yield " ".join(line)
            line = [f"[{call.thread}]", f"{call.module}:"]
        line.append(call.function)
        before = call
    yield " ".join(line)


def main() -> None:
    """Print the table, and compare it with the targets."""
    parser = argparse.ArgumentParser(description="Count the frames of one request of each kind.")
    parser.add_argument("--calls", action="store_true", help="also print the sequence of calls")
    parser.add_argument("--serve", type=int, metavar="PORT", help="run the recorded service (internal)")
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve)
    traces = recorded()
    if flags.calls:
        for kind, calls in traces.items():
            print(f"{kind}:", *sequence(calls), "", sep="\n")
    measures = {kind: measure(calls) for kind, calls in traces.items()}
    print(*table(measures), sep="\n")
    above = exceeded(measures)
    if above:
        raise SystemExit("\n".join(("trace: above the targets", *above)))


if __name__ == "__main__":
    main()
