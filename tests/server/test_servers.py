"""The application under other ASGI servers returns the same bytes."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from model.windows import Readings
from tests.support.bodies import INFER, binary, inference_body
from tests.support.processes import Service, running, wait_until_ready
from tests.support.tables import ARROW, flights, stream

FACTORY = "service.app:serve_app"
UVICORN = ("uvicorn", "--factory", FACTORY, "--log-level", "warning", "--port", "{port}")
COMMANDS = {
    "uvicorn, h11, asyncio": (*UVICORN, "--http", "h11", "--loop", "asyncio"),
    "uvicorn, httptools, uvloop": (*UVICORN, "--http", "httptools", "--loop", "uvloop"),
    "hypercorn": ("hypercorn", f"{FACTORY}()", "--bind", "127.0.0.1:{port}"),
    "granian": ("granian", "--interface", "asgi", "--factory", FACTORY, "--no-ws", "--port", "{port}"),
}
READER, ADMIN = {"Authorization": "Bearer reader"}, {"X-API-Key": "admin"}
SETTINGS = {
    "ENGINE_HEALTH_API_KEYS": "reader",
    "ENGINE_HEALTH_ADMIN_KEYS": "admin",
    "ENGINE_HEALTH_MAX_BODY_BYTES": "4000000",
    "ENGINE_HEALTH_CORS_ORIGINS": "https://ops.example",
}
RANDOM = re.compile(  # identifiers and times
    rb'(?<=_id":")[0-9a-f]{20,}|(?<=_at":")[^"]*|(?<="p[59]0":)[\d.e-]+'
)
SAMPLES = re.compile(rb"(?m)^([^# ].*|# EOF.*)\n")  # values and series of /metrics depend on earlier requests


class Call(NamedTuple):
    """One request."""

    method: str
    path: str
    content: bytes | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed
    key: dict[str, str] = READER


class Seen(NamedTuple):
    """The part of a response that must not depend on the server."""

    call: str
    status: int
    kind: str | None
    body: bytes


def posted(path: str, value: Any, **headers: str) -> Call:
    """Return a JSON request."""
    return Call("POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"} | headers)


def predictions(windows: Readings) -> Iterator[Call]:
    """Yield every form of a prediction request, small and large."""
    rows = [{"telemetry": window.tolist(), "engine_id": "E", "cycle": k} for k, window in enumerate(windows, 30)]
    labelled = rows[0] | {"label": "critical", "cycle": 40}
    many, most = (windows[np.arange(n) % len(windows)] for n in (100, 500))  # bodies above 1 MiB
    yield posted("/v1/predict", {"instances": [{"telemetry": windows[0].tolist()}]})
    yield posted("/v1/predict", {"instances": rows})
    yield posted("/v1/predict", {"instances": [labelled], "temperature": 2.0})
    yield posted("/v1/predict", {"instances": [{"telemetry": window.tolist()} for window in many]})
    yield posted("/v1/predict", {"instances": rows[:1], "explain": True})
    packed = gzip.compress(json.dumps({"instances": rows}).encode(), mtime=0)
    yield Call("POST", "/v1/predict", packed, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
    yield Call("POST", "/v1/predict?missing=hold", stream(flights({"A": windows[0]})), ARROW)
    yield posted(INFER, inference_body(windows))
    yield posted("/v2/models/engine-health/versions/0.1.0/infer", inference_body(windows))
    for batch in (windows, most):
        body, headers = binary(batch, parameters={"binary_data_output": True})
        yield Call("POST", INFER, body, headers)


def stored(windows: Readings) -> Iterator[Call]:
    """Yield the calls of the store and of calibration."""
    cycles = [{"engine_id": "F", "cycle": k, "telemetry": row.tolist()} for k, row in enumerate(windows[0][:5], 1)]
    label = {"engine_id": "F", "cycle": 3, "label": "normal"}
    yield posted("/v1/cycles", {"cycles": cycles})
    yield posted("/v1/cycles", {"cycles": cycles})
    yield posted("/v1/labels", {"labels": [label, label | {"cycle": 99}, {"prediction_id": "x", "label": 0}]})
    yield posted("/v1/labels", {"labels": [label | {"label": "critical"}]})
    yield posted("/v1/outcomes", {"engine_id": "E", "failed_at_cycle": 60})
    yield posted("/v1/outcomes", {"engine_id": "E", "failed_at_cycle": 61})
    yield Call("GET", "/v1/engines")
    yield Call("GET", "/v1/engines?health=critical&limit=1")
    yield Call("GET", "/v1/engines/F?sensors=true")
    yield Call("GET", "/v1/engines/a%2Fb%20c")
    yield Call("GET", "/v1/calibration?window=30d")
    yield posted("/v1/calibration/fits", {})
    yield Call("PUT", "/v1/calibration/temperature", b'{"temperature": 1.5}', key=ADMIN)
    yield Call("GET", "/v1/calibration/temperature")
    yield Call("PUT", "/v1/calibration/temperature", b'{"rollback": true}', key=ADMIN)


def others() -> Iterator[Call]:
    """Yield the calls of the other endpoints and of pages."""
    logits = {"logits": [[1.0, 2.0, 3.0], [0.1, 0.2, 0.7]], "labels": [0, 2]}
    yield posted("/v1/evaluate", logits)
    for path in ("/v1/model", "/v2/models/engine-health", "/v2/models/engine-health/ready", "/docs", "/openapi.json"):
        yield Call("GET", path)
    for path in ("/livez", "/readyz", "/metrics", "/v2", "/v2/health/live", "/v2/health/ready", "/"):
        yield Call("GET", path)
        yield Call("HEAD", path)
    yield Call("GET", "/console/fleet.js", headers={"Accept-Encoding": "gzip"})
    yield Call("GET", "/", headers={"If-None-Match": "*"})
    yield Call("POST", "/v2/repository/index", key=ADMIN)
    yield Call("POST", "/v2/repository/models/engine-health/load", key=ADMIN)
    preflight = {"Origin": "https://ops.example", "Access-Control-Request-Method": "POST"}
    yield Call("OPTIONS", "/v1/predict", headers=preflight, key={})
    yield Call("OPTIONS", "/v1/predict")


def refused() -> Iterator[Call]:
    """Yield requests that are rejected, for every reason that needs no load."""
    yield Call("POST", "/v1/predict", b"{", {"Content-Type": "application/json"})
    yield Call("POST", "/v1/predict", b"[" * 250_000, {"Content-Type": "application/json"})
    yield Call("POST", "/v1/predict", b"no stream", ARROW)
    yield Call("POST", "/v1/predict", b"no gzip", {"Content-Encoding": "gzip"})
    yield Call("GET", "/v1/model", key={})
    yield Call("GET", "/v1/model", key={"X-API-Key": "unknown"})
    yield Call("PUT", "/v1/calibration/temperature", b"{}")
    for path in ("/v1/nothing", "/v1/engines/unknown", "/console/nothing.js", "/v2/models/other", "/v1/predict%0A"):
        yield Call("GET", path)
    yield posted("/v2/models/other/infer", {})
    for method, path in (("GET", "/v1/predict"), ("DELETE", "/v1/cycles"), ("POST", "/livez"), ("PUT", "/")):
        yield Call(method, path)
    yield Call("POST", "/v1/predict", b" " * 4_000_001, {"Content-Type": "application/json"})
    yield Call("POST", "/v1/predict", b"{}", {"Content-Type": "text/csv"})
    yield Call("POST", "/v1/predict", b"{}", {"Content-Encoding": "br"})
    yield posted("/v1/predict", {"instances": [{"telemetry": [[1.0]]}]})
    yield posted("/v1/predict", {"instances": [], "unknown": 1})
    yield posted("/v1/evaluate", {"logits": [[1, 2]], "labels": ["x"]})
    yield posted(INFER, {"inputs": []})
    yield Call("GET", "/v1/engines?limit=x")


def chunked(content: bytes) -> Iterator[bytes]:
    """Yield the pieces of a body of unknown length."""
    yield content[:100]
    yield content[100:]


def seen(service: Service, windows: Readings) -> list[Seen]:
    """Send every call in order, and return the responses without their random parts."""
    responses = []
    for call in (*predictions(windows), *stored(windows), *others(), *refused()):
        forms: list[Any] = [call.content]
        if call.path == "/v1/predict" and call.content and len(call.content) > 1000:
            forms.append(chunked(call.content))
        for content in forms:
            headers = {"Accept-Encoding": "identity"} | call.headers | call.key
            response = service.client.request(call.method, call.path, content=content, headers=headers)
            assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])
            body = RANDOM.sub(b"-", response.content)
            if call.path == "/metrics":
                body = SAMPLES.sub(b"", body)
            summary = f"{call.method} {call.path} {call.headers} {(call.content or b'')[:60]!r}"
            responses.append(Seen(summary, response.status_code, response.headers.get("content-type"), body))
    return responses


@contextmanager
def other_server(command: tuple[str, ...]) -> Iterator[Service]:
    """Serve the application with another server in its own process, and stop that with SIGTERM."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ENGINE_HEALTH_")}
        environment |= SETTINGS | {"ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{folder}/store.db"}
        environment |= {"ENGINE_HEALTH_LOG_LEVEL": "warning"}
        environment |= {"ENGINE_HEALTH_DRAIN_SECONDS": "60"}  # the handlers of the other server must not wait for it
        words = [sys.executable, "-m", *(word.format(port=port) for word in command)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                wait_until_ready(client, process)
                yield Service(client, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def reference(windows: Readings) -> list[Seen]:
    """Return the responses under our own server."""
    with running(**SETTINGS) as service:
        return seen(service, windows)


def test_reference_covers_endpoints_and_rejections(reference: list[Seen]) -> None:
    """The reference has each status code that needs no load, and its random parts are recognised."""
    assert {200, 304, 400, 401, 403, 404, 405, 409, 413, 415, 422} == {response.status for response in reference}
    assert any(b'"prediction_id":"-"' in response.body for response in reference)
    assert all(response.body == b"" for response in reference if response.call.startswith("HEAD"))


@pytest.mark.parametrize("name", COMMANDS)
def test_response_under_another_server_is_the_same(name: str, reference: list[Seen], windows: Readings) -> None:
    """Status, content type and bytes of every response are those of our server, and SIGTERM stops the process."""
    with other_server(COMMANDS[name]) as service:
        responses = seen(service, windows)
        assert len(reference) == len(responses)
        assert [] == [(ours, theirs) for ours, theirs in zip(reference, responses, strict=True) if ours != theirs]
        service.process.send_signal(signal.SIGTERM)
        _, log = service.process.communicate(timeout=30)
    assert "Traceback" not in log


def test_rejected_model_ends_any_server() -> None:
    """A model that fails verification ends any server with exit code 1 and one line with the reason."""
    words = [sys.executable, "-m", *(word.format(port=0) for word in UVICORN)]
    environment = os.environ | {"ENGINE_HEALTH_MODEL": __file__, "ENGINE_HEALTH_DATABASE_URL": ""}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert 1 == ended.returncode
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"engine-health: {__file__}")
