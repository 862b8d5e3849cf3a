"""The gain of each private hook of the server: the service with it and without it, in alternating rounds.

    python -m benchmarks.hooks [--rounds 8] [--seconds 2] [NAME ...]      # = make bench-hooks

A hook uses private names of a library, or replaces code of one. For each hook two servers run on one core, one of them
with the hook removed by a patch before it starts, and wrk runs on the other core. The table shows medians of the figure
of the case that the hook is for, and the median of the paired ratios. The figures are written to build/hooks.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import uvicorn
from prometheus_client import Histogram

from benchmarks import load
from benchmarks.load import CLIENT_CORE, JSON_HEADERS, SERVER_CORE
from benchmarks.peers import BUILD, CONNECTIONS, INFER, ROOT, ROWS, unfailing
from benchmarks.serving import resident

MANY_CONNECTIONS = 1000


class Server(NamedTuple):
    """A running server."""

    base: str
    pid: int


Case = Callable[[Server, float], float]


def _build_rate_case(path: str, body: bytes, headers: Mapping[str, str], connections: int) -> Case:
    def measure(server: Server, seconds: float) -> float:
        result = load.wrk(server.base + path, body, headers, connections, seconds, CLIENT_CORE)
        return unfailing(result).requests_per_second

    return measure


def single_window(server: Server, seconds: float) -> float:
    """Measure requests/s of one window at 64 connections."""
    return _build_rate_case("/v1/predict", load.predict_json(load.windows(1)), JSON_HEADERS, CONNECTIONS)(
        server, seconds
    )


def thousand_windows(server: Server, seconds: float) -> float:
    """Measure requests/s of 1,000 windows as OIP binary, one connection."""
    body, headers = load.oip_binary(load.windows(ROWS))
    return _build_rate_case(INFER, body, headers, 1)(server, seconds)


def crowd(server: Server, seconds: float) -> float:
    """Measure the inverse of p99 in seconds of one window at 1,000 connections; refusals count as responses."""
    body = load.predict_json(load.windows(1))
    result = load.wrk(server.base + "/v1/predict", body, JSON_HEADERS, MANY_CONNECTIONS, seconds, CLIENT_CORE)
    return 1e3 / result.p99_ms


def memory(server: Server, seconds: float) -> float:
    """Measure the inverse of resident GB after large bodies in JSON."""
    body = load.predict_json(load.windows(ROWS))
    _build_rate_case("/v1/predict", body, JSON_HEADERS, 2)(server, seconds)
    return 1e3 / resident(server.pid)


def _patch_attributes(target: object, **values: Any) -> None:
    """Replace attributes of a module or class."""
    for name, value in values.items():
        setattr(target, name, value)


def _disable_direct_writes() -> None:
    from service.server.direct import DirectExchange

    _patch_attributes(DirectExchange, can_write_directly=lambda *_: False)


def _disable_uploads() -> None:
    from service.server import body

    _patch_attributes(body, LARGE_UPLOAD=1 << 62)


def _disable_spare_buffer() -> None:
    from service.server import body_budget

    _patch_attributes(body_budget, MAX_SPARE_BYTES=0)


def _disable_malloc_limits() -> None:
    from service.server import malloc

    _patch_attributes(malloc, configure=lambda: None, trim=lambda: None)


def _use_uvicorn_options(**options: Any) -> None:
    """Serve with other options of uvicorn."""
    from service import serve
    from service.server.config import uvicorn_config

    def configure(*arguments: Any, **others: Any) -> uvicorn.Config:
        config = uvicorn_config(*arguments, **others)
        _patch_attributes(config, **options)
        return config

    _patch_attributes(serve, uvicorn_config=configure)


def _use_public_metrics() -> None:
    from service import metrics
    from service.inference import observer

    def observe(histogram: Histogram, value: float) -> None:
        histogram.observe(value)

    def observe_all(histogram: Histogram, values: Any) -> None:
        for value in values:
            histogram.observe(float(value))

    def count(_: object, series: metrics.Series, bins: Any) -> None:
        for k, index in enumerate(bins):
            series.inputs[k * series.width + index].inc()

    _patch_attributes(metrics, observe=observe, observe_all=observe_all)
    _patch_attributes(observer, observe=observe, observe_all=observe_all)
    _patch_attributes(metrics.Metrics, input=count)


def _use_structlog_requests() -> None:
    from service.logs import RequestLog

    def add(self: RequestLog, fields: dict[str, Any]) -> None:
        self._log.info("request", **fields)

    _patch_attributes(RequestLog, add=add)


def _disable_plain_parser() -> None:
    from service.codecs import predict_request

    _patch_attributes(predict_request, parse_plain_predict=lambda *_: None)


class Hook(NamedTuple):
    """A hook: the case that it is for, and the patch that removes it."""

    case: Case
    remove: Callable[[], None]


HOOKS = {
    "server.direct.DirectExchange (write)": Hook(single_window, _disable_direct_writes),
    "server.upload.BodyUpload": Hook(thousand_windows, _disable_uploads),
    "server.body_budget (reused buffer)": Hook(thousand_windows, _disable_spare_buffer),
    "server.event_loop.BatchAcceptLoop": Hook(crowd, partial(_use_uvicorn_options, loop="uvloop")),
    "server.malloc": Hook(memory, _disable_malloc_limits),
    "metrics (direct updates)": Hook(single_window, _use_public_metrics),
    "logs.RequestLog": Hook(single_window, _use_structlog_requests),
    "codecs.instances_fast": Hook(single_window, _disable_plain_parser),
    "server as a whole, single windows": Hook(
        single_window, partial(_use_uvicorn_options, loop="uvloop", http="httptools")
    ),
    "server as a whole, 1,000 windows": Hook(
        thousand_windows, partial(_use_uvicorn_options, loop="uvloop", http="httptools")
    ),
}


def serve(name: str, port: int) -> None:
    """Serve with a hook removed; with none if the name is empty."""
    from service import cli

    if name:
        HOOKS[name].remove()
    raise SystemExit(cli.main(["serve", "--port", str(port), "--drain-seconds", "0", "--database-url", ""]))


def measure(name: str, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Return the figure with the hook and without it, for each round."""
    pairs, ports = list[tuple[float, float]](), (load.free_port(), load.free_port())
    environment = {"ENGINE_HEALTH_THREADS": "1", "ENGINE_HEALTH_DATABASE_URL": ""}
    commands = [
        [sys.executable, "-m", "benchmarks.hooks", "--serve", removed, "--port", str(port)]
        for removed, port in zip(("", name), ports, strict=True)
    ]
    ready = [f"http://127.0.0.1:{port}/readyz" for port in ports]
    case = HOOKS[name].case
    with (
        tempfile.TemporaryDirectory(dir=BUILD),
        load.served(commands[0], environment, SERVER_CORE, ready[0], ROOT) as first,
        load.served(commands[1], environment, SERVER_CORE, ready[1], ROOT) as second,
    ):
        servers = [Server(f"http://127.0.0.1:{port}", pid) for port, pid in zip(ports, (first, second), strict=True)]
        for server in servers:
            case(server, 1)  # warm
        for k in range(rounds):
            figures = {server: case(server, seconds) for server in (servers if k % 2 else servers[::-1])}
            pairs.append((figures[servers[0]], figures[servers[1]]))
    return pairs


def main() -> None:
    """Measure hooks and print the table."""
    parser = argparse.ArgumentParser(description="Measure the gain of each private hook.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of a hook; default: all")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.serve is not None:
        serve(flags.serve, flags.port)
    BUILD.mkdir(exist_ok=True)
    chosen = [name for name in HOOKS if not flags.names or any(part in name for part in flags.names)]
    print(f"{load.machine()}; medians of {flags.rounds} rounds of {flags.seconds:g} s\n")
    print("| hook | case | with | without | gain | rounds from | to |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    pairs_by_hook = {}
    for name in chosen:
        pairs = pairs_by_hook[name] = measure(name, flags.rounds, flags.seconds)
        ratios = [with_hook / without for with_hook, without in pairs]
        columns = [statistics.median(column) for column in zip(*pairs, strict=True)]
        case = (HOOKS[name].case.__doc__ or "").removeprefix("Measure ").rstrip(".")
        gain = f"{100 * (statistics.median(ratios) - 1):+.1f} %"
        print(
            f"| {name} | {case} | {columns[0]:.4g} | {columns[1]:.4g} | **{gain}** | {min(ratios):.2f} | "
            f"{max(ratios):.2f} |",
            flush=True,
        )
    (BUILD / "hooks.json").write_text(json.dumps(pairs_by_hook, indent=1))


if __name__ == "__main__":
    main()
