"""Tests of the generated tables: the definitions of the counts, and the tables in the documents."""

from pathlib import Path

import pytest

from docs.tables import README, generated_tables, package_folders, packages, replaced

ROOT = Path(__file__).parents[2]


def write(root: Path, path: str, text: str) -> None:
    """Write a file and its folder."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_packages_counts_modules_lines_and_imports(tmp_path: Path) -> None:
    """Each folder with an `__init__.py` is a row with its modules, lines, sizes and imports from and to others."""
    for package in ("model", "service", "service/store"):
        write(tmp_path, f"{package}/__init__.py", "")
    write(tmp_path, "model/base.py", "def f():\n    return 1\n")
    write(tmp_path, "service/app.py", "from model import base\nfrom service.store import sql, other\nimport json\n")
    write(tmp_path, "service/cli.py", "def main():\n    import service.app\n    from model.base import f\n    f()\n")
    write(tmp_path, "service/store/sql.py", "from service.app import x\n")
    write(tmp_path, "service/store/other.py", "x = 1\n")
    write(tmp_path, "service/static/page.py", "no package: its folder has no __init__.py")
    assert [
        "| `model` | 1 | 2 | 2 | 2 | 2 | 2 | 0 |",
        "| `service` | 2 | 7 | 3 | 4 | 4 | 1 | 4 |",
        "| `service/store` | 2 | 2 | 1 | 0 | 0 | 2 | 1 |",
    ] == list(packages(tmp_path))[2:]


def test_packages_without_folders_is_an_error(tmp_path: Path) -> None:
    """A project without packages raises an error instead of an empty table."""
    with pytest.raises(SystemExit, match="no packages"):
        package_folders(tmp_path)


def test_architecture_lists_every_package() -> None:
    """The table in docs/architecture.md equals the generated one, and has one row per folder with modules."""
    rows = list(packages())
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert "\n".join(("<!-- packages -->", *rows, "<!-- /packages -->")) in text
    assert len(rows) - 2 == sum(len(list(folder.glob("*.py"))) > 1 for folder in package_folders(ROOT)) > 3


def test_readme_has_generated_results_and_settings() -> None:
    """The results in the README are those of the model card, and its six settings are those of the code."""
    text, tables = README.read_text(), generated_tables()[README]
    assert {"results", "main settings"} == set(tables)
    for name, generate in tables.items():
        lines = list(generate())
        assert {"results": 6, "main settings": 8}[name] == len(lines)
        assert text == replaced(text, name, iter(lines))


def test_document_without_markers_is_an_error() -> None:
    """A table whose markers are missing from the document raises an error that names them."""
    with pytest.raises(SystemExit, match="no markers <!-- results -->"):
        replaced("text", "results", iter(()))
