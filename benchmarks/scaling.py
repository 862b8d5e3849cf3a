"""Scaling with workers and processes: requests/s of one and of two in alternation, for docs/operations.md.

    python -m benchmarks.scaling [--rounds 3] [--seconds 4]

Servers may use every core, as in production. wrk shares the cores, which reduces the gain of a second worker. Needs
wrk, and the programs of PostgreSQL for the shared database. Figures are medians over rounds.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks import load
from benchmarks.load import JSON_HEADERS, Figure
from benchmarks.peers import BUILD, CONNECTIONS, ROOT, unfailing
from benchmarks.serving import base, command
from tests.support.postgres import postgres

ROWS = {  # title: case with one, case with two
    "`/v1/predict`, stateless": ("1 process, stateless", "2 workers, stateless"),
    "`/v1/cycles`, SQLite": ("1 process, SQLite", "2 workers, SQLite"),
    "`/v1/cycles`, 2 workers on one PostgreSQL": ("1 process, PostgreSQL", "2 workers, PostgreSQL"),
    "`/v1/cycles`, 2 replicas on one PostgreSQL": ("1 process, PostgreSQL", "2 processes, PostgreSQL"),
}
EVERY_CORE = ",".join(map(str, sorted(os.sched_getaffinity(0))))


def measured(rounds: int, seconds: float) -> dict[str, dict[str, Figure]]:
    """Return requests/s of every case. All servers run all the time and are idle while others are measured."""
    with ExitStack() as stack:
        cluster = stack.enter_context(postgres())

        def served(database: str, workers: int = 1) -> str:
            environment = {"ENGINE_HEALTH_WORKERS": str(workers), "ENGINE_HEALTH_THREADS": "1"}
            environment |= {"ENGINE_HEALTH_DATABASE_URL": database}
            url = base(port := load.free_port())
            stack.enter_context(load.served(command(port), environment, EVERY_CORE, url + "/readyz", ROOT))
            return url

        files = [f"sqlite:///{BUILD}/scaling-{os.getpid()}-{k}.db" for k in (1, 2)]
        for name in files:
            stack.callback(_remove_database, name.removeprefix("sqlite:///"))
        shared = cluster.url("shared")
        cases: dict[str, list[str]] = {
            "1 process, stateless": [served("")],
            "2 workers, stateless": [served("", 2)],
            "1 process, SQLite": [served(files[0])],
            "2 workers, SQLite": [served(files[1], 2)],
            "1 process, PostgreSQL": [served(cluster.url("one"))],
            "2 workers, PostgreSQL": [served(cluster.url("two"), 2)],
            "2 processes, PostgreSQL": [served(shared), served(shared)],
        }
        rounds_by_case = {name: _build_round(name, addresses, seconds) for name, addresses in cases.items()}
        for ask in rounds_by_case.values():
            ask()  # warm
        return load.median_rounds(rounds_by_case, rounds)


def _build_round(name: str, addresses: list[str], seconds: float) -> Callable[[], Mapping[str, float]]:
    """Return a function that loads all addresses in parallel and returns the sum of their rates."""
    path, make = ("/v1/predict", load.predict_json) if "stateless" in name else ("/v1/cycles", load.flights)

    def measure_address(address: str) -> float:
        body = make(load.windows(1))  # new engines for each address and round
        result = load.wrk(address + path, body, JSON_HEADERS, CONNECTIONS // len(addresses), seconds, EVERY_CORE)
        return unfailing(result).requests_per_second

    def ask() -> Mapping[str, float]:
        with ThreadPoolExecutor(len(addresses)) as pool:
            return {"rate": sum(pool.map(measure_address, addresses))}

    return ask


def _remove_database(path: str) -> None:
    for end in ("", "-wal", "-shm"):
        if os.path.exists(path + end):
            os.remove(path + end)


def table(figures: dict[str, dict[str, Figure]]) -> Iterator[str]:
    """Yield a Markdown table of one, two, and their ratio."""
    yield "| what is asked | of one, requests/s | of two | ratio |"
    yield "| --- | ---: | ---: | ---: |"
    for what, (first, second) in ROWS.items():
        few, many = figures[first]["rate"].median, figures[second]["rate"].median
        yield f"| {what} | {few:,.0f} | {many:,.0f} | **{many / few:.2f}** |"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Compare one and two workers, and one and two processes.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="duration of each measurement")
    chosen = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    print(load.machine() + "\n")
    print("\n".join(table(measured(chosen.rounds, chosen.seconds))))


if __name__ == "__main__":
    main()
