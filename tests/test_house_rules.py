import ast
import re
import signal
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.evaluation.evaluate import ARTEFACT, open_artefact, results_table
from tests.support.processes import running

ROOT = Path(__file__).parent.parent
TEST_MODULES = sorted((ROOT / "tests").rglob("test_*.py"))
FILES = [ROOT / name for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]


def children(folder: Path) -> set[str]:
    """Return the names of the modules and packages directly in a package."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")} - {"__init__"}


def functions_of(path: Path) -> list[ast.FunctionDef]:
    """Return the test functions of a module."""
    body = ast.parse(path.read_text()).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_test_has_a_docstring() -> None:
    """Every test function states its promise in a docstring."""
    functions = [(path, node) for path in TEST_MODULES for node in functions_of(path)]
    assert len(functions) > 700
    assert [] == [f"{path.name}:{node.lineno}" for path, node in functions if not ast.get_docstring(node)]


def test_layers_name_every_package_and_module() -> None:
    """Every module and package of service, model and export is in a layer that import-linter checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c for c in contracts if c["type"] == "layers"}
    assert {"service", "model", "export"} == set(layers)
    for root, contract in layers.items():
        named = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
        assert contract["exhaustive"] is True
        assert children(ROOT / root) == {name for name in named if not name.startswith("(")}


def test_service_top_level_has_only_entry_points_and_utilities() -> None:
    """All modules of the service are in packages, except entry points and utilities."""
    allowed = ["cli", "serve", "app", "lifecycle", "settings", "errors", "metrics", "logs", "tracing", "ids"]
    assert set(allowed) == {path.stem for path in (ROOT / "service").glob("*.py")} - {"__init__"}


def test_packages_have_at_most_25_modules() -> None:
    """No package of the service, the model or the export has more than 25 modules."""
    counts = {
        str(path.parent.relative_to(ROOT)): len(list(path.parent.glob("*.py"))) - 1
        for root in ("service", "model", "export")
        for path in (ROOT / root).rglob("__init__.py")
    }
    assert len(counts) > 10
    assert {} == {name: count for name, count in counts.items() if count > 25}


def test_no_test_module_imports_another() -> None:
    """Tests, benchmarks, documents and ops import helpers from tests/support only."""
    sources = [path for root in ("tests", "benchmarks", "docs", "ops") for path in (ROOT / root).rglob("*.py")]
    assert len(sources) > 100
    pattern = re.compile(r"^\s*(?:from|import) tests\.(?!support)", re.MULTILINE)
    assert [] == [str(path.relative_to(ROOT)) for path in sources if pattern.search(path.read_text())]


def test_tests_mirror_the_packages() -> None:
    """Each package of the service has a folder of tests with the same name."""
    packages = {path.parent.name for path in (ROOT / "service").glob("*/__init__.py")}
    assert len(packages) > 7
    assert packages <= {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}


def test_no_file_names_a_package_registry_or_contains_data() -> None:
    """No file names the host of a package registry, and no file of the data set is in the repository."""
    hosts = re.compile(rb"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian\.org|download\.pytorch|conda\.anaconda")
    checked = [path for path in FILES if path.exists() and path != Path(__file__)]
    assert len(checked) > 300
    for path in checked:
        assert not hosts.search(path.read_bytes()), path
        assert not re.match(r"(train|test|RUL)_FD00\d", path.name)


def test_production_lock_has_hashes_and_no_torch() -> None:
    """Every package of requirements.lock has hashes, and none of them is for training."""
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE)
    assert {"fastapi", "uvicorn", "onnxruntime", "prometheus-client"} <= set(pinned)
    assert not {"torch", "onnx", "pandas"} & set(pinned)
    entries = re.split(r"^(?=[a-z0-9.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)


def read_rows(lines: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a Markdown table by column."""
    head, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in cells]


@pytest.fixture(scope="module")
def measured(cmapss_dir: Path) -> list[dict[str, str]]:
    """The results of the committed artefact on the official test engines."""
    return read_rows(list(results_table(cmapss_dir, *open_artefact(ARTEFACT))))


def test_model_card_has_the_results_of_the_artefact(measured: list[dict[str, str]]) -> None:
    """The results in the model card are those of the committed artefact on the official test engines."""
    card = (ROOT / "docs" / "model-card.md").read_text().split("<!-- results -->\n")[1].split("\n<!-- /results -->")[0]
    calibrated, stated = [row for row in measured if row["T"] != "1.000"], read_rows(card.split("\n"))
    columns = set(calibrated[0]) & set(stated[0])
    assert {"rows", "subset", "n", "accuracy", "macro-F1", "cross-entropy", "ECE", "Brier", "RUL RMSE"} <= columns
    assert 10 == len(calibrated) == len(stated)
    for row, card_row in zip(calibrated, stated, strict=True):
        for column in columns - {"rows", "subset"}:
            assert float(row[column]) == pytest.approx(float(card_row[column]), rel=2e-3, abs=2e-3), (row, column)
        assert (row["rows"], row["subset"]) == (card_row["rows"], card_row["subset"])


def test_temperature_lowers_cross_entropy_of_test_engines(measured: list[dict[str, str]]) -> None:
    """On all cycles of the test engines, the temperature lowers the cross-entropy, to less than 0.45."""
    all_cycles = [row for row in measured if (row["rows"], row["subset"]) == ("every cycle", "all")]
    before, after = (float(row["cross-entropy"]) for row in all_cycles)
    assert after < 0.45
    assert after <= before


def test_serve_exits_with_0_on_sigterm_and_sigint() -> None:
    """On SIGTERM and Ctrl-C the service exits with code 0 and without a traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with running() as service:
            service.process.send_signal(number)
            _, errors = service.process.communicate(timeout=30)
            assert 0 == service.process.returncode, errors
            assert "Traceback" not in errors
