"""Run the bash blocks of README and docs in order, from a fresh clone, against a real service."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import free_port, wait_until_ready

ROOT = Path(__file__).parents[2]
NAMES = ("api", "store-and-labels", "calibration", "batch-scoring", "replay")
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
STARTED_BY_TESTS = {"make serve", "make demo"}  # they run until they are stopped
ADDRESS = "http://127.0.0.1:8000"  # of the documents; the test uses another port
FENCE = re.compile(r"((?:^<!-- not run: [^\n]+ -->\n)?)^```(bash|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALL = "COMMANDS_INSTALL"  # set by `make test-commands`: packages are really installed
START_SECONDS = 600 if INSTALL in os.environ else 60
VARYING = {"prediction_id", "digest"}  # values that differ between runs


@dataclass(frozen=True)
class Block:
    """A fenced block that runs, and the response that the document shows after it."""

    place: str
    command: str
    response: str | None


def blocks_of(name: str) -> Iterator[Block]:
    """Yield the bash blocks of a document without a mark, each with the JSON block that follows it."""
    text = (ROOT / name).read_text()
    fences = list(FENCE.finditer(text))
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[2] == "bash" and not fence[1]:
            place = f"{name}:{text[: fence.start()].count(chr(10)) + 1}"
            yield Block(place, fence[3], following[3] if following and following[2] == "json" else None)


def parse_shown(text: str) -> Any:
    """Parse a JSON block in which `...` stands for omitted members."""
    return json.loads(re.sub(r",?\s*\.\.\.(?=\s*[}\]])", "", text))


def agrees(shown: Any, actual: Any) -> bool:
    """Return whether each shown value is the actual one: numbers to 1 %, texts up to `...`, ids not at all."""
    if isinstance(shown, dict):
        return isinstance(actual, dict) and all(
            key in actual and (key in VARYING or agrees(value, actual[key])) for key, value in shown.items()
        )
    if isinstance(shown, list):
        return len(shown) == len(actual) and all(map(agrees, shown, actual))
    if isinstance(shown, float):
        return bool(actual == pytest.approx(shown, rel=1e-2))
    if isinstance(shown, str) and shown.endswith("..."):
        return str(actual).startswith(shown.removesuffix("..."))
    return bool(shown == actual)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clone the working tree. Its `.venv` calls the environment of the tests, unless packages are installed."""
    folder = tmp_path_factory.mktemp("commands") / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folder], check=True)
    changed = subprocess.check_output(["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, text=True)
    for name in changed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    if INSTALL not in os.environ:
        scripts = folder / ".venv" / "bin"
        scripts.mkdir(parents=True)
        for name in ("python", "engine-health", "pip"):
            (scripts / name).write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
            (scripts / name).chmod(0o755)
        (scripts / "pip").write_text("#!/bin/sh\n")  # its packages are there; installing would change them
        (folder / ".venv" / "ready").touch()
    return folder


@pytest.fixture(scope="module")
def environment(clone: Path) -> dict[str, str]:
    """Return the environment of a new user, with a free port."""
    ignored = ("ENGINE_HEALTH", "PYTHONPATH", "MAKE", "MFLAGS")  # also those of a `make` that runs the tests
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(ignored)}
    if INSTALL not in os.environ:
        inherited["PYTHONPATH"] = str(clone)  # the environment of the tests has the package of another folder
    return inherited | {"ENGINE_HEALTH_PORT": str(free_port())}


@pytest.fixture(scope="module")
def address(clone: Path, environment: dict[str, str]) -> Iterator[str]:
    """Start the service with `make serve` in the clone, and yield its address."""
    url = f"http://127.0.0.1:{environment['ENGINE_HEALTH_PORT']}"
    pipe = subprocess.PIPE
    process = subprocess.Popen(["make", "serve"], cwd=clone, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        with httpx.Client(base_url=url, trust_env=False) as client:
            wait_until_ready(client, process, START_SECONDS)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_documents_have_blocks_that_run() -> None:
    """The documents have at least 20 bash blocks that run, and at least 9 of them show the response."""
    blocks = [block for name in PAGES for block in blocks_of(name)]
    assert len(blocks) >= 20
    assert len([block for block in blocks if block.response]) >= 9


def test_every_page_with_commands_is_covered() -> None:
    """Each document with a bash block that runs is in PAGES."""
    names = ["README.md", *(f"docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md"))]
    assert set(PAGES) == {name for name in names if list(blocks_of(name))}


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_document_work_as_pasted(name: str, clone: Path, address: str, environment: dict[str, str]) -> None:
    """Each bash block of a document ends with exit code 0 and, where a response is shown, returns it."""
    for block in blocks_of(name):
        if block.command.strip() in STARTED_BY_TESTS:
            continue
        command = block.command.replace(ADDRESS, address)
        shell = ["bash", "-euo", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=clone, env=environment, capture_output=True, text=True, timeout=600)
        assert 0 == done.returncode, (block.place, done.stdout[-1000:], done.stderr[-2000:])
        if block.response:
            assert agrees(parse_shown(block.response), json.loads(done.stdout)), (block.place, done.stdout)


def test_demo_starts_from_fresh_clone(clone: Path, address: str, environment: dict[str, str]) -> None:
    """`make demo` prints the address of the console. Ctrl-C stops it and its service without a traceback."""
    assert "make demo" in {block.command.strip() for block in blocks_of("README.md")}
    port = free_port()
    variables = environment | {"ENGINE_HEALTH_PORT": str(port)}
    assert str(port) not in address
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["make", "demo"], cwd=clone, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as demo:
        try:
            assert demo.stdout is not None
            assert demo.stdout.readline().startswith(f"The console is at http://127.0.0.1:{port}/")
        finally:
            os.killpg(demo.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
        _, errors = demo.communicate(timeout=30)
    assert "Traceback" not in errors
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_wrong_response_is_detected() -> None:
    """A shown value that differs or is missing is detected. Ids and omitted members are ignored."""
    shown = parse_shown('{"n": 1.0, "digest": "a...", "rows": [{"cycle": 1, ...}], "text": "ab...", ...}')
    actual = {"n": 1.001, "digest": "b", "rows": [{"cycle": 1, "x": 2}], "text": "abc", "other": 1}
    assert agrees(shown, actual)
    changes: list[dict[str, Any]] = [{"n": 1.1}, {"rows": []}, {"rows": [{"cycle": 2}]}, {"text": "b"}, {"n": None}]
    for change in changes:
        assert not agrees(shown, actual | change)
    assert not agrees({"missing": None}, {})
