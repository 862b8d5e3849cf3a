import gzip
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.windows import Readings
from tests.support.bodies import BODIES, CASES, EVALUATIONS, PLACE, ROW, SENSOR_4, one, row_with
from tests.support.models import overflowing_classifier
from tests.support.processes import Service, as_json, running

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(("body", "status", "loc"), CASES, ids=[f"{k}" for k in range(len(CASES))])
def test_invalid_value_of_a_prediction_is_located(
    service: Service, body: Any, status: int, loc: list[Any] | None
) -> None:
    """Every wrong value of a prediction is a problem document that names instance, row and channel."""
    answer = service.client.post("/v1/predict", content=as_json(body), headers=JSON)
    assert status == answer.status_code, answer.text
    if status == 200:
        return
    problem = answer.json()
    assert "application/problem+json" == answer.headers["content-type"]
    assert {"type", "title", "status", "detail"} <= set(problem)
    assert status == problem["status"]
    if loc is not None:
        assert loc == problem["errors"][0]["loc"]
        assert problem["errors"][0]["msg"]


@pytest.mark.parametrize(("body", "loc"), EVALUATIONS, ids=[f"{k}" for k in range(len(EVALUATIONS))])
def test_invalid_value_of_an_evaluation_is_located(service: Service, body: dict[str, Any], loc: list[Any]) -> None:
    """Every wrong value of an evaluation is a 422 that names its place."""
    answer = service.client.post("/v1/evaluate", json=body)
    assert 422 == answer.status_code, answer.text
    assert loc == answer.json()["errors"][0]["loc"]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[f"{k}" for k in range(len(BODIES))])
def test_malformed_body_is_rejected(service: Service, body: bytes, status: int) -> None:
    """Broken, truncated, mis-encoded and absurdly nested bodies are client errors, and the service answers on."""
    for path in ("/v1/predict", "/v1/evaluate"):
        answer = service.client.post(path, content=body, headers=JSON)
        assert answer.status_code in (status, 400, 422), answer.text
        assert "application/problem+json" == answer.headers["content-type"]
    assert status == service.client.post("/v1/predict", content=body, headers=JSON).status_code


def test_number_beyond_float64_is_located(service: Service) -> None:
    """1e400 is JSON: its place is named as that of any other wrong value."""
    body = as_json(one(row_with(1234.5))).replace(b"1234.5", b"1e400")
    answer = service.client.post("/v1/predict", content=body, headers=JSON)
    assert (422, SENSOR_4) == (answer.status_code, answer.json()["errors"][0]["loc"])


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "json", ""]
)
def test_another_content_type_is_refused(service: Service, kind: str) -> None:
    """What does not call itself JSON is not read as JSON."""
    answer = service.client.post("/v1/predict", content=json.dumps(one([ROW])), headers={"Content-Type": kind})
    assert (415, 415) == (answer.status_code, answer.json()["status"])


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"])
def test_json_media_type_variants_are_accepted(service: Service, kind: str) -> None:
    """Parameters, case and +json suffixes of the content type do not matter."""
    answer = service.client.post("/v1/predict", content=json.dumps(one([ROW])), headers={"Content-Type": kind})
    assert 200 == answer.status_code


def test_gzip_body_is_inflated_and_never_beyond_the_limit(service: Service, windows: Readings) -> None:
    """Gzip answers as plain; other encodings are 415, no gzip or half of one 400, a bomb 413, and all is well after."""
    body = json.dumps(one(windows[0].tolist())).encode()
    plain = service.client.post("/v1/predict", content=body, headers=JSON).json()["predictions"][0]
    packed, half = gzip.compress(body), len(body) // 2
    members = gzip.compress(body[:half]) + gzip.compress(body[half:])
    bomb = gzip.compress(b" " * (200 * 2**20), 1)
    cases = ((packed, 200), (members, 200), (packed[:-9], 400), (body, 400), (b"", 400), (bomb, 413), (packed, 200))
    for content, status in cases:
        answer = service.client.post("/v1/predict", content=content, headers=JSON | {"Content-Encoding": "gzip"})
        assert status == answer.status_code, answer.text
        if status == 200:
            assert plain["logits"] == answer.json()["predictions"][0]["logits"]
    answer = service.client.post("/v1/predict", content=body, headers=JSON | {"Content-Encoding": "br"})
    assert 415 == answer.status_code


@pytest.mark.slow
def test_gzip_body_of_very_many_members_is_refused_soon(service: Service) -> None:
    """Members that hold nothing cost their bytes once: 32 MiB of them are a 413, as are more than anybody needs."""
    headers, empty = JSON | {"Content-Encoding": "gzip"}, gzip.compress(b"")
    body = gzip.compress(json.dumps(one([ROW])).encode())
    before = processor_seconds(service)
    for count, status in ((32 * 2**20 // len(empty), 413), (4096, 413), (4095, 200)):
        content = (empty * count + body)[: 32 * 2**20]
        assert status == service.client.post("/v1/predict", content=content, headers=headers).status_code
    assert processor_seconds(service) - before < 10  # a minute and more, were the rest copied for each


def processor_seconds(service: Service) -> float:
    """Return CPU time and memory of a service so far."""
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


WINDOW = json.dumps([ROW] * 100)
INFER = "/v2/models/engine-health/infer"
INPUT = '"name":"telemetry","datatype":"FP32","shape":[1,100,17]'
DEEP_PLACES = {  # of each call that reads JSON: bodies, with @ where lists or objects are nested
    "/v1/predict": [
        *("@", '{"more":@}', '{"instances":@}', '{"instances":[@]}', '{"instances":[{"telemetry":@}]}'),
        *('{"instances":[{"telemetry":[@]}],"missing":"hold"}', '{"instances":[{"telemetry":{"sensor_2":[@]}}]}'),
        *(f'{{"instances":[{{"telemetry":{WINDOW},"{name}":@}}]}}' for name in ("label", "engine_id", "telemetry")),
        f'{{"instances":[{{"telemetry":{WINDOW}}}],"temperature":@}}',
        f'{{"instances":[{{"telemetry":@,"telemetry":{WINDOW}}}]}}',
    ],
    "/v1/evaluate": [
        *("@", '{"more":@}', '{"logits":@,"labels":[0]}', '{"logits":[[@]],"labels":[0]}'),
        *('{"logits":[[1,2]],"labels":@}', '{"logits":[[1,2]],"labels":[0],"class_weights":@}'),
    ],
    "/v1/cycles": [
        *("@", '{"more":@}', '{"cycles":@}', '{"cycles":[{"engine_id":@}]}'),
        *(f'{{"cycles":[{{"engine_id":"a","cycle":1,"telemetry":{x}}}]}}' for x in ("@", "[@]", '{"sensor_2":@}')),
    ],
    "/v1/labels": [
        *("@", '{"more":@}', '{"labels":@}', '{"labels":[{"prediction_id":@}]}'),
        '{"labels":[{"prediction_id":"a","label":@}]}',
    ],
    "/v1/outcomes": ["@", '{"engine_id":@}', '{"more":@}'],
    INFER: [
        *("@", '{"inputs":@}', f'{{"inputs":[{{{INPUT},"data":@}}]}}', f'{{"inputs":[{{{INPUT},"more":@}}]}}'),
        *(f'{{"inputs":[{{{INPUT},"data":{WINDOW}}}],"{name}":@}}' for name in ("id", "parameters", "outputs", "more")),
        f'{{"inputs":[{{{INPUT},"parameters":{{"binary_data_size":@}}}}]}}',
        f'{{"inputs":[{{{INPUT},"data":{WINDOW}}}],"parameters":{{"temperature":@}}}}',
    ],
}


@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in DEEP_PLACES.items() for body in bodies])
def test_json_nested_deeply_anywhere_is_refused(
    service: Service, path: str, body: str, opens: str, closes: str
) -> None:
    """Lists or objects nested 250,000 deep are a 400 in any place of any call; around the limits nothing fails."""
    for depth in (250_000, 1030, 1024, 1000, 990, 980, 970):
        for deep in (opens * depth + "1" + closes * depth, opens * depth):
            status = service.client.post(path, content=body.replace("@", deep).encode()).status_code
            assert status == 400 if depth == 250_000 else status < 500, depth


def test_every_call_that_reads_json_has_deep_bodies(service: Service) -> None:
    """The calls above are all that predict, evaluate and record; the others parse with the same function."""
    found = service.client.get("/openapi.json").json()["paths"]
    read = {path for path, methods in found.items() if "requestBody" in methods.get("post", {})}
    assert {INFER.replace("engine-health", "{name}")} | DEEP_PLACES.keys() - {INFER} <= read
    others = read - DEEP_PLACES.keys() - {path for path in read if path.endswith("/infer")}
    for path in others:
        answer = service.client.post(path, content=b"[" * 250_000)
        assert answer.status_code in (400, 403), path  # 403 where admin calls are off


def test_disconnect_during_a_body_is_counted(service: Service) -> None:
    """A connection cut in the middle of a body is counted as such; nothing fails and nothing is logged as an error."""
    before = service.metrics()
    gone = 'engine_health_rejected_total{reason="client_gone"}'
    with socket.create_connection((service.client.base_url.host, service.client.base_url.port or 80)) as connection:
        head = (
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        connection.sendall(head)
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    while service.metrics()[gone] == before[gone] and time.monotonic() < deadline:
        time.sleep(0.05)
    after = service.metrics()
    assert before[gone] + 1 == after[gone]
    assert not [name for name in after if "http_requests" in name and 'status="500"' in name]


@pytest.mark.parametrize("value", [3e38, -3e38, 0.0, 1e-45])
def test_extreme_readings_get_finite_predictions(service: Service, value: float) -> None:
    """The largest, smallest and all-zero readings that fit give finite numbers, not null."""
    row = service.predict([{"telemetry": [[value] * 17]}])["predictions"][0]
    assert all(isinstance(number, float) for number in (*row["logits"], *row["probabilities"].values(), row["rul"]))


def test_non_finite_prediction_names_the_instance(tmp_path: Path) -> None:
    """Where a foreign network overflows, the instance is named with a 422 and the next one is answered."""
    path = overflowing_classifier(tmp_path / "over.onnx")
    with running(ENGINE_HEALTH_MODEL=str(path)) as other:
        bad = other.client.post("/v1/predict", json={"instances": [{"telemetry": [1, 2]}, {"telemetry": [3e38, 0]}]})
        assert (422, ["instances", 1, "telemetry"]) == (bad.status_code, bad.json()["errors"][0]["loc"])
        assert [10, 20] == other.predict([{"telemetry": [1, 2]}])["predictions"][0]["logits"]


def test_loss_beyond_float32_is_the_largest_there_is(tmp_path: Path) -> None:
    """Finite logits, however large, at the lowest temperature, have finite losses in JSON and in tensors."""
    path = overflowing_classifier(tmp_path / "over.onnx")
    with running(ENGINE_HEALTH_MODEL=str(path)) as other:
        row = {"telemetry": [-3e37, 3e37], "label": "a"}
        for temperature in (None, 0.01):
            found = other.predict([row], temperature=temperature)
            losses = [found["predictions"][0]["loss"], found["evaluation"]["cross_entropy"]]
            assert losses == pytest.approx([3.4028235e38] * 2)
        x = {"name": "telemetry", "datatype": "FP32", "shape": [1, 2], "data": [-3e37, 3e37]}
        y = {"name": "label", "datatype": "INT64", "shape": [1], "data": [0]}
        asked: dict[str, Any] = {"inputs": [x, y], "outputs": [{"name": "loss"}], "parameters": {"temperature": 0.01}}
        for binary in (False, True):
            asked["outputs"][0]["parameters"] = {"binary_data": binary}
            answer = other.client.post("/v2/models/over/infer", json=asked)
            assert np.isfinite(np.frombuffer(answer.content[-4:], "<f4")[0]) if binary else answer.json()
            assert b"null" not in answer.content


def test_unknown_paths_and_methods_are_problems_too(service: Service) -> None:
    """404 and 405 have the same shape as every other error."""
    cases = (
        ("GET", "/v1/nothing", 404, None),
        ("GET", "/v2foo", 404, None),  # not the protocol's, whose errors have another shape
        ("GET", "/v1/predict", 405, "POST"),
        ("DELETE", "/livez", 405, "GET, HEAD"),
        ("DELETE", "/v1/calibration/temperature", 405, "GET, HEAD, PUT"),
    )
    for method, path, status, allowed in cases:
        answer = service.client.request(method, path)
        assert status == answer.status_code == answer.json()["status"]
        assert "application/problem+json" == answer.headers["content-type"]
        assert allowed == answer.headers.get("allow")


def test_faults_are_listed_up_to_a_limit(service: Service) -> None:
    """A file of wrong values names the first twenty places."""
    answer = service.client.post("/v1/predict", json=one([[None] * 17] * 50)).json()
    assert 20 == len(answer["errors"])
    assert [*PLACE, 1, "op_setting_3"] in [error["loc"] for error in answer["errors"]]


def test_predictions_after_bad_requests_are_unchanged(service: Service, windows: Readings) -> None:
    """Bad requests change nothing: the same window gives the same bits before and after each of them."""
    asked = [{"telemetry": windows[0].tolist()}]
    before = service.predict(asked)["predictions"][0]["logits"]
    for body, _, _ in CASES:
        service.client.post("/v1/predict", content=as_json(body), headers=JSON)
        assert before == service.predict(asked)["predictions"][0]["logits"]
    assert service.process.poll() is None


def test_limits_hold_whether_announced_or_not() -> None:
    """A body over the limit is 413, with a length and in chunks without one; too many instances are 422."""
    with running(ENGINE_HEALTH_MAX_BODY_BYTES="5000", ENGINE_HEALTH_MAX_INSTANCES="3") as small:
        large = json.dumps(one([ROW] * 50)).encode()
        assert 413 == small.client.post("/v1/predict", content=large, headers=JSON).status_code
        chunks = (large[i : i + 500] for i in range(0, len(large), 500))
        assert 413 == small.client.post("/v1/predict", content=chunks, headers=JSON).status_code
        many = small.client.post("/v1/predict", json={"instances": [{"telemetry": [ROW]}] * 4})
        assert (422, ["instances"]) == (many.status_code, many.json()["errors"][0]["loc"])
        assert 3 == len(small.predict([{"telemetry": [ROW]}] * 3)["predictions"])
        assert 5000 == small.client.get("/v1/model").json()["limits"]["max_body_bytes"]
        rejected = {k: v for k, v in small.metrics().items() if "rejected_total" in k and v}
        assert {
            'engine_health_rejected_total{reason="too_large"}': 2,
            'engine_health_rejected_total{reason="invalid"}': 1,
        } == rejected
