"""Test the service under overload and faults at full size, and print one table. Exit code 1 if a requirement fails.

    python -m benchmarks.endurance [PART ...]      # = make endurance; 30 min

The service runs on one core, its clients on the other. The figures are written to build/endurance.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator

from benchmarks import load
from benchmarks.endurance import bodies, changes, malformed, overload, parsing, soak
from benchmarks.endurance.stage import Line, say
from benchmarks.peers import BUILD

PARTS: dict[str, Callable[[], Iterator[Line]]] = {
    "malformed": malformed.lines,
    "overload": overload.lines,
    "bodies": bodies.lines,
    "parsing": parsing.lines,
    "reloads": changes.reloads,
    "kills": changes.kills,
    "soak": soak.lines,
    "stop": changes.stop,
}


def main() -> int:
    """Run the chosen parts, print the table and write the figures."""
    parser = argparse.ArgumentParser(description="Test the service under overload and faults at full size.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; default: all")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    os.sched_setaffinity(0, {load.CLIENT_CORE})
    lines_by_part: dict[str, list[Line]] = {}
    for part in chosen:
        say(part)
        lines_by_part[part] = []
        for line in PARTS[part]():
            lines_by_part[part].append(line)
            say(row(line))
    print(f"{load.machine()}\n\n| action | observation | requirement | met |\n| --- | --- | --- | --- |")
    lines = [line for part in lines_by_part.values() for line in part]
    print("\n".join(map(row, lines)))
    BUILD.mkdir(exist_ok=True)
    figures = {part: [vars(line) for line in part_lines] for part, part_lines in lines_by_part.items()}
    (BUILD / "endurance.json").write_text(json.dumps({"machine": load.machine(), "parts": figures}, indent=1))
    return 0 if all(line.kept for line in lines) else 1


def row(line: Line) -> str:
    """Return a row of the table."""
    return f"| {line.done} | {line.seen} | {line.promised} | {'yes' if line.kept else '**no**'} |"


if __name__ == "__main__":
    sys.exit(main())
