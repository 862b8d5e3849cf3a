"""Mutation testing with mutmut: changes of nine modules that no test of the module detects, as one table.

    python -m benchmarks.mutants [--only NAME,...]      # = make mutants

mutmut is installed in build/mutmut. It mutates the functions and methods of a module in a copy of the repository below
build/mutants, and runs the tests listed here for each mutant that mypy accepts. Diffs of survivors are written to
build/mutants/NAME/survivors.diff. docs/notes/mutation.md justifies them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
MUTMUT, PYTHON = BUILD / "mutmut" / "bin" / "mutmut", BUILD / "mutmut" / "bin" / "python"
# Errors that mutmut's copies of a method in one class cause for every mutant
IGNORED = [f"--disable-error-code={code}" for code in ("unused-ignore", "no-redef", "has-type")]
# Exit codes that mutmut stores: of pytest, of the CPU time limit, and of mutmut
OUTCOMES = {1: "killed", 37: "refused by mypy", -24: "timed out", 36: "timed out", 0: "survived", 33: "not tested"}
COLUMNS = tuple(dict.fromkeys(OUTCOMES.values()))


@dataclass(frozen=True)
class Target:
    """A module to mutate, and the tests that should fail for each mutant.

    Attributes:
        module: path of the module.
        tests: paths of the test modules.
        marker: pytest expression of the tests that run.
    """

    module: str
    tests: tuple[str, ...]
    marker: str = "unit"


TARGETS = {
    "numerics": Target("model/numerics.py", ("tests/model/test_numerics.py",), "unit or slow"),
    "labelling": Target("service/store/labelling.py", ("tests/store/test_labelling.py",)),
    "batcher": Target("service/inference/batcher.py", ("tests/inference/test_batcher.py",)),
    "admission": Target("service/inference/admission.py", ("tests/inference/test_admission.py",)),
    "predictor": Target("service/inference/predictor.py", ("tests/inference/test_predictor.py",)),
    "statistics": Target(
        "service/calibration/statistics.py", ("tests/calibration/test_statistics.py", "tests/model/test_drift.py")
    ),
    "body": Target("service/server/body.py", ("tests/server/test_body.py", "tests/server/test_upload.py")),
    "body_budget": Target(
        "service/server/body_budget.py", ("tests/server/test_body_budget.py", "tests/server/test_upload.py")
    ),
    "timeouts": Target("service/server/timeouts.py", ("tests/server/test_timeouts.py",), "unit or service"),
}


def copy_repository(folder: Path) -> None:
    """Copy all files of the work tree that git does not ignore, so that mutants never touch the work tree."""
    shutil.rmtree(folder, ignore_errors=True)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def configure(folder: Path, target: Target) -> None:
    """Append the configuration of mutmut to the copied pyproject.toml."""
    options = {
        "source_paths": ["model", "service"],
        "also_copy": ["benchmarks", "docs", "export"],
        "only_mutate": [target.module],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", target.marker],
        "pytest_add_cli_args_test_selection": list(target.tests),
        "process_isolation": "forkserver",  # torch and threads of tests do not survive a fork
        "timeout_multiplier": 3.0,
        "timeout_constant": 1.0,
        "type_check_command": [str(PYTHON), "-m", "mypy", target.module, "--output=json", *IGNORED],
    }
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))


def run_mutants(folder: Path, target: Target) -> dict[str, str]:
    """Run the tests for each mutant; return the outcome by the name of the mutant.

    Raises:
        subprocess.CalledProcessError: the tests fail without a mutant; the reason is in `mutmut.log`.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    with (folder / "mutmut.log").open("w") as log:
        command = ["nice", "-n", "15", str(MUTMUT), "run", "--max-children", "1"]
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=log, check=True)
    codes = json.loads((folder / "mutants" / f"{target.module}.meta").read_text())["exit_code_by_key"]
    outcomes = {mutant: OUTCOMES.get(code, f"exit code {code}") for mutant, code in codes.items()}
    with (folder / "survivors.diff").open("w") as file:
        for mutant in sorted(name for name, outcome in outcomes.items() if outcome in ("survived", "not tested")):
            file.write(subprocess.check_output([MUTMUT, "show", mutant], cwd=folder, env=env, text=True))
    return outcomes


def table_row(target: Target, outcomes: Mapping[str, str], seconds: float) -> str:
    """Return the counts of one module as a row of a Markdown table."""
    counts = Counter(outcomes.values())
    cells = [len(outcomes), *(counts[column] for column in COLUMNS)]
    cells.append(len(outcomes) - sum(counts[column] for column in COLUMNS))
    return f"| `{target.module}` | " + " | ".join(map(str, cells)) + f" | {seconds / 60:.1f} |"


def main() -> None:
    """Run mutmut on the chosen modules and print the table."""
    parser = argparse.ArgumentParser(description="Mutation testing of nine modules.")
    parser.add_argument("--only", default=",".join(TARGETS), help=f"comma-separated, of {', '.join(TARGETS)}")
    names = parser.parse_args().only.split(",")
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown module: {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
    print(f"| module | mutants | {' | '.join(COLUMNS)} | other | minutes |")
    print("| --- |" + " ---: |" * 8, flush=True)
    for name in names:
        folder, target, started = BUILD / "mutants" / name, TARGETS[name], time.monotonic()
        copy_repository(folder)
        configure(folder, target)
        print(table_row(target, run_mutants(folder, target), time.monotonic() - started), flush=True)


if __name__ == "__main__":
    main()
