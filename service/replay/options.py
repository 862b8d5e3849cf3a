"""Flags of `engine-health replay`. Imports only packages that serving requires."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.simulator.drift_injection import Drift, DriftError, parse_drift
from service.codecs.arguments import integer_parser, number_parser
from service.settings import PREFIX, Settings

SIMULATED = "simulated"
MAX_COUNT = 10**15 - 1
SECONDS_PER_UNIT = {"": 1, "/s": 1, "/min": 60, "/h": 3600}
LOOPBACK_OF_WILDCARD = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # URL host of a service on all addresses


@dataclass(frozen=True)
class ReplayOptions:
    """Fleet, service and speed of a replay."""

    url: str
    key: str
    fleet: str  # `simulated`, or the path of a file
    engines: int | None
    speed: float  # flights per second
    drifts: tuple[Drift, ...]
    seed: int
    count: int | None  # maximum number of flights
    endless: bool
    past: int | None  # number of engines that failed before the replay; None: a fleet of new engines
    patience: float  # seconds without a response after which the replay fails


def add_replay_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    flag = command.add_argument
    text = "simulated, or a file: C-MAPSS text or CSV; - is standard input (default: %(default)s)"
    flag("--fleet", default=SIMULATED, help=text)
    text = "engines that fly at the same time (default: 20, or all engines of the file)"
    flag("--engines", type=integer_parser("engines", 1, MAX_COUNT), metavar="N", help=text)
    text = "flights per second (5, 5/s), per minute (300/min), or max (default: 5/s)"
    flag("--speed", type=_parse_speed, default=5.0, help=text)
    drifts = "sensor_11:+2sd@600, sensor_11:+0.5, sensor_11:x3noise, sensors:x2noise, condition:20%%, wear:x2"
    text = f"drift injected from a flight on: {drifts}; repeatable (default: none)"
    flag("--drift", type=_parse_drift, action="append", dest="drifts", help=text)
    text = "seed of the simulated engines and of the drift (default: %(default)s)"
    flag("--seed", type=integer_parser("a whole number", 0, MAX_COUNT), default=0, metavar="N", help=text)
    text = "stop after this number of flights (default: none)"
    flag("--count", type=integer_parser("flights", 1, MAX_COUNT), metavar="N", help=text)
    text = "replace each failed engine by a new one; only with --fleet simulated (default: off)"
    flag("--endless", action="store_true", help=text)
    text = (
        "start with engines of any age, and first send this number of engines that failed before; "
        "only with --fleet simulated (default: start with new engines)"
    )
    flag("--past", type=integer_parser("engines", 0, MAX_COUNT), metavar="N", help=text)
    text = "URL of the service (default: the address of `serve` in the same environment)"
    flag("--url", help=text)
    flag("--key", help=f"API key (default: the first of {PREFIX}API_KEYS)")
    text = "seconds without a response after which the replay fails (default: %(default)g)"
    flag("--patience", type=number_parser("seconds", 0, 86400), default=60.0, metavar="SECONDS", help=text)


def build_options(flags: dict[str, Any], settings: Settings) -> ReplayOptions:
    """Return the flags as options. URL and key default to those of the settings."""
    url = flags["url"] or service_url(settings)
    key = flags["key"] if flags["key"] is not None else settings.api_keys.partition(",")[0].strip()
    return ReplayOptions(**flags | {"url": url.rstrip("/"), "key": key, "drifts": tuple(flags["drifts"] or ())})


def service_url(settings: Settings) -> str:
    """Return the URL of a service with these settings."""
    host = LOOPBACK_OF_WILDCARD.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def find_flag_conflict(options: ReplayOptions) -> str | None:
    """Return the error message of flags that are valid alone but not together, or None."""
    if options.fleet == SIMULATED:
        return None
    if options.endless or options.past is not None:
        return "--endless and --past need --fleet simulated; a file has a fixed fleet"
    return None if options.fleet == "-" or Path(options.fleet).exists() else f"--fleet {options.fleet}: no such file"


def _parse_speed(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(/s|/min|/h)?", text)
    if text == "max":
        return math.inf
    if not match or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a speed like 5/s, 300/min or max, got {text!r}")
    return float(match[1]) / SECONDS_PER_UNIT[match[2] or ""]


def _parse_drift(text: str) -> Drift:
    try:
        return parse_drift(text)
    except DriftError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
