"""Inject faults and print a table. The exit code is 1 if a flight is lost, or the service does not recover by itself.

    python -m benchmarks.faults [FAULT ...]      # = make faults; 5 min

The exit code is also 1 if a fault had no effect. Requires root, to mount disks and set memory limits, and the programs
of PostgreSQL. If a fault cannot be injected, its line states the reason. The figures are written to build/faults.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

from benchmarks import load
from benchmarks.endurance.stage import say
from benchmarks.faults import connections, processes, storage
from benchmarks.faults.collector import Outcome, Untried
from benchmarks.peers import BUILD

FAULTS: dict[str, Callable[[], Outcome]] = {
    "worker kill -9": processes.killed,
    "worker killed for its memory": processes.out_of_memory,
    "stopped for 10 s": processes.stopped,
    "no file descriptors": processes.descriptors,
    "disk full for 5 s": storage.full,
    "disk read-only at start, for 5 s": storage.read_only,
    "PostgreSQL gone for 5 s": storage.gone,
    "clock jumps back an hour": storage.clock,
    "1,000 connections opened and left": connections.left,
    "200 senders of a byte a second": connections.slow,
    "500 half-closed sockets": connections.half_closed,
}


def main() -> int:
    """Inject the chosen faults, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Inject faults around the service and measure the recovery.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"one of {', '.join(FAULTS)}; default: all")
    chosen = parser.parse_args().faults or list(FAULTS)
    if unknown := set(chosen) - set(FAULTS):
        parser.error(f"unknown fault: {', '.join(sorted(unknown))}; choose from {', '.join(FAULTS)}")
    os.sched_setaffinity(0, {load.CLIENT_CORE})
    print(f"{load.machine()}\n\n| fault | what clients saw | flights acknowledged | lost | well after, s |")
    print("| --- | --- | ---: | ---: | ---: |", flush=True)
    outcomes: dict[str, Outcome | str] = {}
    for name in chosen:
        say(name)
        try:
            outcomes[name] = FAULTS[name]()
        except Untried as reason:
            outcomes[name] = str(reason)
        print(row(name, outcomes[name]), flush=True)
    BUILD.mkdir(exist_ok=True)
    figures = {name: outcome if isinstance(outcome, str) else outcome._asdict() for name, outcome in outcomes.items()}
    (BUILD / "faults.json").write_text(json.dumps({"machine": load.machine(), "faults": figures}, indent=1))
    return 0 if all(isinstance(outcome, str) or outcome.passed() for outcome in outcomes.values()) else 1


def row(name: str, outcome: Outcome | str) -> str:
    """Return a row of the table."""
    if isinstance(outcome, str):
        return f"| {name} | not tried: {outcome} | | | |"
    well = "**never**" if outcome.well is None else f"{outcome.well:.1f}"
    proven = "" if outcome.proven else "; **not as it should be**"
    return f"| {name} | {outcome.saw}{proven} | {outcome.acknowledged:,} | {outcome.lost or 0} | {well} |"


if __name__ == "__main__":
    sys.exit(main())
