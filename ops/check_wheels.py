"""Check that every package of a lock has a wheel for each supported Python version on Linux x86-64.

python ops/check_wheels.py requirements.lock requirements-dev.lock

The versions are those of the classifiers in pyproject.toml. Each requirement is filtered by its marker for the target
version, because pip evaluates markers for the Python that runs it. Files are downloaded to a temporary folder.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
GLIBC_MINORS = range(5, 35)  # manylinux_2_5 to manylinux_2_34, the newest that a current Debian runs
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in reversed(GLIBC_MINORS)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
]


class CheckFailed(Exception):
    """Pip failed for another reason than a missing wheel, or there is nothing to check."""


def supported_versions(pyproject: str) -> list[str]:
    """Return the Python versions of the classifiers, as `3.11`."""
    classifiers = tomllib.loads(pyproject)["project"].get("classifiers", [])
    matches = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in classifiers)
    versions = [match[1] for match in matches if match]
    if not versions:
        raise CheckFailed("pyproject.toml has no classifier with a Python version")
    return versions


def locked_requirements(lock: str, version: str) -> dict[str, str]:
    """Return name and pinned version of each requirement of a lock that applies to a Python version on Linux x86-64."""
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }
    pinned = {}
    for line in lock.replace("\\\n", " ").splitlines():
        text = line.partition("#")[0].partition(" --hash")[0].strip()
        if text and not text.startswith("-"):
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pinned[requirement.name] = f"{requirement.name}{requirement.specifier}"
    if not pinned:
        raise CheckFailed("the lock has no requirements")
    return pinned


def missing_wheels(pinned: dict[str, str], version: str) -> list[str]:
    """Return the requirements without a wheel for a Python version. Pip names one per run, so it runs repeatedly."""
    remaining, missing = dict(pinned), []
    tags = ["--python-version", version, "--implementation", "cp", "--abi", f"cp{version.replace('.', '')}"]
    for platform in PLATFORMS:
        tags += ["--platform", platform]
    while remaining:
        with tempfile.TemporaryDirectory(prefix="engine-health-wheels-") as folder:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
            command += ["--only-binary=:all:", "--no-deps", "--dest", folder, *tags, *remaining.values()]
            completed = subprocess.run(command, capture_output=True, text=True)
        if completed.returncode == 0:
            break
        match = re.search(r"No matching distribution found for ([\w.-]+?)==", completed.stderr)
        if match is None or match[1] not in remaining:
            raise CheckFailed(f"pip download failed for Python {version}: {completed.stderr.strip().splitlines()[-1:]}")
        missing.append(remaining.pop(match[1]))
    return missing


def main() -> None:
    """Print one line per lock and version, and fail with one line if a wheel is missing."""
    parser = argparse.ArgumentParser(description="Check that each locked package has a wheel for each Python version.")
    parser.add_argument("locks", nargs="+", type=Path)
    parser.add_argument("--python-version", action="append", help="instead of the versions in pyproject.toml")
    flags = parser.parse_args()
    absent = []
    try:
        for version in flags.python_version or supported_versions((ROOT / "pyproject.toml").read_text()):
            for lock in flags.locks:
                pinned = locked_requirements(lock.read_text(), version)
                missing = missing_wheels(pinned, version)
                absent += [f"{requirement} has no wheel for Python {version}" for requirement in missing]
                print(
                    f"Python {version}, {lock.name}: {len(pinned) - len(missing)} of {len(pinned)} packages have wheels"
                )
    except CheckFailed as failed:
        raise SystemExit(f"check_wheels: {failed}") from None
    if absent:
        raise SystemExit(f"check_wheels: {'; '.join(dict.fromkeys(absent))}")


if __name__ == "__main__":
    main()
