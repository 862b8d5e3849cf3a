"""Write the tables that are generated from code: settings, endpoints, modules and packages, and results from the card.

python docs/tables.py            write them
python docs/tables.py --check    fail if a document differs from the code
"""

import argparse
import ast
import difflib
import math
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from service.settings import BUNDLED, PREFIX, Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, ARCHITECTURE = ROOT / "README.md", DOCS / "architecture.md"
MAIN_SETTINGS = ("PORT", "WORKERS", "MODEL", "DATABASE_URL", "API_KEYS", "ADMIN_KEYS")
RESULT_COLUMNS = ("subset", "n", "accuracy", "macro-F1", "cross-entropy", "ECE", "RUL RMSE")
TOP = ("model", "export", "service")  # folders of the project's own packages
NAME = 23  # width of the column of module names, in characters


def settings(names: Collection[str] = tuple(Settings.model_fields)) -> Iterator[str]:
    """Yield one line per setting: variable, default and description."""
    yield "| variable | default | meaning |"
    yield "| --- | --- | --- |"
    for name in names:
        field = Settings.model_fields[name]
        default = BUNDLED.relative_to(ROOT) if field.default == BUNDLED else field.default
        shown = f"`{default}`" if str(default) else "empty"
        yield f"| `{PREFIX}{name.upper()}` | {shown} | {field.description} |"


def main_settings() -> Iterator[str]:
    """Yield one line per setting that most users change."""
    yield from settings([name.lower() for name in MAIN_SETTINGS])


def endpoints() -> Iterator[str]:
    """Yield one line per route, as the OpenAPI document describes it."""
    from service.app import create_app
    from service.settings import read_settings

    yield "| call | response or effect |"
    yield "| --- | --- |"
    for path, operations in create_app(read_settings(), print).api.openapi()["paths"].items():
        for method, operation in operations.items():
            yield f"| `{method.upper()} {path}` | {operation['description'].splitlines()[0]} |"
    yield "| `GET /` | The console: fleet, engine, calibration, explorer. |"
    yield "| `GET /docs` | This API as a page with a form per call. It loads nothing from other hosts. |"


def metrics() -> Iterator[str]:
    """Yield one line per metric: name, type and help text."""
    from prometheus_client import CollectorRegistry

    from service.metrics import Metrics

    registry = CollectorRegistry()
    Metrics(registry)
    yield "| metric | type | meaning |"
    yield "| --- | --- | --- |"
    for metric in sorted(registry.collect(), key=lambda metric: metric.name):
        suffix = "_total" if metric.type == "counter" else ""
        yield f"| `{metric.name}{suffix}` | {metric.type} | {metric.documentation} |"


def tree() -> Iterator[str]:
    """Yield one line per module: the first line of its docstring, or of the first comment of a script."""
    yield "```"
    for folder in package_folders(ROOT):
        yield f"{folder.relative_to(ROOT)}/"
        for path in sorted(folder.glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            if path.name != "__init__.py":
                yield f"  {path.name:<{NAME}}{docstring.splitlines()[0].rstrip('.')}"
    for folder in sorted({path.parent for path in (ROOT / "service").rglob("*.js")}):
        yield f"{folder.relative_to(ROOT)}/"
        for path in sorted(folder.glob("*.js")):
            yield f"  {path.name:<{NAME}}{path.read_text().splitlines()[0].removeprefix('// ').rstrip('.')}"
    yield "```"


class Module(NamedTuple):
    """A module of the project: number of lines, lines of each function, and the names that it imports."""

    lines: int
    functions: list[int]
    imports: set[str]


def package_folders(root: Path) -> list[Path]:
    """Return the folder of every package of the project, the top level of each first."""
    folders = [path.parent for top in TOP for path in sorted((root / top).rglob("__init__.py"))]
    if not folders:
        raise SystemExit(f"no packages in {root}: expected folders {', '.join(TOP)} with an __init__.py")
    return sorted(folders, key=lambda folder: (TOP.index(folder.relative_to(root).parts[0]), folder))


def read_module(path: Path) -> Module:
    """Read the figures of a module. Imports inside functions are included."""
    text = path.read_text()
    functions, imports = [], set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
        elif isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imports |= {f"{node.module}.{alias.name}" for alias in node.names}
    return Module(len(text.splitlines()), functions, imports)


def packages(root: Path = ROOT) -> Iterator[str]:
    """Yield one line per package: modules, lines, sizes, and imports from and by other packages."""
    modules: dict[str, Module] = {}
    package_of: dict[str, str] = {}
    for folder in package_folders(root):
        package = ".".join(folder.relative_to(root).parts)
        package_of[package] = package  # `from package import name` is an import of the package
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                modules[f"{package}.{path.stem}"] = read_module(path)
                package_of[f"{package}.{path.stem}"] = package
    targets = {
        name: {_imported(imported, package_of) for imported in module.imports} - {None}
        for name, module in modules.items()
    }
    edges = [
        (package_of[name], package_of[target])
        for name, imported in targets.items()
        for target in imported
        if target and package_of[name] != package_of[target]
    ]
    yield "| package | modules | lines | median module | median function | p90 function | imports in | imports out |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for package in dict.fromkeys(package_of.values()):
        own = [module for name, module in modules.items() if package_of[name] == package]
        if not own:
            continue
        sizes = sorted(size for module in own for size in module.functions)
        figures = (
            *(len(own), sum(module.lines for module in own), _rank([module.lines for module in own], 0.5)),
            *(_rank(sizes, 0.5), _rank(sizes, 0.9)),
            *(sum(package == into for _, into in edges), sum(package == out for out, _ in edges)),
        )
        yield f"| `{package.replace('.', '/')}` | {' | '.join(f'{figure:,}' for figure in figures)} |"


def _imported(name: str, modules: dict[str, str]) -> str | None:
    """Return the module or package of the project that an imported name is or belongs to."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def _rank(values: list[int], share: float) -> int:
    """Return the nearest-rank quantile of the values; 0 if there are none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0


def results() -> Iterator[str]:
    """Yield the results of all cycles of each subset, from the table of the model card."""
    card = (DOCS / "model-card.md").read_text()
    head, _, *rows = card.split("<!-- results -->\n")[1].split("\n<!-- /results -->")[0].split("\n")
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    yield f"| {' | '.join(RESULT_COLUMNS)} |"
    yield f"| --- |{' ---: |' * (len(RESULT_COLUMNS) - 1)}"
    for line in rows:
        if line.startswith("| every cycle") and "| all |" not in line:
            row = dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            yield f"| {' | '.join(row[column] for column in RESULT_COLUMNS)} |"


def replaced(text: str, name: str, lines: Iterator[str]) -> str:
    """Return the text with everything between the markers of a table replaced by its lines."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text:
        raise SystemExit(f"the document has no markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]


def generated_tables() -> dict[Path, dict[str, Callable[[], Iterator[str]]]]:
    """Return the generators of all tables: by document, then by marker."""
    return {
        README: {"results": results, "main settings": main_settings},
        DOCS / "api.md": {"endpoints": endpoints},
        DOCS / "configuration.md": {"settings": settings},
        DOCS / "monitoring.md": {"metrics": metrics},
        ARCHITECTURE: {"packages": packages},
        DOCS / "layout.md": {"tree": tree},
    }


def main() -> None:
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description="Write the tables that are generated from code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document differs from the code")
    flags = parser.parse_args()
    for path, tables in generated_tables().items():
        before = path.read_text()
        after = before
        for name, make in tables.items():
            after = replaced(after, name, make())
        if flags.check and after != before:
            lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), path.name, "code")
            sys.stdout.writelines(lines)
            raise SystemExit(f"{path.relative_to(ROOT)} differs from the code: run `make tables`")
        path.write_text(after)


if __name__ == "__main__":
    main()
