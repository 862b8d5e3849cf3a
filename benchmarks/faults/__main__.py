"""Faults as a table; exit code 1 if a flight is lost, the service is not well by itself, or a fault was none.

    python -m benchmarks.faults [FAULT ...]      # = make faults; five minutes

Needs root for separate disks and memory limits, and PostgreSQL's programs; a fault that cannot be injected here has a
line that says why. Figures also in build/faults.json.
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
    """Make the chosen faults, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description="What goes wrong around the service, and what becomes of it.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all if none is named")
    chosen = parser.parse_args().faults or list(FAULTS)
    if unknown := set(chosen) - set(FAULTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; faults are {', '.join(FAULTS)}")
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
    """Return a line of the table."""
    if isinstance(outcome, str):
        return f"| {name} | not tried: {outcome} | | | |"
    well = "**never**" if outcome.well is None else f"{outcome.well:.1f}"
    proven = "" if outcome.proven else "; **not as it should be**"
    return f"| {name} | {outcome.saw}{proven} | {outcome.acknowledged:,} | {outcome.lost or 0} | {well} |"


if __name__ == "__main__":
    sys.exit(main())
