"""The tables of the README that code knows better: settings, endpoints, rooms, results.

python docs/tables.py            writes them (results only if C-MAPSS is there)
python docs/tables.py --check    fails if the README differs from the code; results are checked by a test
"""

import argparse
import ast
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

from service.settings import BUNDLED, PREFIX, Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ROOMS = ("model", "export", "service", "service/replay", "service/score", "service/storage", "service/api")
CONSOLE = "service/api/console"
NAME = 23  # characters of a module's name, and what is between it and its sentence


def settings() -> Iterator[str]:
    """One line a setting: variable, default, unit and reason."""
    yield "| variable | default | what it is |"
    yield "| --- | --- | --- |"
    for name, field in Settings.model_fields.items():
        default = BUNDLED.relative_to(ROOT) if field.default == BUNDLED else field.default
        shown = f"`{default}`" if str(default) else "empty"
        yield f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |"


def endpoints() -> Iterator[str]:
    """One line a route, as the OpenAPI document describes it."""
    from service.api.app import create_app
    from service.settings import read_settings

    yield "| call | what it answers |"
    yield "| --- | --- |"
    for path, operations in create_app(read_settings(), print).api.openapi()["paths"].items():
        for method, operation in operations.items():
            yield f"| `{method.upper()} {path}` | {operation['description'].splitlines()[0]} |"
    yield "| `GET /` | The console: fleet, engine, calibration, explorer. |"
    yield "| `GET /docs` | This API, to try in the browser; loads nothing from another host. |"


def tree() -> Iterator[str]:
    """One line a module: the first sentence of its docstring, or of the comment that a script opens with."""
    yield "```"
    for room in ROOMS:
        yield f"{room}/"
        for path in sorted((ROOT / room).glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if path.name != "__init__.py":
                yield f"  {path.name:<{NAME}}{docstring.splitlines()[0].rstrip('.')}"
    yield f"{CONSOLE}/"
    for path in sorted((ROOT / CONSOLE).glob("*.js")):
        yield f"  {path.name:<{NAME}}{path.read_text().splitlines()[0].removeprefix('// ').rstrip('.')}"
    yield "```"


def results() -> Iterator[str]:
    """The results of the bundled artefact on the official test engines."""
    from model import cmapss
    from model.evaluate import ARTEFACT, open_artefact, table

    yield from table(cmapss.data_folder(), *open_artefact(ARTEFACT))


def replaced(text: str, name: str, lines: Iterator[str]) -> str:
    """The text with everything between the markers of a table replaced by its lines."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"no markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description="README tables from code.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", action="store_true", help="also run the artefact over the test engines")
    flags = parser.parse_args()
    before = README.read_text()
    after = before
    for make in (settings, endpoints, tree, *((results,) if flags.results else ())):
        after = replaced(after, make.__name__, make())
    if flags.check and after != before:
        sys.stdout.writelines(
            difflib.unified_diff(before.splitlines(True), after.splitlines(True), "README.md", "code")
        )
        raise SystemExit("README.md differs from the code: run `make docs`")
    README.write_text(after)


if __name__ == "__main__":
    main()
