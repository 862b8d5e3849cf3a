"""The check of wheels in `make lock`: versions from pyproject.toml, markers of the target version, pip's own answer."""

import tomllib
import zipfile
from pathlib import Path

import pytest

from ops.check_wheels import CheckFailed, locked_requirements, missing_wheels, supported_versions

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
LOCK = """\
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:00
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:11
tzdata==2026.6 ; sys_platform == 'win32' \\
    --hash=sha256:22
"""


def write_wheel(folder: Path, name: str, tag: str) -> None:
    """Write an empty package as a wheel."""
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_versions_are_those_of_classifiers_and_readme() -> None:
    """The supported versions are consecutive, start at requires-python, and are the ones that the README lists."""
    versions = supported_versions(PYPROJECT)
    minors = [int(version.partition(".")[2]) for version in versions]
    assert len(minors) >= 4
    assert list(range(minors[0], minors[-1] + 1)) == minors
    assert f">={versions[0]}" == tomllib.loads(PYPROJECT)["project"]["requires-python"]
    listed = f"Python {', '.join(versions[:-1])} or {versions[-1]}"
    assert listed in (ROOT / "README.md").read_text()
    assert listed in (ROOT / "Makefile").read_text()


def test_lock_is_filtered_by_target_version() -> None:
    """A marker is evaluated for the target version on Linux, not for the Python that runs the check."""
    assert {"numpy": "numpy==2.4.6"} == locked_requirements(LOCK, "3.11")
    assert {"numpy": "numpy==2.5.5"} == locked_requirements(LOCK, "3.14")


def test_empty_inputs_fail() -> None:
    """A lock without requirements and a project without classifiers fail instead of passing unchecked."""
    with pytest.raises(CheckFailed, match="no requirements"):
        locked_requirements("# nothing\n", "3.11")
    with pytest.raises(CheckFailed, match="no classifier"):
        supported_versions("[project]\n")


@pytest.mark.slow
def test_every_package_without_wheel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip finds wheels of the version, stable ABI and pure Python; all packages that lack one are named."""
    write_wheel(tmp_path, "compiled", "cp312-cp312-manylinux_2_28_x86_64")
    write_wheel(tmp_path, "oldglibc", "cp312-cp312-manylinux2014_x86_64")
    write_wheel(tmp_path, "stable", "cp38-abi3-manylinux_2_17_x86_64")
    write_wheel(tmp_path, "pure", "py3-none-any")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    pinned = {name: f"{name}==1.0" for name in ("compiled", "oldglibc", "stable", "pure")}
    assert [] == missing_wheels(pinned, "3.12")
    assert ["compiled==1.0", "oldglibc==1.0"] == missing_wheels(pinned, "3.13")
