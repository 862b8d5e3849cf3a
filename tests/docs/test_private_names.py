"""Tests of the table of private names in docs/development.md: names are used, tests exist, packages are bounded."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from service.codecs.parse import parse
from service.codecs.requests import PredictRequest
from service.errors import InvalidInput

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "development.md").read_text().partition("## Dependencies on private names")[2]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE.splitlines() if line.startswith("| ")]
HEAD, _, *USES = ROWS
PACKAGES = sorted({package for package, *_ in USES})
each_use = pytest.mark.parametrize("use", USES, ids=[f"{k}-{use[0]}" for k, use in enumerate(USES)])


def quoted(text: str) -> list[str]:
    """Return the texts in backticks."""
    return re.findall(r"`([^`]+)`", text)


def names_of(path: Path) -> set[str]:
    """Return every name that a module imports, defines or uses, and the words of its texts."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.alias(name=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Constant(value=str(text)):
                names |= {text, text.removeprefix("^").partition(" `")[0]}
    return names | {part for name in names for part in re.findall(r" - at ", name)}


USED = set[str]().union(*(names_of(path) for path in (ROOT / "service").rglob("*.py")))
TESTS = {
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


def test_table_has_all_extended_packages() -> None:
    """The table has its four columns and the packages that the service extends."""
    assert 4 == len(HEAD)
    assert {4} == set(map(len, USES))
    assert {"httptools", "msgspec", "prometheus-client", "pysimdjson", "starlette", "uvicorn", "uvloop"} == set(
        PACKAGES
    )


@each_use
def test_listed_names_are_used(use: list[str]) -> None:
    """Each listed name occurs in the code of the service; the files are checked by test_docs."""
    _, names, files, _ = use
    assert quoted(names)
    assert quoted(files)
    assert [] == [name for name in quoted(names) if name not in USED]


@each_use
def test_listed_tests_exist(use: list[str]) -> None:
    """Each row names at least one test, and every test that it names exists."""
    named = quoted(use[3])
    assert named
    assert [] == [name for name in named if name not in TESTS]


@pytest.mark.parametrize("package", PACKAGES)
def test_listed_package_is_bounded_to_its_locked_minor_version(package: str) -> None:
    """The declaration of each listed package admits one minor version: the one in requirements.lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    declared = [requirement for requirement in map(Requirement, texts) if requirement.name == package]
    assert declared
    locked = re.findall(rf"^{package}==((\d+)\.(\d+)[\d.]*)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    for version, major, minor in locked:
        bounds = {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}
        for requirement in declared:
            assert bounds == {str(bound) for bound in requirement.specifier}, package
            assert requirement.specifier.contains(version)


def test_unknown_field_is_named_by_its_place() -> None:
    """An unknown field and a wrong type are located from the wording of msgspec's message."""
    with pytest.raises(InvalidInput) as unknown:
        parse(b'{"instances": [{"telemetry": [[1]]}], "extra": 1}', PredictRequest)
    assert [(("extra",), "unknown field")] == [tuple(fault) for fault in unknown.value.faults]
    with pytest.raises(InvalidInput) as wrong:
        parse(b'{"instances": [{"telemetry": [[1]]}, {"telemetry": [[1]], "engine_id": 5}]}', PredictRequest)
    assert ("instances", 1, "engine_id") == wrong.value.faults[0].loc
