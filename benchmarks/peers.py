"""The same artefact behind other servers, on the same core and with the same requests: one table.

    python -m benchmarks.peers [--only NAME,...] [--rounds 5] [--seconds 5]      # = make bench-peers

Each server is installed into a separate virtual environment below build/peers, in the versions given here. It starts
from a script in benchmarks/servers, which follows its documentation, with batching. All processes of a server share one
core; wrk has the other. Before the measurement, a server must return the golden logits of a golden window. If it cannot
be installed or started, or returns other logits, its line states the reason.
Figures are medians over rounds. Servers are started again for each round. The figures are written to build/peers.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import load
from benchmarks.load import CLIENT_CORE, JSON_HEADERS, SERVER_CORE, Figure, ServerFailed
from model.evaluation.evaluate import ARTEFACT
from model.windows import Readings

ROOT = Path(__file__).parent.parent
SERVERS, BUILD = ROOT / "benchmarks" / "servers", ROOT / "build"
CONNECTIONS, ROWS = 64, 1000
TOLERANCE = 1e-3  # of logits; allows rounded responses
ORT = "onnxruntime==1.32.0"
DEBIAN_PYTHON = "/usr/bin/python3.11"  # Triton's interpreter is linked against Debian's library
COLUMNS = {  # figure: heading
    "rps": "requests/s",
    "p50": "p50, ms",
    "p99": "p99, ms",
    "binary_rps": "requests/s, binary",
    "rows": "rows/s, JSON",
    "binary_rows": "rows/s, binary",
}
Make = Callable[[Readings], tuple[bytes, Mapping[str, str]]]
Figures = dict[str, float]


class Absent(Exception):
    """A peer that cannot be measured. The message states the reason in one line."""


@dataclass(frozen=True)
class Encoding:
    """The encoding of windows, and the parser of the logits of the first row of a response."""

    make: Make
    logits: Callable[[bytes], list[float]]


@dataclass(frozen=True)
class Peer:
    """A server: its title in the table, its requirements and the encodings of its requests."""

    title: str
    script: str = ""  # in benchmarks/servers; its argument is the port
    requirements: tuple[str, ...] = ()  # empty: run in this environment
    ready: str = "/ready"
    path: str = "/predict"
    json: Encoding | None = None
    binary: Encoding | None = None
    python: str = sys.executable  # creates the environment
    env: dict[str, str] = field(default_factory=dict)
    checked: bool = True  # the logits must equal the golden ones


def plain_logits(answer: bytes) -> list[float]:
    """Return the logits of `{"logits": [[...]]}`."""
    return list(json.loads(answer)["logits"][0])


def oip_logits(answer: bytes) -> list[float]:
    """Return the logits of an Open Inference Protocol response, in JSON or binary after the JSON."""
    head, end = json.JSONDecoder().raw_decode(answer.decode("latin-1"))
    for output in head["outputs"]:
        size, classes = output.get("parameters", {}).get("binary_data_size"), output["shape"][-1]
        if output["name"] == "logits":
            values = output["data"] if size is None else np.frombuffer(answer[end : end + size], "<f4").tolist()
            return list(values[:classes])
        end += size or 0
    raise Absent("no logits in the response")


def in_json(make: Callable[[Readings], bytes]) -> Make:
    """Add the headers of JSON."""
    return lambda telemetry: (make(telemetry), JSON_HEADERS)


PLAIN = Encoding(in_json(load.predict_json), plain_logits)
OIP_JSON, OIP_BINARY = Encoding(in_json(load.oip_json), oip_logits), Encoding(load.oip_binary, oip_logits)
OURS = Encoding(in_json(load.predict_json), lambda answer: list(json.loads(answer)["predictions"][0]["logits"]))
BENTO = Encoding(
    in_json(lambda some: json.dumps({"telemetry": some.tolist()}).encode()),
    lambda answer: list(json.loads(answer)[0][:3]),
)
INFER = "/v2/models/engine-health/infer"
PEERS = {
    "bare": Peer("FastAPI, constant answer", "bare.py", json=PLAIN, checked=False),
    "naive": Peer("FastAPI + orjson + ONNX Runtime", "naive.py", json=PLAIN),
    "engine-health": Peer("engine-health, /v1/predict", ready="/readyz", path="/v1/predict", json=OURS),
    "engine-health-v2": Peer("engine-health, /v2", ready="/readyz", path=INFER, json=OIP_JSON, binary=OIP_BINARY),
    "triton": Peer(
        "Triton 2.51, Python backend",
        "on_triton.py",
        ("nvidia-pytriton==0.7.0", "numpy==1.26.4", ORT),
        "/v2/health/ready",
        INFER,
        OIP_JSON,
        OIP_BINARY,
        DEBIAN_PYTHON,
    ),
    "mlserver": Peer(
        "MLServer 1.7.1",
        "on_mlserver.py",
        ("mlserver==1.7.1", ORT),
        "/v2/models/engine-health/ready",
        INFER,
        OIP_JSON,
    ),
    "litserve": Peer("LitServe 0.2.19", "on_litserve.py", ("litserve==0.2.19", ORT), "/health", json=PLAIN),
    "bentoml": Peer("BentoML 1.4.40", "on_bentoml.py", ("bentoml==1.4.40", ORT), "/readyz", json=BENTO),
    "ray": Peer(
        "Ray Serve 2.60",
        "on_ray.py",
        ("ray[serve]==2.60.0", ORT),
        "/-/healthz",
        json=PLAIN,
        env={"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
    ),
}
ALONE = "alone"
TITLES = {ALONE: "ONNX Runtime alone"} | {name: peer.title for name, peer in PEERS.items()}


def installed(name: str, peer: Peer) -> str:
    """Return the interpreter of a peer, and create its environment if it does not exist.

    Raises:
        Absent: the Python version is missing, or pip failed; the message is the last line of pip.
    """
    if not peer.requirements:
        return sys.executable
    folder = BUILD / "peers" / name
    python, stamp, requirements = folder / "bin" / "python", folder / "installed", "\n".join(peer.requirements)
    if stamp.exists() and stamp.read_text() == requirements:
        return str(python)
    print(f"installing {', '.join(peer.requirements)}", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", str(python), "install"]
    for command in ([peer.python, "-m", "venv", "--clear", "--without-pip", str(folder)], [*pip, *peer.requirements]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise Absent(f"needs {peer.python}") from None
        except subprocess.CalledProcessError as error:
            raise Absent(f"not installed: {last_line(error.stderr or error.stdout)}") from None
    stamp.write_text(requirements)
    return str(python)


def last_line(text: str) -> str:
    """Return the last line that is not blank, escaped for a table cell."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:160].replace("|", "/")


def ask(url: str, encoding: Encoding, telemetry: Readings, expected: Readings | None) -> float:
    """Return the duration in seconds of one request, after a check of its response.

    Raises:
        Absent: the status is not 200, or the logits differ from the expected ones.
    """
    started = time.perf_counter()
    status, answer = load.post(url, *encoding.make(telemetry))
    took = time.perf_counter() - started
    if status != 200:
        reason = "not found" if status == 404 else last_line(answer.decode("latin-1"))
        raise Absent(f"status {status}: {reason}")
    if expected is not None and not np.allclose(encoding.logits(answer), expected, atol=TOLERANCE, rtol=0):
        raise Absent(f"logits {encoding.logits(answer)}, expected {np.round(expected, 4).tolist()}")
    return took


def measure_large_requests(url: str, encoding: Encoding, seconds: float) -> float:
    """Return rows/s of requests of 1,000 rows in one connection, for at least three requests."""
    telemetry = load.windows(ROWS)
    slowest = max(ask(url, encoding, telemetry, None) for _ in range(2))
    measured = load.wrk(url, *encoding.make(telemetry), 1, max(seconds, 3.5 * slowest + 1), CLIENT_CORE)
    return ROWS / unfailing(measured).p50_ms * 1e3


def measure_single_windows(url: str, encoding: Encoding, seconds: float) -> load.Load:
    """Measure one window per request at 64 connections, after a warm-up."""
    body, headers = encoding.make(load.windows(1))
    load.wrk(url, body, headers, CONNECTIONS, 1, CLIENT_CORE)
    return unfailing(load.wrk(url, body, headers, CONNECTIONS, seconds, CLIENT_CORE))


def unfailing(measured: load.Load) -> load.Load:
    """Return the measurement if every request was answered.

    Raises:
        Absent: some requests failed.
    """
    if measured.errors or not measured.p50_ms:
        raise Absent(f"{measured.errors} errors under load")
    return measured


def measure(name: str, peer: Peer, seconds: float) -> Figures:
    """Run one round of one server.

    Raises:
        Absent: the server cannot be measured.
    """
    python, port = installed(name, peer), load.free_port()
    script = (
        [str(SERVERS / peer.script), str(port)] if peer.script else ["-m", "service.cli", "serve", "--port", str(port)]
    )
    env = {
        "MODEL": str(ARTEFACT),
        "ENGINE_HEALTH_THREADS": "1",
        "ENGINE_HEALTH_DATABASE_URL": "",
        "OMP_NUM_THREADS": "1",
        **peer.env,
    }
    base = f"http://127.0.0.1:{port}"
    figures: Figures = {}
    golden, logits = load.golden()
    with load.served([python, *script], env, SERVER_CORE, base + peer.ready, ROOT):
        for kind, encoding in {"": peer.json, "binary_": peer.binary}.items():
            if encoding is None:
                continue
            ask(base + peer.path, encoding, golden[:1], logits[0] if peer.checked else None)
            result = measure_single_windows(base + peer.path, encoding, seconds)
            figures |= {
                f"{kind}rps": result.requests_per_second,
                f"{kind}p50": result.p50_ms,
                f"{kind}p99": result.p99_ms,
            }
            figures[f"{kind}rows"] = measure_large_requests(base + peer.path, encoding, seconds)
    return figures


def alone(model: Path = ARTEFACT) -> Figures:
    """Measure ONNX Runtime without a server, on the server's core."""
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "benchmarks.servers.alone"]
    env = {**os.environ, "MODEL": str(model)}
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=env).stdout
    single, best, batch = map(float, printed.split())
    return {"binary_rps": single, "binary_rows": best, "batch": batch}


def cases(names: list[str], seconds: float, notes: dict[str, str]) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Yield the measurement of each name. A failure is noted, and the name is skipped in later rounds."""

    def guarded(name: str) -> Callable[[], Figures]:
        def case() -> Figures:
            if name in notes:
                return {}
            print(f"measuring {TITLES[name]}", file=sys.stderr, flush=True)
            try:
                return alone() if name == ALONE else measure(name, PEERS[name], seconds)
            except Absent as error:
                notes[name] = str(error)
            except ServerFailed as error:
                notes[name] = f"did not start: {last_line(str(error))}"
            except Exception as error:  # an unexpected failure of one peer must not stop the others
                notes[name] = f"{type(error).__name__}: {last_line(str(error))}"
            print(f"  {notes[name]}", file=sys.stderr, flush=True)
            return {}

        return case

    for name in names:
        yield name, guarded(name)


def table(figures_by_server: Mapping[str, Mapping[str, Figure]], notes: Mapping[str, str]) -> Iterator[str]:
    """Yield medians, with the range of the rates in brackets, as lines of Markdown."""
    yield "| server | " + " | ".join(COLUMNS.values()) + " |"
    yield "| --- |" + " ---: |" * len(COLUMNS)
    for name, figures in figures_by_server.items():
        if name in notes:
            yield f"| {TITLES[name]} | {notes[name]} |" + " |" * (len(COLUMNS) - 1)
        else:
            yield f"| {TITLES[name]} | " + " | ".join(cell(key, figures.get(key)) for key in COLUMNS) + " |"


def cell(key: str, figure: Figure | None) -> str:
    """Format a figure for the table."""
    if figure is None:
        return "–"
    if key in ("p50", "p99"):
        return f"{figure.median:.1f}"
    spread = f" ({figure.lowest:,.0f}–{figure.highest:,.0f})" if figure.lowest < figure.highest else ""
    return f"{figure.median:,.0f}{spread}"


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Measure the same artefact behind other servers.")
    parser.add_argument("--only", default=",".join(TITLES), help=f"comma-separated, of {', '.join(TITLES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="duration of each measurement")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if unknown := set(names) - set(TITLES):
        parser.error(f"unknown server: {', '.join(sorted(unknown))}; choose from {', '.join(TITLES)}")
    notes: dict[str, str] = {}
    figures_by_server = load.median_rounds(dict(cases(names, chosen.seconds, notes)), chosen.rounds)
    print(f"{load.machine()}; {chosen.rounds} rounds of {chosen.seconds:g} s\n")
    print("\n".join(table(figures_by_server, notes)))
    rows = {
        name: {"title": TITLES[name], "note": notes.get(name), "figures": {k: f._asdict() for k, f in figures.items()}}
        for name, figures in figures_by_server.items()
    }
    report = {"machine": load.machine(), "rounds": chosen.rounds, "seconds": chosen.seconds, "servers": rows}
    (BUILD / "peers.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
