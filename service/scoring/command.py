"""Flags of `engine-health score`. Imports only packages that every command requires."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.codecs.arguments import integer_parser
from service.scoring.options import HORIZON_ROWS, LOG_INTERVAL_SECONDS, PART_ROWS, STDIN, Options

MAX_ROWS = 2**30
EXTRA_OF_PACKAGE = {"pyarrow": "score", "rich": "score", "plotly": "score", "ray": "ray"}


def add_score_command(commands: Any, temperature: Callable[[str], float]) -> None:
    """Add the command and its flags. `temperature` parses the flag of that name."""
    command = commands.add_parser(
        "score",
        help="score a file of flights to a file",
        description="Score every flight of a file, or the newest flight of each engine, to a file. The same "
        "command resumes a killed job. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done with rejected rows.",
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
        help=".parquet, .csv, or a folder of Parquet parts; rejected rows go to OUTPUT.errors.parquet, "
        "for a CSV output to OUTPUT.errors.csv",
    )
    add("--engine-column", default="engine_id", help="column of the engine id (default: %(default)s)")
    add("--cycle-column", default="cycle", help="column of the cycle (default: %(default)s)")
    add(
        "--map",
        action="append",
        default=[],
        dest="columns",
        type=_parse_mapping,
        metavar="CHANNEL=COLUMN",
        help="column of a channel that has another name: sensor_2=T24; repeatable (default: the name of the channel)",
    )
    add(
        "--missing",
        choices=("reject", "hold"),
        default="reject",
        help="reject a row with a missing value, or hold the last value (default: %(default)s)",
    )
    add("--latest", action="store_true", help="write one row per engine: its newest cycle (default: off)")
    label = command.add_mutually_exclusive_group()
    text = "column of true classes, names or indices; adds the loss to the output (default: none)"
    label.add_argument("--labels", metavar="COLUMN", help=text)
    text = "column of true RUL in cycles, which determines the class; adds the loss to the output (default: none)"
    label.add_argument("--rul", metavar="COLUMN", help=text)
    text = "report on the labelled rows: .html or .json (default: none)"
    add("--report", type=Path, metavar="FILE", help=text)
    text = "temperature of the predictions (default: the temperature of the model)"
    add("--temperature", type=temperature, metavar="T", help=text)
    text = "path of the artefact (default: ENGINE_HEALTH_MODEL, else the bundled artefact)"
    add("--model", type=Path, help=text)
    add(
        "--threads",
        type=integer_parser("threads", 1, 1024),
        help="concurrent inferences (default: the number of available cores)",
    )
    add(
        "--horizon",
        type=integer_parser("rows", 0, MAX_ROWS),
        default=HORIZON_ROWS,
        metavar="ROWS",
        help="rows by which a cycle may come late (default: %(default)s)",
    )
    add(
        "--part-rows",
        type=integer_parser("rows", 1, MAX_ROWS),
        default=PART_ROWS,
        metavar="ROWS",
        help="rows of a part, the maximum that a killed job repeats (default: %(default)s)",
    )
    backends = ("local", "ray")
    text = "run on this machine or on a Ray cluster (default: %(default)s)"
    add("--backend", choices=backends, default="local", help=text)
    add("--engine", choices=backends, default=argparse.SUPPRESS, dest="backend", help=argparse.SUPPRESS)  # old name
    text = "address of the Ray cluster (default: RAY_ADDRESS, else a new cluster on this machine)"
    add("--address", help=text)
    add(
        "--workers",
        type=integer_parser("actors", 1, 10_000),
        help="Ray actors (default: the number of cores minus 1)",
    )
    add("--strict", action="store_true", help="fail at the first rejected row (default: off)")
    add("--quiet", action="store_true", help="print only errors (default: off)")
    add(
        "--interval",
        type=_parse_seconds,
        default=LOG_INTERVAL_SECONDS,
        metavar="SECONDS",
        help="seconds between log lines without a terminal (default: %(default)g)",
    )
    text = "score all rows again: discard a finished result and the parts of an unfinished job (default: off)"
    add("--restart", action="store_true", help=text)
    command.set_defaults(parser=command)


def build_options(flags: dict[str, Any]) -> Options:
    """Return the flags as options. Exit with 2 if flags contradict each other."""
    parser = flags.pop("parser")
    flags["columns"] = dict(flags["columns"])
    options = Options(**{**flags, "inputs": tuple(flags["inputs"])})
    if options.engine_column == options.cycle_column:
        parser.error(f"--engine-column and --cycle-column must differ, got {options.cycle_column!r} for both")
    if "" in (options.engine_column, options.cycle_column, options.labels, options.rul):
        parser.error("--engine-column, --cycle-column, --labels, --rul: the name of a column is empty")
    if options.report and not options.truth_column:
        parser.error("--report needs the true classes: add --labels COLUMN or --rul COLUMN")
    if options.backend == "local" and (options.address or options.workers):
        parser.error("--address and --workers need --backend ray")
    if options.report and options.report.suffix.lower() not in (".html", ".json"):
        parser.error(f"--report {options.report}: expected a name that ends in .html or .json")
    if "" in options.inputs or options.output.name in ("", ".."):
        parser.error("the name of INPUT or OUTPUT is empty")
    if str(options.output) == STDIN:
        parser.error("OUTPUT -: expected a file or folder, not standard output, so that the job can be resumed")
    try:
        f"{options.output}{options.report}".encode()
    except UnicodeEncodeError:
        parser.error("OUTPUT and --report: the name is not UTF-8; choose another name")
    if options.output.suffix.lower() not in (".parquet", ".csv", ""):
        parser.error(f"{options.output}: expected .parquet, .csv, or a folder, whose name has no suffix")
    return options


def _parse_mapping(text: str) -> tuple[str, str]:
    channel, equals, column = text.partition("=")
    if not (channel and equals and column):
        raise argparse.ArgumentTypeError(f"expected CHANNEL=COLUMN, got {text!r}")
    return channel, column


def _parse_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value
