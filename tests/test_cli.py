import argparse
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import cli
from service.codecs.arguments import suggest
from service.settings import PREFIX, Settings
from tests.support.processes import start
from tests.support.terminal import COLOUR, read_terminal

COMMANDS = ("serve", "calibrate", "predict", "replay", "score")
NOT_NEEDED = (
    "onnxruntime",
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "pyarrow",
    "structlog",
    "rich",
    "plotly",
    "argcomplete",
)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    parser: argparse.ArgumentParser = cli.build_parser().commands.choices[name]
    return parser


def flags_of(name: str) -> list[argparse.Action]:
    """Return the flags of a command that its help shows."""
    return [
        action
        for action in command_parser(name)._actions
        if action.option_strings and action.dest != "help" and action.help != argparse.SUPPRESS
    ]


def wrong_usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the last line that a command prints when it exits with 2."""
    with pytest.raises(SystemExit) as exit_code:
        cli.main(arguments)
    assert 2 == exit_code.value.code
    output = capsys.readouterr()
    assert "" == output.out
    return output.err.splitlines()[-1]


def test_version_is_printed_without_heavy_imports() -> None:
    """`--version` prints name and version, and imports neither the runtime, the web framework nor the database."""
    names = f"print([name for name in {NOT_NEEDED!r} if name in sys.modules])"
    probe = f"import atexit, sys; atexit.register(lambda: {names}); from service import cli; cli.main(['--version'])"
    lines = subprocess.check_output([sys.executable, "-c", probe], text=True).splitlines()
    assert re.fullmatch(r"engine-health \d+\.\d+\.\d+", lines[0])
    assert ["[]"] == lines[1:]


def test_no_arguments_print_help_and_exit_with_2() -> None:
    """Without a command the help is printed to standard error, and the exit code is that of wrong usage."""
    process = start()
    output, errors = process.communicate(timeout=60)
    assert (2, "") == (process.returncode, output)
    assert errors.startswith("usage: engine-health")
    assert list(COMMANDS) == re.findall(r"^    ([a-z]+)\b", errors, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_default_of_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag has exactly one `(default: ...)` in its help, and the help of each command can be printed."""
    flags = flags_of(command)
    assert len(flags) >= 3
    assert [] == [flag.option_strings[0] for flag in flags if str(flag.help).count("(default: ") != 1]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([command, "--help"])
    assert 0 == exit_code.value.code
    assert len(flags) == capsys.readouterr().out.count("(default:")


def test_help_of_serve_names_the_variable_of_each_setting() -> None:
    """Each setting is a flag of `serve`, whose help ends with the environment variable."""
    texts = {flag.dest: str(flag.help) for flag in flags_of("serve")}
    assert set(Settings.model_fields) == set(texts)
    for name, text in texts.items():
        assert text.endswith(f"[{PREFIX}{name.upper()}]")
    assert "(default: 8000)" in texts["port"]
    assert "(default: empty)" in texts["api_keys"]


BAD_VALUES = [
    (("serve", "--port", "abc"), "--port: expected a whole number from 0 to 65535, got 'abc'"),
    (("serve", "--port", "65536"), "--port: expected a whole number from 0 to 65535, got '65536'"),
    (("serve", "--workers", "0"), "--workers: expected a whole number from 1 to 256, got '0'"),
    (("serve", "--threads", "-1"), "--threads: expected a whole number of at least 0, got '-1'"),
    (("serve", "--max-queue-seconds", "0"), "--max-queue-seconds: expected a number above 0, got '0'"),
    (("serve", "--retention-days", "nan"), "--retention-days: expected a number of at least 0, got 'nan'"),
    (("serve", "--deterministic", "maybe"), "--deterministic: expected 0 or 1, got 'maybe'"),
    (("serve", "--model-digest", "12"), "--model-digest: expected a text that matches ^([0-9a-f]{64})?$, got '12'"),
    (("serve", "--log-level", "loud"), "--log-level: invalid choice: 'loud'"),
    (("calibrate", "f", "--temperature", "hot"), "--temperature: expected a number from 0.01 to 100, got 'hot'"),
    (("predict", "f", "--temperature", "0"), "--temperature: expected a number from 0.01 to 100, got '0'"),
    (("predict", "f", "--missing", "guess"), "--missing: invalid choice: 'guess'"),
    (("replay", "--patience", "never"), "--patience: expected seconds from 0 to 86400, got 'never'"),
    (("replay", "--engines", "0"), "--engines: expected engines from 1 to"),
    (("replay", "--seed", "x"), "--seed: expected a whole number from 0 to"),
    (("replay", "--speed", "fast"), "--speed: expected a speed like 5/s, 300/min or max, got 'fast'"),
    (("score", "f", "o.csv", "--threads", "x"), "--threads: expected threads from 1 to 1024, got 'x'"),
    (("score", "f", "o.csv", "--interval", "x"), "--interval: expected seconds above 0, got 'x'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_bad_flag_value_exits_with_2_and_names_the_flag(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value that a flag does not accept is rejected with the flag, the expected values and the given one."""
    line = wrong_usage(capsys, *arguments)
    assert line.startswith(f"engine-health {arguments[0]}: error: argument {message}")
    assert PREFIX not in line


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.annotation is not str])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6))
def test_serve_rejects_flag_values_only_by_flag(name: str, text: str) -> None:
    """Any value of a setting either is accepted, or is reported with the flag: no exception reaches the user."""
    parser = command_parser("serve")
    flag = "--" + name.replace("_", "-")
    with pytest.MonkeyPatch.context() as patch:
        messages: list[str] = []

        def fail(message: str) -> Any:
            messages.append(message)
            raise SystemExit(2)

        patch.setattr(parser, "error", fail)
        try:
            parser.parse_args([f"{flag}={text}"])
        except SystemExit:
            assert messages[0].startswith(f"argument {flag}: ")
            assert "invalid parse value" not in messages[0]


def test_bad_variable_exits_with_1_and_names_the_variable() -> None:
    """A value of the environment that a setting does not accept is reported with its variable, in one line."""
    process = start("serve", ENGINE_HEALTH_PORT="abc")
    _, errors = process.communicate(timeout=60)
    assert 1 == process.returncode
    assert errors.startswith("engine-health: ENGINE_HEALTH_PORT=abc: ")
    assert 1 == len(errors.splitlines())


MISSPELLINGS = [
    (("sevre",), "'serve'"),
    (("serve", "--prot", "8000"), "'--port'"),
    (("serve", "--prot=8000"), "'--port'"),
    (("serve", "--log-level", "warn"), "'warning'"),
    (("serve", "--log-format", "jsno"), "'json'"),
    (("calibrate", "f", "--jsno"), "'--json'"),
    (("predict", "f", "--misisng", "hold"), "'--missing'"),
    (("predict", "f", "--missing", "holt"), "'hold'"),
    (("replay", "--enignes", "3"), "'--engines'"),
    (("score", "f", "o.csv", "--lables", "truth"), "'--labels'"),
    (("score", "f", "o.csv", "--backend", "locla"), "'local'"),
]


@pytest.mark.parametrize(("arguments", "suggestion"), MISSPELLINGS)
def test_misspelling_suggests_the_nearest_name(
    arguments: tuple[str, ...], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown command, flag or choice exits with 2 and suggests the nearest known one."""
    assert wrong_usage(capsys, *arguments).endswith(f"; did you mean {suggestion}?")


def test_unlike_word_suggests_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that is similar to no known one is reported without a suggestion."""
    assert wrong_usage(capsys, "serve", "--zzz").endswith("unrecognized arguments: --zzz")
    assert "" == suggest("zzz", COMMANDS)


def completions(line: str) -> list[str]:
    """Return what the shell offers after a line, as bash asks for it."""
    protocol = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
    position = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    command = 'exec "$0" -m service.cli 8>&1 9>/dev/null >/dev/null'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable], env=os.environ | protocol | position, capture_output=True, text=True
    )
    assert 0 == result.returncode, result.stderr
    return [word.strip() for word in result.stdout.split("\n")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("engine-health ", {"--version", *COMMANDS}),
        ("engine-health s", {"serve", "score"}),
        ("engine-health serve --po", {"--port"}),
        ("engine-health serve --log-level ", {"debug", "info", "warning", "error"}),
        ("engine-health score a.csv b.csv --missing h", {"hold"}),
    ],
)
def test_shell_completes_commands_flags_and_choices(line: str, words: set[str]) -> None:
    """The shell completes commands, flags and choices through argcomplete."""
    pytest.importorskip("argcomplete")
    assert words <= set(completions(line))


def test_command_is_marked_for_global_completion() -> None:
    """The module has argcomplete's marker within its first 1024 bytes, where global completion looks for it."""
    assert b"PYTHON_ARGCOMPLETE_OK" in Path(cli.__file__).read_bytes()[:1024]


def terminal_output(*arguments: str, **environment: str) -> bytes:
    """Return what a command writes to a terminal. A service is interrupted when it runs."""
    own_side, terminal = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env=variables | environment,
    )
    os.close(terminal)
    output = b""
    for chunk in read_terminal(own_side):
        output += chunk
        if b"Uvicorn running" in chunk:
            process.send_signal(signal.SIGINT)
    os.close(own_side)
    assert 0 == process.wait(timeout=30), output
    return output


SERVE = ("serve", "--port", "0", "--drain-seconds", "0", "--database-url", "")


def test_terminal_gets_colours_unless_no_color_is_set() -> None:
    """On a terminal the log of `serve`, uvicorn's lines included, has colours; with NO_COLOR it has none."""
    assert COLOUR.search(terminal_output(*SERVE, NO_COLOR=""))  # empty counts as not set
    plain = terminal_output(*SERVE, NO_COLOR="1")
    assert b"Uvicorn running" in plain
    assert not COLOUR.search(plain)


def test_pipe_gets_no_colours() -> None:
    """A log in the text format that is not written to a terminal has no escape sequence."""
    process = start(*SERVE, ENGINE_HEALTH_LOG_FORMAT="text", ENGINE_HEALTH_LOG_LEVEL="info")
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Uvicorn running" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0, lines
    process.communicate()
    assert len(lines) > 1
    assert "\x1b" not in "".join(lines)


def test_exception_in_text_log_is_a_plain_traceback() -> None:
    """An exception is logged with its traceback, without colours and without a warning of the log library."""
    probe = (
        "import structlog\nfrom service import logs\nfrom service.settings import read_settings\n"
        "logs.configure(read_settings(log_format='text'))\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    structlog.get_logger().exception('failed')\n"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "\x1b" not in result.stderr
    assert "Warning" not in result.stderr
