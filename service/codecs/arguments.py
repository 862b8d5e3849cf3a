"""Command-line arguments: a parser that suggests the nearest name for a misspelling, and parsers of values.

Imports only the standard library, so that `--version` and shell completion are fast.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

_FLAG = re.compile(r"--[a-z][a-z-]*")


class ArgumentParser(argparse.ArgumentParser):
    """Parser that suggests the nearest name for an unknown command, flag or choice. Its commands use this class too."""

    commands: Any = None  # the action of `add_commands`, if the parser has commands

    def add_commands(self) -> Any:
        """Return an object whose `add_parser` adds a command. The name of the command is stored as `command`."""
        self.commands = self.add_subparsers(dest="command", metavar="COMMAND", title="commands")
        return self.commands

    def parse_arguments(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse arguments. Exit with code 2 and one error line if one is unknown or invalid."""
        flags, unknown = self.parse_known_args(arguments)
        if unknown:
            parser = self if self.commands is None or flags.command is None else self.commands.choices[flags.command]
            parser.reject_unknown(unknown)
        return flags

    def reject_unknown(self, unknown: list[str]) -> NoReturn:
        """Exit with code 2. The error line names the unknown arguments and the nearest flag of this command."""
        flags = (text.partition("=")[0] for text in unknown if text.startswith("--"))
        suggestions = (suggest(flag, _FLAG.findall(self.format_usage())) for flag in flags)
        self.error(f"unrecognized arguments: {' '.join(unknown)}{next(filter(None, suggestions), '')}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            suggestion = suggest(value, map(str, action.choices or ()))
            raise argparse.ArgumentError(action, error.message + suggestion) from None


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'serve'?` for the known word nearest to `word`, or an empty text if none is near."""
    nearest = get_close_matches(word, known, 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def integer_parser(unit: str, minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `minimum` to `maximum`. Its errors name the unit, for example `rows`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and minimum <= int(text) <= maximum):
            raise argparse.ArgumentTypeError(f"expected {unit} from {minimum} to {maximum}, got {text!r}")
        return int(text)

    return parse


def number_parser(unit: str, minimum: float, maximum: float) -> Callable[[str], float]:
    """Return a parser of numbers from `minimum` to `maximum`. Its errors name the unit, for example `seconds`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected {unit} from {minimum:g} to {maximum:g}, got {text!r}")
        return value

    return parse
