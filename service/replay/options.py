"""The flags of `engine-health replay`. Imports nothing that serving has not."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.data.simulator.drift_injection import Drift, DriftError, parse
from service.settings import Settings

SIMULATED = "simulated"
SECONDS = {"": 1, "/s": 1, "/min": 60, "/h": 3600}
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses to listen on, and those to call them at


@dataclass(frozen=True)
class Options:
    """What to send, where, and how fast."""

    url: str
    key: str
    fleet: str  # simulated, or a file
    engines: int | None
    speed: float  # flights a second
    drifts: tuple[Drift, ...]
    seed: int
    count: int | None  # of flights
    endless: bool
    past: int | None  # engines that failed before; None: all begin new
    patience: float  # seconds


def add_to(command: argparse.ArgumentParser) -> None:
    """The flags, on a parser of their own."""
    flag = command.add_argument
    flag("--fleet", default=SIMULATED, help="simulated, or a file: C-MAPSS text or CSV; - is standard input")
    flag("--engines", type=_positive, help="how many fly at a time; 20, or all of a file")
    flag("--speed", type=_speed, default=5.0, help="flights a second (5, 5/s), a minute (300/min), or max; 5/s")
    drifts = "sensor_11:+2sd@600, sensor_11:+0.5, sensor_11:x3noise, sensors:x2noise, condition:20%%, wear:x2"
    flag("--drift", type=_drift, action="append", dest="drifts", help=f"planted from a flight on: {drifts}; repeatable")
    flag("--seed", type=_natural, default=0, help="other seeds are other engines")
    flag("--count", type=_positive, help="stop after so many flights")
    flag("--endless", action="store_true", help="a new engine for each that failed; only of a simulated fleet")
    flag("--past", type=_natural, help="engines of any age, and so many that failed before, sent first; simulated only")
    flag("--url", help="of the service; where `serve` would be with the same environment")
    flag("--key", help="API key; the first of ENGINE_HEALTH_API_KEYS")
    flag("--patience", type=_seconds, default=60.0, help="seconds without an answer that are waited for; 60")


def options_of(flags: dict[str, Any], settings: Settings) -> Options:
    """Flags as options; address and key are those of the settings where none were given."""
    url = flags["url"] or url_of(settings)
    key = flags["key"] if flags["key"] is not None else settings.api_keys.partition(",")[0].strip()
    return Options(**flags | {"url": url.rstrip("/"), "key": key, "drifts": tuple(flags["drifts"] or ())})


def url_of(settings: Settings) -> str:
    """Where a service with these settings is called."""
    host = EVERYWHERE.get(settings.host, settings.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def wrong(options: Options) -> str | None:
    """What is wrong with flags that are right one by one."""
    if options.fleet == SIMULATED:
        return None
    if options.endless or options.past is not None:
        return "--endless and --past are for a simulated fleet"
    return None if options.fleet == "-" or Path(options.fleet).exists() else f"--fleet {options.fleet}: no such file"


def _speed(text: str) -> float:
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(/s|/min|/h)?", text)
    if text == "max":
        return math.inf
    if not found or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no speed; write it as 5/s, 300/min or max")
    return float(found[1]) / SECONDS[found[2] or ""]


def _drift(text: str) -> Drift:
    try:
        return parse(text)
    except DriftError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _natural(text: str, least: int = 0) -> int:
    if not re.fullmatch(r"\d{1,15}", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, 1)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("expected seconds from 0 to 86400")
    return value
