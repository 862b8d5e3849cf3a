"""Processes of the service for tests, and requests to them."""

import json
import os
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
from pathlib import Path
from typing import Any

import httpx

from model.windows import Readings

START_SECONDS = 60


@dataclass
class Service:
    """A running service with a client and its process."""

    client: httpx.Client
    process: subprocess.Popen[str]

    def predict(self, instances: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
        """Return the response of /v1/predict, which must be 200."""
        response = self.client.post("/v1/predict", json={"instances": instances, **rest})
        assert response.status_code == 200, response.text
        content: dict[str, Any] = response.json()
        return content

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics by its name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def free_port() -> int:
    """Return a TCP port of this machine that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(**environment: str) -> Iterator[Service]:
    """Run a service on a free port during the block; yield it when it is ready."""
    port = free_port()
    folder = tempfile.TemporaryDirectory(prefix="engine-health-test-")  # a separate store
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
    """Start the command `engine-health` in a new process."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ENGINE_HEALTH_")}
    command = [sys.executable, "-m", "service.cli", *arguments]
    pipe = subprocess.PIPE
    inherited |= {
        "ENGINE_HEALTH_LOG_LEVEL": "warning",
        "ENGINE_HEALTH_DRAIN_SECONDS": "0",
    }  # the pipes are not read while the service runs
    strict = {"PYTHONWARNINGS": "error::RuntimeWarning"}  # an overflow in the service fails as it does in tests
    return subprocess.Popen(command, env=inherited | strict | environment, stdout=pipe, stderr=pipe, text=True)


def absent(folder: Path, *packages: str) -> dict[str, str]:
    """Return an environment in which some packages are not installed."""
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


def as_json(value: Any) -> bytes:
    """Return JSON with NaN and Infinity as Python writes them."""
    return json.dumps(value).encode()


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Run a server of a test during the block; yield its address."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ADMIN = {"Authorization": "Bearer wheel"}
LOAD = "/v2/repository/models/engine-health/load"


def one(window: Readings, **rest: Any) -> dict[str, Any]:
    return {"instances": [{"telemetry": window.tolist()}], **rest}


def children(process: "subprocess.Popen[str]") -> list[int]:
    """Return the process ids of the workers of a supervisor."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def until(done: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def until_all_are_ready(service: Service, workers: int) -> None:
    """Wait until every worker is ready: a starting one returns 503."""

    def ready() -> bool:
        slots = [link for child in children(service.process) if (link := shared_folder(child))]
        gauges = len(list(slots[0].glob("gauge_livemin_*.db"))) if slots else 0
        return gauges == workers and service.metrics()["engine_health_ready"] == 1

    until(ready)


def prediction_status(service: Service, window: Readings) -> int | None:
    """Return the status of a prediction, or None if its connection broke, as with a killed worker."""
    try:
        url = f"{service.client.base_url}/v1/predict"
        return httpx.post(url, json=one(window), timeout=30, trust_env=False).status_code
    except httpx.TransportError:
        return None


def predicted(service: Service, window: Readings) -> bool:
    """Return whether a prediction gets 200."""
    return prediction_status(service, window) == 200


def shared_folder(worker: int) -> Path | None:
    """Return the folder that a worker shares with others, or None before it has one."""
    try:
        links = [os.readlink(f"/proc/{worker}/fd/{name}") for name in os.listdir(f"/proc/{worker}/fd")]
    except FileNotFoundError:  # a file was closed, or the worker ended, in between
        return None
    return next((Path(link).parent for link in links if "slot-" in link), None)


def resident(service: Service) -> float:
    """Return the memory of the service in MiB, 0.5 s after its last response."""
    time.sleep(0.5)
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[str]", seconds: float = START_SECONDS) -> None:
    """Wait until a service is ready; fail if its process ends or the time limit expires."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the service did not become ready")
