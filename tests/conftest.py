"""What tests share: the real data, and a real service in a process of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from hypothesis import settings

from model.contract import Manifest
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.windows import Readings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

START_SECONDS = 60
settings.register_profile("house", deadline=None)  # a busy machine is not a wrong answer
settings.load_profile("house")
for ignored in (signal.SIGINT, signal.SIGHUP):  # as below `nohup`; who is started by a test is to hear them
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)


@pytest.fixture(scope="session")
def cmapss_dir() -> Path:
    """NASA's files; without them a test skips, but in CI it fails."""
    folder = cmapss.data_folder()
    if not any(folder.glob("train_FD001.txt*")):
        message = f"no C-MAPSS in {folder}: set CMAPSS_DIR or run `make data`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder.resolve()


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """What the committed artefact says of itself."""
    return open_artefact(ARTEFACT)[1]


@pytest.fixture(scope="session")
def windows(manifest: Manifest) -> Readings:
    """The artefact's golden windows (4, window, 17)."""
    return np.array([golden.telemetry for golden in manifest.golden], dtype=np.float32)


@pytest.fixture(scope="session")
def programs() -> None:
    """Debian's Prometheus; without it a test skips, but in CI it fails."""
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    message = "no prometheus and promtool (Debian: apt-get install prometheus)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One browser; without it a test skips, but in CI it fails."""
    from tests.browser import absent, chromium, in_ci  # which not every test needs

    missing = absent()
    if missing and in_ci():
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=["simdjson", "portable"])
def each_parser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each parser of JSON numbers in turn; simdjson where it is installed."""
    from service.codecs import number_parser  # which not every test needs

    if request.param == "simdjson" and find_spec("simdjson") is None:
        pytest.skip("simdjson is not installed: it has no wheel for this Python")
    usual, make = number_parser.active, {"simdjson": number_parser.SimdjsonParser}
    number_parser.active = make.get(request.param, number_parser.PortableParser)()
    try:
        yield
    finally:
        number_parser.active = usual


@dataclass
class Service:
    """A running service and a client that speaks to it."""

    client: httpx.Client
    process: subprocess.Popen[str]

    def predict(self, instances: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        """The answer of /v1/predict, which must be 200."""
        answer = self.client.post("/v1/predict", json={"instances": instances, **rest})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


@contextmanager
def running(**environment: str) -> Iterator[Service]:
    """A service on a free port of this machine, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.TemporaryDirectory(prefix="engine-health-test-")  # a memory of its own
    environment = {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{folder.name}/memory.db"} | environment
    process = start("serve", "--port", str(port), **environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_until_ready(client, process)
            yield Service(client, process)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        folder.cleanup()


def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """The command `engine-health` in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ENGINE_HEALTH_")}
    command = [sys.executable, "-m", "service.cli", *arguments]
    pipe = subprocess.PIPE
    kept |= {"ENGINE_HEALTH_LOG_LEVEL": "warning", "ENGINE_HEALTH_DRAIN_SECONDS": "0"}  # pipes are not read meanwhile
    strict = {"PYTHONWARNINGS": "error::RuntimeWarning"}  # an overflow in serving is a failure, as it is in the tests
    return subprocess.Popen(command, env=kept | strict | environment, stdout=pipe, stderr=pipe, text=True)


def absent(folder: Path, *packages: str) -> dict[str, str]:
    """An environment in which some packages are not installed."""
    blocked = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    (folder / "sitecustomize.py").write_text(blocked)
    return {"PYTHONPATH": str(folder)}


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[str]") -> None:
    """Return once a service is ready; fail if its process ends first, or it takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the service did not become ready")


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """One service with the committed artefact for all tests that leave it as they found it."""
    with running() as found:
        yield found


def as_json(value: Any) -> bytes:
    """JSON with NaN and Infinity where Python has them, as careless clients send it."""
    return json.dumps(value).encode()


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server of a test's own, which answers while the block lasts."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
