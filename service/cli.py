"""The command `engine-health`: read settings, run one command, report a failure as one line and an exit code."""

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.numerics import MAX_TEMPERATURE, MIN_TEMPERATURE
from service import logs
from service.errors import ServiceError
from service.replay import options as replay_options
from service.scoring import command as score_command
from service.server import malloc
from service.settings import PREFIX, Settings, read_settings

SWITCHES = tuple(Settings.model_fields)
INTERRUPTED = 130  # the convention of shells: 128 + SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    command = flags.pop("command")
    try:
        if command in ("predict", "replay"):
            return predict(**flags) if command == "predict" else replay(parser, **flags)
        if command == "score":
            return score(flags)
        return calibrate(**flags) if command == "calibrate" else serve(read_settings(**flags))
    except ServiceError as error:
        return _failed(error.detail)
    except BrokenPipeError:  # the reader of standard output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing does not fail again
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def calibrate(file: Path, model: Path | None, temperature: float | None, as_json: bool) -> int:
    """Fit a temperature to a file and print it."""
    from service.calibration import fit_file
    from service.inference import model_loader  # not needed for serving, which starts in 0.5 s

    manifest = model_loader.open_model(read_settings(model=model).model).manifest
    compared = manifest.temperature if temperature is None else temperature
    fit = fit_file.from_file(file, manifest.classes, compared)
    if as_json:
        print(json.dumps(asdict(fit)))
    else:
        print("\n".join(fit_file.lines(fit, compared)))
    return 0


def predict(file: str, model: Path | None, temperature: float | None, missing: str, as_json: bool) -> int:
    """Print the newest health of each engine of a file."""
    from service.scoring.latest import predict_file  # as in `calibrate`

    return predict_file(file, read_settings(model=model), temperature, missing, as_json)


def replay(parser: argparse.ArgumentParser, **flags: Any) -> int:
    """Send a fleet to a running service."""
    options = replay_options.build_options(flags, read_settings())
    conflict = replay_options.find_flag_conflict(options)
    if conflict:
        parser.error(conflict)
    from service.replay.run import replay_fleet  # as in `calibrate`

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    return replay_fleet(options)


def score(flags: dict[str, Any]) -> int:
    """Score a file to a file."""
    settings = read_settings(model=flags.pop("model"), threads=flags.pop("threads"))
    options = score_command.build_options(flags)
    logs.configure(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        from service.scoring import job  # not needed for serving

        return job.score_files(options, settings)
    except ModuleNotFoundError as error:
        if error.name not in score_command.EXTRA_OF_PACKAGE:
            raise
        return _failed(f"score needs {error.name}: install engine-health[{score_command.EXTRA_OF_PACKAGE[error.name]}]")


def serve(settings: Settings) -> int:
    """Serve until a signal stops it; 1 if the artefact or the address cannot be used."""
    malloc.configure()  # before large allocations
    gc.disable()  # imported objects stay; opening the first model enables it
    from service.serve import serve_many, serve_one  # imports take a second, and no other command needs them

    logs.configure(settings)
    # uvicorn raises the signal again once it has stopped; that is no failure
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until its handler is installed, no model is open for reloading
    try:
        if settings.workers > 1:
            return serve_many(settings)
        reason = serve_one(settings)
    except KeyboardInterrupt:
        return 0
    except SystemExit:
        return 1  # uvicorn could not bind, and has logged it
    return _failed(reason) if reason else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("engine-health", description="Calibrated health of turbofan engines.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="serve the model over HTTP")
    for name in SWITCHES:
        field = Settings.model_fields[name]
        command.add_argument("--" + name.replace("_", "-"), help=f"{field.description} [{PREFIX}{name.upper()}]")
    command = commands.add_parser("calibrate", help="fit a temperature to a file of logits and labels")
    command.add_argument("file", type=Path, help="CSV with engine_id, label and logit_CLASS columns, or JSON lines")
    command.add_argument("--model", type=Path, help="artefact whose classes these are; the configured one if not given")
    command.add_argument("--temperature", type=_temperature, help="to compare with; the artefact's if not given")
    command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    command = commands.add_parser("predict", help="the newest health of each engine of a file, without a service")
    command.add_argument("file", help="C-MAPSS text or CSV, plain or gzipped; - is standard input")
    command.add_argument("--model", type=Path, help="artefact that answers; the configured one if not given")
    command.add_argument("--temperature", type=_temperature, help="in place of the artefact's")
    command.add_argument("--missing", choices=("reject", "hold"), default="reject", help="hold the last seen value")
    command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object an engine")
    replay_options.add_replay_flags(
        commands.add_parser("replay", help="send a fleet to a running service, flight by flight")
    )
    score_command.add_score_command(commands, _temperature)
    return parser


def _temperature(text: str) -> float:
    value = float(text)
    if not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"expected a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}")
    return value


def _failed(reason: str) -> int:
    print(f"engine-health: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
