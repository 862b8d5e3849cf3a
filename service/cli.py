"""The command `engine-health`: reads settings, starts the service, turns failures into one line and an exit code."""

import argparse
import signal
import sys
from collections.abc import Sequence

import uvicorn

from service import logs
from service.api.app import create_app
from service.errors import SettingsRejected
from service.settings import PREFIX, Settings, read_settings
from service.workers import configuration, serve_many

SWITCHES = tuple(Settings.model_fields)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    flags = vars(_parser().parse_args(arguments))
    flags.pop("command")
    try:
        settings = read_settings(**flags)
    except SettingsRejected as error:
        return _failed(error.detail)
    return serve(settings)


def serve(settings: Settings) -> int:
    """Serve until told to stop; 1 if the artefact or the address cannot be used."""
    logs.configure(settings)
    # uvicorn raises the signal again once it has stopped: to be told to stop is no failure
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reasons: list[str] = []
    try:
        if settings.workers > 1:
            return serve_many(settings)

        def stop(reason: str) -> None:
            reasons.append(reason)
            server.should_exit = True

        server = uvicorn.Server(configuration(settings, app=create_app(settings, stop).served))
        server.run()
    except KeyboardInterrupt:
        return 0
    except SystemExit:
        return 1  # uvicorn could not bind, and has said so
    return _failed(reasons[0]) if reasons else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("engine-health", description="Calibrated health of turbofan engines.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="serve the model over HTTP")
    for name in SWITCHES:
        field = Settings.model_fields[name]
        command.add_argument("--" + name.replace("_", "-"), help=f"{field.description} [{PREFIX}{name.upper()}]")
    return parser


def _failed(reason: str) -> int:
    print(f"engine-health: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
