import ast
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from model.evaluation.evaluate import ARTEFACT, open_artefact, results_table
from tests.support.processes import running

ROOT = Path(__file__).parent.parent
TEST_MODULES = sorted((ROOT / "tests").rglob("test_*.py"))
FILES = [ROOT / name for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]


def children(folder: Path) -> set[str]:
    """The modules and packages directly in a package."""
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return packages | {path.stem for path in folder.glob("*.py")} - {"__init__"}


def functions_of(path: Path) -> list[ast.FunctionDef]:
    """The test functions of a module."""
    body = ast.parse(path.read_text()).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_test_opens_with_its_promise() -> None:
    """Every test function has a sentence that says what it promises."""
    functions = [(path, node) for path in TEST_MODULES for node in functions_of(path)]
    assert len(functions) > 700
    assert [] == [f"{path.name}:{node.lineno}" for path, node in functions if not ast.get_docstring(node)]


def test_layers_name_every_package_and_module() -> None:
    """The layers that import-linter checks are the children of each root package, and it lets none be missing."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c for c in contracts if c["type"] == "layers"}
    assert {"service", "model", "export"} == set(layers)
    for root, contract in layers.items():
        named = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
        assert contract["exhaustive"] is True
        assert children(ROOT / root) == {name for name in named if not name.startswith("(")}


def test_top_level_of_the_service_has_only_entry_points_and_utilities() -> None:
    """Every other module of the service is in a package."""
    entry_points, utilities = "cli serve app lifecycle", "arguments settings errors metrics logs tracing ids"
    allowed = {*entry_points.split(), *utilities.split()}
    assert allowed == {path.stem for path in (ROOT / "service").glob("*.py")} - {"__init__"}


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
    """Helpers of several tests are in tests/support; benchmarks, documents and tests import no test module."""
    sources = [path for root in ("tests", "benchmarks", "docs", "ops") for path in (ROOT / root).rglob("*.py")]
    assert len(sources) > 100
    pattern = re.compile(r"^\s*(?:from|import) tests\.(?!support)", re.MULTILINE)
    assert [] == [str(path.relative_to(ROOT)) for path in sources if pattern.search(path.read_text())]


def test_tests_mirror_the_packages() -> None:
    """Each package of the service has a folder of tests."""
    packages = {path.parent.name for path in (ROOT / "service").glob("*/__init__.py")}
    assert len(packages) > 7
    assert packages <= {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}


def test_no_file_names_a_package_registry_or_holds_data() -> None:
    """Locks and scripts name no registry host, and nothing of the data set is in the repository."""
    hosts = re.compile(rb"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian\.org|download\.pytorch|conda\.anaconda")
    checked = [path for path in FILES if path.exists() and path != Path(__file__)]
    assert len(checked) > 300
    for path in checked:
        assert not hosts.search(path.read_bytes()), path
        assert not re.match(r"(train|test|RUL)_FD00\d", path.name)


def test_the_production_lock_is_hashed_and_has_no_torch() -> None:
    """Every pinned package carries hashes, and none of them is for training."""
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE)
    assert {"fastapi", "uvicorn", "onnxruntime", "prometheus-client"} <= set(pinned)
    assert not {"torch", "onnx", "pandas"} & set(pinned)
    entries = re.split(r"^(?=[a-z0-9.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_readme_results_are_the_artefacts(cmapss_dir: Path) -> None:
    """The results table in the README is what the committed artefact reaches on the official test engines."""
    printed = list(results_table(cmapss_dir, *open_artefact(ARTEFACT)))
    shown = (ROOT / "README.md").read_text().split("<!-- results -->")[1].split("<!-- /results -->")[0].splitlines()
    numbers = [[float(x) for x in re.findall(r"\d+\.?\d*", line)] for line in (*printed[2:], *shown[3:])]
    half = len(numbers) // 2
    assert 20 == half
    for found, said in zip(numbers[:half], numbers[half:], strict=True):
        assert found == pytest.approx(said, rel=2e-3, abs=2e-3)


def test_calibration_helps_on_engines_that_it_never_saw(cmapss_dir: Path) -> None:
    """On all cycles of the test engines, cross-entropy after temperature is below 0.45 and no higher than before."""
    lines = [line.split("|") for line in results_table(cmapss_dir, *open_artefact(ARTEFACT))]
    before, after = (float(cells[7]) for cells in lines if cells[1:3] == [" every cycle ", " all "])
    assert after < 0.45
    assert after <= before


def test_told_to_stop_is_no_failure() -> None:
    """SIGTERM and Ctrl-C end the service with exit code 0 and no traceback."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with running() as service:
            service.process.send_signal(number)
            _, said = service.process.communicate(timeout=30)
            assert 0 == service.process.returncode, said
            assert "Traceback" not in said


def test_the_readmes_curl_works_as_pasted() -> None:
    """The request in the README, sent as it stands, is answered with a health and a loss."""
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("curl"))
    with running() as service:
        here = str(service.client.base_url).rstrip("/")
        answer = subprocess.check_output(["bash", "-c", command.replace("http://127.0.0.1:8000", here)], text=True)
    assert '"health":' in answer
    assert '"evaluation":{"count":1' in answer
