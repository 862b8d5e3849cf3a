"""The generated table of packages: what it counts, and that it follows the folders that exist."""

from pathlib import Path

import pytest

from docs.tables import package_folders, packages

ROOT = Path(__file__).parents[2]


def write(root: Path, path: str, text: str) -> None:
    """Write a file and its folder."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_packages_are_counted_from_the_folders(tmp_path: Path) -> None:
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


def test_no_packages_is_an_error(tmp_path: Path) -> None:
    """A project in which no package is found fails instead of writing an empty table."""
    with pytest.raises(SystemExit, match="no packages"):
        package_folders(tmp_path)


def test_architecture_lists_every_package() -> None:
    """The table in docs/architecture.md is the one that is generated now, with a row per folder that has modules."""
    rows = list(packages())
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert "\n".join(("<!-- packages -->", *rows, "<!-- /packages -->")) in text
    assert len(rows) - 2 == sum(len(list(folder.glob("*.py"))) > 1 for folder in package_folders(ROOT)) > 3
