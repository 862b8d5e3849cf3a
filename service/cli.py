# PYTHON_ARGCOMPLETE_OK
"""The command `engine-health`: read settings, run one command, report a failure as one line and an exit code."""

import argparse
import gc
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from model.numerics import MAX_TEMPERATURE, MIN_TEMPERATURE
from service.codecs.arguments import ArgumentParser, number_parser
from service.errors import ServiceError
from service.replay import options as replay_options
from service.scoring import command as score_command
from service.server import malloc
from service.settings import PREFIX, Settings, read_settings

WRONG_USAGE = 2
INTERRUPTED = 130  # the convention of shells: 128 + SIGINT
COMPLETION_VARIABLE = "_ARGCOMPLETE"  # set by the shell when it asks for completions
MODEL_HELP = f"path of the artefact (default: {PREFIX}MODEL, else the bundled artefact)"
SETTING_KINDS: dict[Any, str] = {bool: "0 or 1", int: "a whole number", float: "a number"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code: 0 done, 1 failed, 2 wrong usage, 3 rejected rows, 130 interrupted."""
    parser = build_parser()
    if COMPLETION_VARIABLE in os.environ:
        import argcomplete  # running a command does not need it

        argcomplete.autocomplete(parser)  # prints the completions and exits
    flags = vars(parser.parse_arguments(arguments))
    command = flags.pop("command")
    if command is None:
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    try:
        return COMMANDS[command](**flags)
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
    from service.inference import model_loader  # serving, which must start fast, does not need it

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
    from service.scoring.latest import predict_file  # serving does not need it

    return predict_file(file, read_settings(model=model), temperature, missing, as_json)


def replay(parser: ArgumentParser, **flags: Any) -> int:
    """Send a fleet to a running service."""
    options = replay_options.build_options(flags, read_settings())
    conflict = replay_options.find_flag_conflict(options)
    if conflict:
        parser.error(conflict)
    from service.replay.run import replay_fleet  # serving does not need it

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM has the effect of Ctrl-C
    return replay_fleet(options)


def score(model: Path | None, threads: int | None, **flags: Any) -> int:
    """Score files to a file."""
    from service import logs  # --help, --version and completion do not need it

    settings = read_settings(model=model, threads=threads)
    options = score_command.build_options(flags)
    logs.configure(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM has the effect of Ctrl-C
    try:
        from service.scoring import job  # serving does not need it, and its packages may be absent

        return job.score_files(options, settings)
    except ModuleNotFoundError as error:
        if error.name not in score_command.EXTRA_OF_PACKAGE:
            raise
        return _failed(f"score needs {error.name}, which is not installed; run: {_install_command(error.name)}")


def serve(**flags: Any) -> int:
    """Serve until a signal stops the service. Return 1 if the artefact or the address cannot be used."""
    settings = read_settings(**flags)
    malloc.configure()  # must precede large allocations
    gc.disable()  # imported objects are never freed; opening the first model enables collection
    from service import logs
    from service.serve import serve_many, serve_one  # imports take a second, and no other command needs them

    logs.configure(settings)
    # uvicorn raises the signal again after it has stopped, which is no failure
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is no model to reload until its handler is installed
    try:
        if settings.workers > 1:
            return serve_many(settings)
        reason = serve_one(settings)
    except KeyboardInterrupt:
        return 0
    except SystemExit:
        return 1  # uvicorn could not bind the address, and has logged it
    return _failed(reason) if reason else 0


COMMANDS: dict[str, Callable[..., int]] = {f.__name__: f for f in (serve, calibrate, predict, replay, score)}


def build_parser() -> ArgumentParser:
    """Return the parser of all commands and flags."""
    parser = ArgumentParser("engine-health", description="Calibrated health of turbofan engines.")
    text = "print the version and exit"
    parser.add_argument("--version", action=_PrintVersion, nargs=0, dest=argparse.SUPPRESS, help=text)
    commands = parser.add_commands()
    command = commands.add_parser("serve", help="serve the model over HTTP", description="Serve the model over HTTP.")
    for name, field in Settings.model_fields.items():
        _add_setting(command, name, field)
    text = "fit a temperature to a file of logits and labels"
    command = commands.add_parser("calibrate", help=text, description=f"{text.capitalize()}.")
    command.add_argument("file", type=Path, help="CSV with engine_id, label and logit_CLASS columns, or JSON lines")
    command.add_argument("--model", type=Path, help=f"{MODEL_HELP}; its classes are those of the file")
    parse_temperature = number_parser("a number", MIN_TEMPERATURE, MAX_TEMPERATURE)
    own_temperature = "(default: the temperature of the model)"
    text = f"temperature that the fit is compared with {own_temperature}"
    command.add_argument("--temperature", type=parse_temperature, metavar="T", help=text)
    command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object (default: off)")
    text = "print the newest health of each engine of a file, without a service"
    command = commands.add_parser("predict", help=text, description=f"{text.capitalize()}.")
    command.add_argument("file", help="C-MAPSS text or CSV, plain or gzipped; - is standard input")
    command.add_argument("--model", type=Path, help=MODEL_HELP)
    text = f"temperature of the predictions {own_temperature}"
    command.add_argument("--temperature", type=parse_temperature, metavar="T", help=text)
    text = "reject a missing value, or hold the last value of its channel (default: %(default)s)"
    command.add_argument("--missing", choices=("reject", "hold"), default="reject", help=text)
    text = "print one JSON object per engine (default: off)"
    command.add_argument("--json", action="store_true", dest="as_json", help=text)
    text = "send a fleet to a running service, flight by flight"
    command = commands.add_parser("replay", help=text, description=f"{text.capitalize()}.")
    replay_options.add_replay_flags(command)
    command.set_defaults(parser=command)
    score_command.add_score_command(commands, parse_temperature)
    return parser


def _add_setting(command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """Add the flag of a setting. Its help shows the default and the environment variable of the setting."""
    default = int(field.default) if isinstance(field.default, bool) else field.default
    shown = "empty" if default == "" else f"{default:g}" if isinstance(default, float) else str(default)
    text = f"{field.description} (default: {shown}) [{PREFIX}{name.upper()}]".replace("%", "%%")
    choices = get_args(field.annotation)  # the values of a Literal, else empty
    value: dict[str, Any] = {"choices": choices} if choices else {"type": _setting_parser(field), "metavar": "VALUE"}
    command.add_argument("--" + name.replace("_", "-"), help=text, **value)


def _setting_parser(field: FieldInfo) -> Callable[[str], Any]:
    """Return a parser of the values of a setting, so that an error names the flag and not the variable."""

    def parse(text: str) -> Any:
        value_type: Any = Annotated[field.annotation, field]
        try:
            return TypeAdapter(value_type).validate_python(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"expected {_describe_expected(field)}, got {text!r}") from None

    return parse


def _describe_expected(field: FieldInfo) -> str:
    """Return the values that a setting accepts, for example `a whole number from 0 to 65535`."""
    names = ("ge", "gt", "le", "pattern")
    rules = {name: getattr(item, name) for item in field.metadata for name in names if hasattr(item, name)}
    if "pattern" in rules:
        return f"a text that matches {rules['pattern']}"
    kind = SETTING_KINDS.get(field.annotation, "a text")
    if "le" in rules:
        return f"{kind} from {rules['ge']} to {rules['le']}"
    if "gt" in rules:
        return f"{kind} above {rules['gt']}"
    return f"{kind} of at least {rules['ge']}" if "ge" in rules else kind


class _PrintVersion(argparse.Action):
    """Print the version of the installed package and exit. It is read only if the flag is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('engine-health')}")
        parser.exit()


def _install_command(package: str) -> str:
    """Return a shell command that installs a missing package for this interpreter, in a clone the whole extra."""
    root = Path(__file__).parents[1]
    extra = score_command.EXTRA_OF_PACKAGE[package]
    what = ["-e", f"{root}[{extra}]"] if (root / "pyproject.toml").exists() else [package]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])


def _failed(reason: str) -> int:
    print(f"engine-health: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
