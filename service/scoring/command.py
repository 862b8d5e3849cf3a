"""The words of `engine-health score`. Imports nothing that only scoring needs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.scoring.options import HORIZON, INTERVAL, PART_ROWS, STDIN, Options

MOST_ROWS = 2**30
PACKAGES = {"pyarrow": "score", "rich": "score", "plotly": "score", "ray": "ray"}


def add_to(commands: Any, temperature: Callable[[str], float]) -> None:
    """The command and its flags; `temperature` reads one."""
    command = commands.add_parser(
        "score",
        help="score a file of flights to a file",
        description="Score every flight of a file, or the newest of each engine, to a file. Killed and started again "
        "it goes on where it stopped. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with rejected rows.",
    )
    add = command.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="Parquet, CSV, TSV, JSON lines, C-MAPSS text, also .gz, .zst; a folder, a glob, or - for standard input",
    )
    add(
        "output",
        type=Path,
        metavar="OUTPUT",
        help=".parquet, .csv, or a folder of Parquet parts; rejected rows go to OUTPUT.errors.parquet",
    )
    add("--engine-column", default="engine_id", help="of the engine's id [%(default)s]")
    add("--cycle-column", default="cycle", help="of the cycle [%(default)s]")
    add(
        "--map",
        action="append",
        default=[],
        dest="columns",
        type=_pair,
        metavar="CHANNEL=COLUMN",
        help="where a channel has another name: sensor_2=T24",
    )
    add(
        "--missing",
        choices=("reject", "hold"),
        default="reject",
        help="reject a row with a missing value, or hold the last seen one [%(default)s]",
    )
    add("--latest", action="store_true", help="one row for each engine: its newest cycle")
    truth = command.add_mutually_exclusive_group()
    truth.add_argument("--labels", metavar="COLUMN", help="true classes, names or indices: adds the loss")
    truth.add_argument(
        "--rul", metavar="COLUMN", help="true RUL in cycles, from which the class follows: adds the loss"
    )
    add("--report", type=Path, metavar="FILE", help="evaluate the labelled rows: .html or .json")
    add("--temperature", type=temperature, help="in place of the model's own")
    add("--model", type=Path, help="artefact; the configured one if not given")
    add("--threads", type=_whole("threads", 1, 1024), help="inferences at once; the allowed cores if not given")
    add(
        "--horizon",
        type=_whole("rows", 0, MOST_ROWS),
        default=HORIZON,
        metavar="ROWS",
        help="by how many rows a cycle may come too late [%(default)s]",
    )
    add(
        "--part-rows",
        type=_whole("rows", 1, MOST_ROWS),
        default=PART_ROWS,
        metavar="ROWS",
        help="of a part: what a killed job does again at most [%(default)s]",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where it runs: on this machine, or on a Ray cluster",
    )
    add("--address", help="of the Ray cluster; RAY_ADDRESS, or one on this machine, if not given")
    add("--workers", type=_whole("actors", 1, 10_000), help="actors of Ray; one for each core but one if not given")
    add("--strict", action="store_true", help="fail at the first rejected row")
    add("--quiet", action="store_true", help="say nothing but what goes wrong")
    add(
        "--interval",
        type=_seconds,
        default=INTERVAL,
        metavar="SECONDS",
        help="between log lines where there is no terminal [%(default)g]",
    )
    add("--restart", action="store_true", help="forget what an earlier, unfinished job to OUTPUT has done")
    command.set_defaults(parser=command)


def options_of(flags: dict[str, Any]) -> Options:
    """The options, of which some contradict others; those exit with 2."""
    parser = flags.pop("parser")
    flags["columns"] = dict(flags["columns"])
    options = Options(**{**flags, "inputs": tuple(flags["inputs"])})
    if options.engine_column == options.cycle_column:
        parser.error("--engine-column and --cycle-column are two columns")
    if "" in (options.engine_column, options.cycle_column, options.labels, options.rul):
        parser.error("a column needs a name")
    if options.report and not options.truth_column:
        parser.error("--report needs --labels or --rul")
    if options.engine == "local" and (options.address or options.workers):
        parser.error("--address and --workers go with --engine ray")
    if options.report and options.report.suffix.lower() not in (".html", ".json"):
        parser.error(f"--report {options.report}: write .html or .json")
    if "" in options.inputs or options.output.name in ("", ".."):
        parser.error("INPUT and OUTPUT need names")
    if str(options.output) == STDIN:
        parser.error("-: a job that can be killed and go on writes to a file, not to standard output")
    try:
        f"{options.output}{options.report}".encode()
    except UnicodeEncodeError:
        parser.error("OUTPUT and --report: a name that is no UTF-8")
    if options.output.suffix.lower() not in (".parquet", ".csv", ""):
        parser.error(f"{options.output}: write .parquet, .csv, or a folder, whose name has no ending")
    return options


def _pair(text: str) -> tuple[str, str]:
    channel, equals, column = text.partition("=")
    if not (channel and equals and column):
        raise argparse.ArgumentTypeError(f"expected CHANNEL=COLUMN, got {text!r}")
    return channel, column


def _whole(what: str, least: int, most: int) -> Callable[[str], int]:
    """What reads a whole number within bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"expected {what} from {least} to {most}, got {text!r}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value
