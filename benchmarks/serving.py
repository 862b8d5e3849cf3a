"""Performance of the service for the README, as ratios to a bare route and to ONNX Runtime alone.

    python -m benchmarks.serving [--rounds 5] [--seconds 4]      # = make bench

The service and the bare FastAPI route, which reads the same body and returns a constant, run on one core, and wrk on
the other. They alternate with ONNX Runtime alone. Results are medians over rounds. The figures are written to
build/serving.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks import load
from benchmarks.load import CLIENT_CORE, JSON_HEADERS, SERVER_CORE, Figure
from benchmarks.peers import BUILD, CONNECTIONS, INFER, ROOT, ROWS, alone, unfailing
from model.contract import CHANNEL_MAJOR_KEY, read_graph
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.windows import Readings

REACH = (  # case, reference, figure, target, whether a higher figure is better
    ("one window a request, JSON, 64 connections", "a bare FastAPI route, requests/s", "rate", 0.60, True),
    ("the same, 1 connection, p50", "the same route", "p50", 3.0, False),
    ("1,000 windows, OIP binary", "ONNX Runtime alone, one thread, best batch, rows/s", "binary", 0.85, True),
    ("1,000 windows, `/v1/predict` JSON", "the same", "json", 0.40, True),
    ("1,000 windows, `/v1/predict` Arrow stream", "the same", "arrow", 0.40, True),
    (
        "1,000 windows, OIP binary",
        "ONNX Runtime alone with the plan, which is what the service runs",
        "plan",
        None,
        True,
    ),
    ("p99 at 64 connections", "p50 of the same run", "tail", 3.0, False),
    ("one window of an engine, stored, 64 connections", "the same without a database", "memory", 0.70, True),
    ("one flight a request, kept, `/v1/cycles`, 64 connections", "a bare FastAPI route", "flights", 0.35, True),
)
LIMITS = (
    ("start to ready, s", "start", 1.5),
    ("resident memory of one worker at ready, MB", "memory", 180.0),
    ("the same after all rounds", "after", None),
)
ONE_THREAD, STATELESS = {"ENGINE_HEALTH_THREADS": "1"}, {"ENGINE_HEALTH_DATABASE_URL": ""}
FiguresByCase = dict[str, dict[str, Figure]]


def measured(rounds: int, seconds: float) -> FiguresByCase:
    """Measure every figure of every round: bare route, service, ONNX Runtime alone, start."""
    port, bare, stateless = load.free_port(), load.free_port(), load.free_port()
    with (
        tempfile.TemporaryDirectory(dir=BUILD) as folder,  # on a real disk, as in production
        load.served(
            [sys.executable, "benchmarks/servers/bare.py", str(bare)], {}, SERVER_CORE, base(bare) + "/ready", ROOT
        ),
        load.served(command(stateless), ONE_THREAD | STATELESS, SERVER_CORE, base(stateless) + "/readyz", ROOT),
        load.served(
            command(port), ONE_THREAD | database_settings(folder), SERVER_CORE, base(port) + "/readyz", ROOT
        ) as pid,
    ):
        plan = Path(folder, "plan.onnx")
        metadata = open_artefact(ARTEFACT)[0].get_modelmeta().custom_metadata_map
        plan.write_bytes(read_graph(metadata, CHANNEL_MAJOR_KEY) or b"")
        floor, own = base(bare) + "/predict", base(port) + "/v1/predict"
        cases: dict[str, Callable[[], Mapping[str, float]]] = {
            "bare": lambda: singles(floor, seconds),
            "ours": lambda: singles(own, seconds),
            # without a store, because Arrow rows name engines and would be stored
            "many": lambda: rows(base(stateless), seconds),
            "alone": lambda: {"rows": alone()["binary_rows"]},
            "plan": lambda: {"rows": alone(plan)["binary_rows"]},
            "bare-flights": lambda: numbered(floor, load.flights, seconds),
            "flights": lambda: numbered(base(port) + "/v1/cycles", load.flights, seconds),
            "stateless": lambda: numbered(base(stateless) + "/v1/predict", load.of_engines, seconds),
            "stored": lambda: numbered(own, load.of_engines, seconds),
        }
        for case in cases.values():
            case()  # warm
        figures = load.median_rounds(cases, rounds)
        memory = resident(pid)
    figures["start"] = load.median_rounds({"start": started}, rounds)["start"]
    figures["start"]["after"] = Figure(memory, memory, memory)
    return figures


def base(port: int) -> str:
    """Return the base URL of a server."""
    return f"http://127.0.0.1:{port}"


def command(port: int) -> list[str]:
    """Return the command that starts the service."""
    return [sys.executable, "-m", "service.cli", "serve", "--port", str(port), "--drain-seconds", "0"]


def singles(url: str, seconds: float) -> Mapping[str, float]:
    """Measure one window per request: requests/s, p50 and p99 in ms at 64 connections, p50 at one connection."""
    body = load.predict_json(load.windows(1))
    many = unfailing(load.wrk(url, body, JSON_HEADERS, CONNECTIONS, seconds, CLIENT_CORE))
    few = unfailing(load.wrk(url, body, JSON_HEADERS, 1, seconds, CLIENT_CORE))
    return {"rate": many.requests_per_second, "p50": many.p50_ms, "p99": many.p99_ms, "alone_p50": few.p50_ms}


def numbered(url: str, make: Callable[[Readings], bytes], seconds: float) -> Mapping[str, float]:
    """Measure requests/s at 64 connections, where each request has another engine and cycle."""
    result = load.wrk(url, make(load.windows(1)), JSON_HEADERS, CONNECTIONS, seconds, CLIENT_CORE)
    return {"rate": unfailing(result).requests_per_second}


def database_settings(folder: str) -> dict[str, str]:
    """Return the settings of a separate database."""
    return {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{folder}/memory.db"}


def rows(url: str, seconds: float) -> Mapping[str, float]:
    """Return rows/s of requests of 1,000 windows in one connection, in each encoding."""
    telemetry = load.windows(ROWS)
    requests: dict[str, tuple[str, bytes, Mapping[str, str]]] = {
        "json": ("/v1/predict", load.predict_json(telemetry), JSON_HEADERS),
        "arrow": ("/v1/predict", *load.predict_arrow(telemetry)),
        "binary": (INFER, *load.oip_binary(telemetry)),
    }
    rates = {}
    for name, (path, body, headers) in requests.items():
        rates[name] = ROWS / unfailing(load.wrk(url + path, body, headers, 1, seconds, CLIENT_CORE)).p50_ms * 1e3
    return rates


def started() -> Mapping[str, float]:
    """Return seconds from the command to the first ready response, and resident MB at this time."""
    port = load.free_port()
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(dir=BUILD) as folder,
        load.served(
            command(port), ONE_THREAD | database_settings(folder), SERVER_CORE, base(port) + "/readyz", ROOT
        ) as pid,
    ):
        return {"start": time.perf_counter() - begun, "memory": resident(pid)}


def resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024 / 1e6


def table(figures: FiguresByCase) -> Iterator[str]:
    """Yield each case, its ratio and its target as lines of Markdown."""
    bare, ours, many, best = (figures[name] for name in ("bare", "ours", "many", "alone"))
    pairs = {
        "rate": (ours["rate"], bare["rate"]),
        "p50": (ours["alone_p50"], bare["alone_p50"]),
        "binary": (many["binary"], best["rows"]),
        "json": (many["json"], best["rows"]),
        "arrow": (many["arrow"], best["rows"]),
        "plan": (many["binary"], figures["plan"]["rows"]),
        "tail": (ours["p99"], ours["p50"]),
        "memory": (figures["stored"]["rate"], figures["stateless"]["rate"]),
        "flights": (figures["flights"]["rate"], figures["bare-flights"]["rate"]),
    }
    yield "| case | against | here | there | ratio | reach |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for case, against, name, reach, higher_is_better in REACH:
        here, there = (figure.median for figure in pairs[name])
        goal = "" if reach is None else f"{'≥' if higher_is_better else '≤'} {reach:g}"
        yield f"| {case} | {against} | {shown(here)} | {shown(there)} | **{here / there:.2f}** | {goal} |"
    for case, name, limit in LIMITS:
        yield f"| {case} | | {figures['start'][name].median:.3g} | | | {'' if limit is None else f'≤ {limit:g}'} |"


def shown(figure: float) -> str:
    """Format a figure with four digits and without an exponent."""
    return f"{float(f'{figure:.4g}'):,.0f}" if figure >= 1000 else f"{figure:.4g}"


def main() -> None:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Compare the service with a bare route and ONNX Runtime alone.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="duration of each measurement")
    chosen = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    figures_by_case = measured(chosen.rounds, chosen.seconds)
    print(f"{load.machine()}; medians of {chosen.rounds} rounds of {chosen.seconds:g} s\n")
    print("\n".join(table(figures_by_case)))
    report = {
        name: {key: figure._asdict() for key, figure in figures.items()} for name, figures in figures_by_case.items()
    }
    (BUILD / "serving.json").write_text(json.dumps({"machine": load.machine(), "figures": report}, indent=1))


if __name__ == "__main__":
    main()
