"""Load on a server: start it on one core, send bodies with wrk from another core, take medians of alternating rounds.

Contains the encodings of windows. Independent of the servers and the tables.
Cases alternate (A B C A B C ...), so that other load on the machine affects all of them.
"""

import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model import contract
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.windows import Readings

SERVER_CORE, CLIENT_CORE = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
JSON_HEADERS = {"Content-Type": "application/json"}
MARK = "BENCHMARK_SERVER"  # environment variable by which the child processes of a server are found and stopped
START_SECONDS, STOP_SECONDS, REQUEST_SECONDS = 120, 10, 60
LIBRARIES = ("onnxruntime", "numpy", "fastapi", "uvicorn", "httptools", "uvloop", "orjson", "msgspec")
ENGINE, CYCLE = b"@engine@", b"@cycle@"  # placeholders in a body: engines alternate, and the cycle rises each round
ENGINES = 1000
SCRIPT = """
wrk.method = "POST"
wrk.body = io.open({body}, "rb"):read("*a")
{headers}
local head, middle, tail = wrk.body:match("^(.-){engine}(.-){cycle}(.*)$")
if head then
  local n = -1
  request = function()
    n = n + 1
    local engine, cycle = n % {engines}, math.floor(n / {engines})
    return wrk.format(nil, nil, nil, head .. engine .. middle .. cycle .. tail)
  end
end
function done(summary, latency)
  local e = summary.errors
  print(string.format("measured %d %d %d %d %d", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.timeout + e.status))
end
"""  # microseconds


class ServerFailed(Exception):
    """A server that did not become ready. The message ends with its last log lines."""


@dataclass(frozen=True)
class Load:
    """Result of wrk. `errors` counts responses with status 400 and above, timeouts and broken connections."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    errors: int


class Figure(NamedTuple):
    """A figure over rounds."""

    median: float
    lowest: float
    highest: float


def free_port() -> int:
    """Return a TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(command: list[str], env: Mapping[str, str], core: int | str, ready_url: str, cwd: Path) -> Iterator[int]:
    """Run a server on one or more cores within the block, and yield its process id.

    Args:
        command: starts the server in the foreground.
        env: added to the environment of this process.
        core: the core of the server and its children, or several in the syntax of `taskset`.
        ready_url: returns 200 when the server accepts requests.
        cwd: working directory of the server.

    Raises:
        ServerFailed: the server ended, or was not ready within 2 min.
    """
    mark = uuid.uuid4().hex
    with tempfile.NamedTemporaryFile(prefix="server-", suffix=".log") as log:
        pinned = ["taskset", "-c", str(core), *command]
        environment = {**os.environ, **env, MARK: mark}
        server = subprocess.Popen(
            pinned, env=environment, cwd=cwd, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _wait_ready(server, ready_url, Path(log.name))
            yield server.pid
        finally:
            _stop_server(server, mark)


def _wait_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if get(url)[0] == 200:
                return
        except OSError:
            pass  # the server does not listen yet
        time.sleep(0.1)
    failure = f"not ready within {START_SECONDS} s" if server.poll() is None else f"exit code {server.returncode}"
    raise ServerFailed(f"{failure}: {log.read_text(errors='replace')[-2000:].strip()}")


def _stop_server(server: subprocess.Popen[bytes], mark: str) -> None:
    """Send SIGTERM to the process group, then SIGKILL to all processes with the mark: daemons leave the group."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    needle = f"{MARK}={mark}".encode()
    while remaining := [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if needle in _read_environment(pid)
    ]:
        for pid in remaining:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    server.wait()


def _read_environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # the process ended, or belongs to another user
        return b""


def get(url: str) -> tuple[int, bytes]:
    """Return status and body of a GET request."""
    return _send_request(urllib.request.Request(url))


def post(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Return status and body of a POST request."""
    return _send_request(urllib.request.Request(url, body, dict(headers)))


def _send_request(request: urllib.request.Request) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read()


def wrk(url: str, body: bytes, headers: Mapping[str, str], connections: int, seconds: float, core: int | str) -> Load:
    """Run one round of load from one thread on one core; each connection sends its next request after a response.

    For a large body (1,000 windows), use one or two connections and a time of at least ten requests.
    """
    if not shutil.which("wrk"):
        raise FileNotFoundError("wrk is not installed (Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory() as folder:
        content, script = Path(folder, "body"), Path(folder, "post.lua")
        content.write_bytes(body)
        lines = (f"wrk.headers[{json.dumps(key)}] = {json.dumps(value)}" for key, value in headers.items())
        marks = {"engine": ENGINE.decode(), "cycle": CYCLE.decode(), "engines": ENGINES}
        script.write_text(SCRIPT.format(body=json.dumps(str(content)), headers="\n".join(lines), **marks))
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={REQUEST_SECONDS}s"]
        command = ["taskset", "-c", str(core), "wrk", *options, "-s", str(script), url]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured = next(line for line in printed.splitlines() if line.startswith("measured ")).split()[1:]
    requests, duration, p50, p99, errors = map(int, measured)
    return Load(requests / duration * 1e6, p50 / 1e3, p99 / 1e3, errors)


def median_rounds(cases: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, dict[str, Figure]]:
    """Run the cases alternately, once per round; return median, lowest and highest of every figure."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            for figure, value in case().items():
                taken[name].setdefault(figure, []).append(value)
    return {
        name: {figure: Figure(statistics.median(v), min(v), max(v)) for figure, v in figures.items()}
        for name, figures in taken.items()
    }


@cache
def golden() -> tuple[Readings, Readings]:
    """Return the artefact's golden windows (N, 100, 17) and their logits (N, C)."""
    golden_windows = open_artefact(ARTEFACT)[1].golden
    return np.array([g.telemetry for g in golden_windows]), np.array([g.logits for g in golden_windows])


def windows(n: int) -> Readings:
    """Return windows (n, 100, 17): golden ones with 0.1 % noise on each reading and three decimals, as from sensors."""
    random, telemetry = np.random.default_rng(0), golden()[0]
    picked = telemetry[np.arange(n) % len(telemetry)]
    return np.round(picked * (1 + 1e-3 * random.standard_normal(picked.shape)), 3)


def predict_json(telemetry: Readings) -> bytes:
    """Return the body of `POST /v1/predict`."""
    return json.dumps({"instances": [{"telemetry": window} for window in telemetry.tolist()]}).encode()


def predict_arrow(telemetry: Readings) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of the same request as an Arrow stream, one window per engine."""
    import pyarrow as pa

    rows = telemetry.reshape(-1, telemetry.shape[-1]).astype(np.float32)
    table = pa.table({name: pa.array(rows[:, k]) for k, name in enumerate(contract.CHANNELS)})
    engine, cycle = np.divmod(np.arange(len(rows)), telemetry.shape[1])
    table = table.append_column("engine_id", pa.array([f"FD001-{k}" for k in engine]))
    table, sink = table.append_column("cycle", pa.array(cycle)), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes(), {"Content-Type": "application/vnd.apache.arrow.stream"}


def of_engines(telemetry: Readings) -> bytes:
    """Return the body of `POST /v1/predict` for one window of an engine; engine and cycle differ in every request."""
    body = json.dumps(
        {"instances": [{"engine_id": _name_engine(), "cycle": CYCLE.decode(), "telemetry": telemetry[0].tolist()}]}
    )
    return body.encode().replace(b'"' + CYCLE + b'"', CYCLE)


def flights(telemetry: Readings) -> bytes:
    """Return the body of `POST /v1/cycles` for one flight of an engine; engine and cycle differ in every request."""
    body = json.dumps(
        {"cycles": [{"engine_id": _name_engine(), "cycle": CYCLE.decode(), "telemetry": telemetry[0, 0].tolist()}]}
    )
    return body.encode().replace(b'"' + CYCLE + b'"', CYCLE)


def _name_engine() -> str:
    """Return a name that is unique to the round, with the mark that wrk replaces in every request."""
    return f"{uuid.uuid4().hex[:8]}-{ENGINE.decode()}"


def oip_json(telemetry: Readings) -> bytes:
    """Return an Open Inference Protocol request for logits and RUL, with values in JSON."""
    return json.dumps(_build_oip_request(telemetry, {"data": telemetry.ravel().tolist()}, {})).encode()


def oip_binary(telemetry: Readings) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of the same request with binary tensors in both directions."""
    values = telemetry.astype("<f4").tobytes()
    head = json.dumps(
        _build_oip_request(telemetry, {"parameters": {"binary_data_size": len(values)}}, {"binary_data": True})
    ).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return head + values, headers


def _build_oip_request(
    telemetry: Readings, content: dict[str, object], parameters: dict[str, object]
) -> dict[str, object]:
    tensor = {"name": contract.INPUT, "shape": list(telemetry.shape), "datatype": "FP32"}
    outputs = [{"name": name, "parameters": parameters} for name in (contract.LOGITS, contract.RUL)]
    return {"inputs": [tensor | content], "outputs": outputs}


def machine() -> str:
    """Return the machine, Python and the libraries in one line."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{next(iter(models), platform.machine())}, {os.cpu_count()} cores; {python}; {versions}"
