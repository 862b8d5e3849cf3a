import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from model.windows import Readings
from tests.support.processes import absent, children, one, running, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SERVER = 2  # kind of a span
SOON, NEVER = "100", "600000"  # delay in milliseconds until spans are sent


class Collector:
    """An OTLP/HTTP collector that records bodies, and spans with their resource."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.bodies: list[bytes] = []

    @property
    def spans(self) -> list[tuple[Any, dict[str, str]]]:
        spans = []
        for body in list(self.bodies):
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                of = attributes(resource.resource)
                spans += [(span, of) for scope in resource.scope_spans for span in scope.spans]
        return spans

    def environment(self, delay: str = SOON, **more: str) -> dict[str, str]:
        """Return the environment that sends spans of a service here."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.address, "OTEL_BSP_SCHEDULE_DELAY": delay, "NO_PROXY": "*"} | more


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port during the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # name required by http.server
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                receiver.bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector without spans."""
    with collecting() as started:
        yield started


def attributes(of: Any) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in of.attributes}


def test_prediction_is_a_span_of_the_caller(collector: Collector, windows: Readings) -> None:
    """A request is one span in the caller's trace, and its log line has the ids; a probe has no span."""
    with running(**collector.environment(ENGINE_HEALTH_LOG_LEVEL="info")) as service:
        assert 200 == service.client.post("/v1/predict", json=one(windows[0]), headers=CALLER).status_code
        assert 422 == service.client.post("/v1/predict", json={}).status_code
        assert 200 == service.client.get("/v2/models/engine-health").status_code
        assert 404 == service.client.get("/v1/nothing").status_code
        for probe in ("/livez", "/readyz", "/metrics", "/v2/health/ready"):
            assert 200 == service.client.get(probe).status_code
        until(lambda: len(collector.spans) >= 4)
        service.process.terminate()
        _, log = service.process.communicate(timeout=30)
    names = ["POST /v1/predict", "POST /v1/predict", "GET /v2/models/{name}", "GET"]
    spans = sorted(collector.spans, key=lambda pair: pair[0].start_time_unix_nano)
    assert names == [span.name for span, _ in spans]
    assert {SERVER} == {span.kind for span, _ in spans}
    assert {"engine-health"} == {of["service.name"] for _, of in spans}
    predict = spans[0][0]
    assert (TRACE, PARENT) == (predict.trace_id.hex(), predict.parent_span_id.hex())
    assert ("/v1/predict", 200) == (attributes(predict)["http.route"], attributes(predict)["http.status_code"])
    assert 422 == attributes(spans[1][0])["http.status_code"]
    assert TRACE != spans[1][0].trace_id.hex()
    lines = [json.loads(line) for line in log.splitlines()]
    logged = [(line["trace_id"], line["span_id"]) for line in lines if "trace_id" in line]
    assert logged == [(span.trace_id.hex(), span.span_id.hex()) for span, _ in spans]


def test_spans_contain_no_key(collector: Collector, windows: Readings) -> None:
    """Neither headers nor queries are sent, although OpenTelemetry is configured to capture every header."""
    everything = {"OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST": ".*", "ENGINE_HEALTH_API_KEYS": "s3cret"}
    with running(**collector.environment(**everything)) as service:
        for headers in ({"Authorization": "Bearer s3cret"}, {"X-API-Key": "s3cret"}, {"Cookie": "key=s3cret"}):
            service.client.post("/v1/predict?key=s3cret", json=one(windows[0]), headers=headers)
        until(lambda: len(collector.spans) == 3)
    assert [200, 200, 401] == [attributes(span)["http.status_code"] for span, _ in collector.spans]
    assert b"s3cret" not in b"".join(collector.bodies)


def test_pending_spans_are_sent_at_shutdown(collector: Collector, windows: Readings) -> None:
    """On SIGTERM all workers send their pending spans, and then exit with code 0."""
    environment = collector.environment(NEVER, ENGINE_HEALTH_WORKERS="2", OTEL_SERVICE_NAME="fleet")
    with running(**environment) as service:
        until(lambda: len(children(service.process)) == 2)
        statuses: list[int] = []
        while statuses.count(200) < 20:  # the kernel distributes new connections; a worker may not be ready
            response = httpx.post(f"{service.client.base_url}/v1/predict", json=one(windows[0]), trust_env=False)
            statuses.append(response.status_code)
        assert [] == collector.bodies
        service.process.terminate()
        assert 0 == service.process.wait(timeout=30)
    assert sorted(statuses) == sorted(attributes(span)["http.status_code"] for span, _ in collector.spans)
    assert {"fleet"} == {of["service.name"] for _, of in collector.spans}


def test_unusual_requests_are_unchanged_by_tracing(collector: Collector) -> None:
    """Headers and queries with invalid text get the same status with tracing."""
    odd = b"\xff\\x"  # neither UTF-8 nor a valid escape of Python
    head = b"GET /v1/model%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: %s\r\ntraceparent: %s\r\nConnection: close\r\n\r\n"
    cases = (
        (b"?" + odd, odd, odd, odd),
        (b"", b"[", odd, b"00-0"),
        (b"?%ff", odd, b"", CALLER["traceparent"].encode()),
    )
    with running(**collector.environment()) as service:
        for case in cases:
            address = (service.client.base_url.host, service.client.base_url.port or 80)
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(head % case)
                response = connection.makefile("rb").read()
            assert response.split()[1] in (b"200", b"400"), response
        assert b"200" == response.split()[1]
        until(lambda: any(span.trace_id.hex() == TRACE for span, _ in collector.spans))


@pytest.mark.parametrize("listening", [False, True])
def test_missing_collector_does_not_affect_requests(windows: Readings, listening: bool) -> None:
    """Without a reachable or responding collector, requests are answered, and the service exits with 0."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listening:
            silent.listen()
        nowhere = Collector(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with running(**nowhere.environment()) as service:
            for _ in range(5):
                assert 200 == service.client.post("/v1/predict", json=one(windows[0])).status_code
            service.process.terminate()
            assert 0 == service.process.wait(timeout=30)


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({}, "opentelemetry.instrumentation.asgi is not installed: install the extra `tracing`"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "the protocol is http/protobuf, not grpc"),
        ({"OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_TRACES_EXPORTER": "none"}, None),
    ],
)
def test_impossible_tracing_logs_one_line(
    tmp_path: Path, windows: Readings, setting: dict[str, str], why: str | None
) -> None:
    """Tracing that cannot start logs one warning with the reason, and unconfigured tracing logs nothing; both serve."""
    lacking = {} if setting else absent(tmp_path, "opentelemetry.instrumentation.asgi")
    with running(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", **setting, **lacking) as service:
        service.predict(one(windows[0])["instances"])
        service.process.terminate()
        _, log = service.process.communicate(timeout=30)
    warned = [] if why is None else [f"no spans: {why}"]
    assert warned == [json.loads(line)["event"] for line in log.splitlines()]


def test_sdk_is_not_imported_without_endpoint() -> None:
    """Without an endpoint the process imports no SDK, exporter or middleware of OpenTelemetry."""
    code = (
        "import sys; from service.app import create_app; from service.settings import read_settings; "
        "create_app(read_settings(), print); "
        "print(*[m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', "
        "'opentelemetry.instrumentation', 'google.protobuf', 'requests', 'pyarrow'))])"
    )
    for environment, imported in (({}, False), ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True)):
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert imported == ("opentelemetry.sdk.trace" in printed.stdout.split())
        assert imported == bool(printed.stdout.strip())
