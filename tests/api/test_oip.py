import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model import numerics
from model.contract import Manifest
from model.windows import Readings
from tests.support.bodies import INFER, binary, contradictory_requests, inference_body, outputs, tensor_of
from tests.support.models import identity_classifier
from tests.support.processes import Service, running


def test_oip_encodings_equal_predict(service: Service, manifest: Manifest, windows: Readings) -> None:
    """JSON or bytes in, JSON or bytes out, nested or flat: the same numbers as /v1/predict, to the bit."""
    rows = service.predict([{"telemetry": window.tolist()} for window in windows])["predictions"]
    flat = {"inputs": [tensor_of(windows, data=windows.ravel().tolist())]}
    body, headers = binary(windows)
    every, every_headers = binary(windows, parameters={"binary_data_output": True})
    answers = [
        service.client.post(INFER, json=inference_body(windows)),
        service.client.post(INFER, json=flat),
        service.client.post(INFER, json=inference_body(windows, parameters={"binary_data_output": True})),
        service.client.post(INFER, content=body, headers=headers),
        service.client.post(INFER, content=every, headers=every_headers),
        service.client.post(
            "/v2/models/engine-health/versions/" + manifest.version + "/infer", json=inference_body(windows)
        ),
    ]
    for answer in answers:
        found = outputs(answer)
        assert {"logits", "probabilities", "rul", "health", "head"} == set(found)
        np.testing.assert_array_equal(
            np.array([row["logits"] for row in rows], np.float32), np.float32(found["logits"])
        )
        np.testing.assert_array_equal(np.array([row["rul"] for row in rows], np.float32), np.float32(found["rul"]))
        p = [[row["probabilities"][name] for name in manifest.classes] for row in rows]
        np.testing.assert_array_equal(np.array(p, np.float32), np.float32(found["probabilities"]))
        assert [row["health"] for row in rows] == found["health"].tolist()
        assert (manifest.name, manifest.version) == (found["head"]["model_name"], found["head"]["model_version"])


def test_outputs_have_requested_order_and_encoding(service: Service, windows: Readings) -> None:
    """Requested outputs have their order and encoding, others are omitted, and the request id is echoed."""
    wanted = [{"name": "health", "parameters": {"binary_data": True}}, {"name": "rul"}]
    found = outputs(service.client.post(INFER, json=inference_body(windows, outputs=wanted, id="a-17")))
    assert ["health", "rul"] == [tensor["name"] for tensor in found["head"]["outputs"]]
    assert ["binary_data_size"] == list(found["head"]["outputs"][0]["parameters"])
    assert "data" in found["head"]["outputs"][1]
    assert "a-17" == found["head"]["id"]
    assert "id" not in outputs(service.client.post(INFER, json=inference_body(windows)))["head"]


def test_labels_bring_losses_and_temperature_flattens(service: Service, windows: Readings) -> None:
    """With class indices each row has its cross-entropy; a temperature divides the logits of this call."""
    labels = {"name": "label", "shape": [4], "datatype": "INT64", "data": [0, 1, 2, 1]}
    request = {"inputs": [tensor_of(windows), labels], "parameters": {"temperature": 3.0}}
    found = outputs(service.client.post(INFER, json=request))
    expected = numerics.cross_entropy(found["logits"], [0, 1, 2, 1], 3.0, reduction="none")
    np.testing.assert_allclose(expected, found["loss"], rtol=1e-5)
    np.testing.assert_allclose(numerics.softmax(found["logits"], 3.0), found["probabilities"], atol=1e-6)
    raw = windows.astype("<f4").tobytes() + np.array([0, 1, 2, 1], "<i8").tobytes()
    inputs = [
        {"name": "telemetry", "shape": [4, 100, 17], "datatype": "FP32", "parameters": {"binary_data_size": 27200}},
        {"name": "label", "shape": [4, 1], "datatype": "INT64", "parameters": {"binary_data_size": 32}},
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"temperature": 3.0}}).encode()
    again = service.client.post(INFER, content=head + raw, headers={"Inference-Header-Content-Length": str(len(head))})
    np.testing.assert_array_equal(np.float32(found["loss"]), np.float32(outputs(again)["loss"]))


def test_server_and_model_metadata_are_complete(service: Service, manifest: Manifest) -> None:
    """Server and model metadata, live, ready; another model or version is a 404 with the protocol's error."""
    get = service.client.get
    assert "binary_tensor_data" in get("/v2").json()["extensions"]
    assert {"live": True} == get("/v2/health/live").json()
    assert {"ready": True} == get("/v2/health/ready").json()
    found = get("/v2/models/engine-health").json()
    assert found == get(f"/v2/models/engine-health/versions/{manifest.version}").json()
    assert [-1, 100, 17] == found["inputs"][0]["shape"]
    assert {"logits", "probabilities", "health", "rul", "loss"} == {tensor["name"] for tensor in found["outputs"]}
    assert 200 == get("/v2/models/engine-health/ready").status_code
    for path in ("/v2/models/other", "/v2/models/engine-health/versions/9", "/v2/models/other/ready"):
        answer = get(path)
        assert (404, ["error"]) == (answer.status_code, list(answer.json()))
    assert 404 == service.client.post("/v2/models/other/infer", json={"inputs": []}).status_code


def test_lies_about_shapes_types_and_bytes_are_refused(service: Service, windows: Readings) -> None:
    """Every request that does not fit itself is a 400 with the protocol's error, and the next one is answered."""
    before = outputs(service.client.post(INFER, json=inference_body(windows)))["logits"]
    for number, (body, headers) in enumerate(contradictory_requests(windows)):
        if isinstance(body, np.ndarray):
            body, headers = binary(body)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = service.client.post(INFER, content=content, headers=headers)
        assert 400 == answer.status_code, (number, answer.text)
        assert ["error"] == list(answer.json())
        assert answer.json()["error"]
    np.testing.assert_array_equal(before, outputs(service.client.post(INFER, json=inference_body(windows)))["logits"])


def test_oip_with_other_media_type_gets_415(service: Service, windows: Readings) -> None:
    """Another content type is a 415 of the protocol's shape; its own two, JSON's other names and none are read."""
    body, headers = binary(windows)
    for kind, status in (
        ("application/octet-stream", 200),
        ("application/json", 200),
        ("application/vnd.x+json; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
    ):
        answer = service.client.post(INFER, content=body, headers=headers | {"Content-Type": kind})
        assert status == answer.status_code, kind
        assert 200 == status or ["error"] == list(answer.json())
    assert 200 == service.client.post(INFER, content=body, headers=headers).status_code


def test_readings_too_large_to_add_up_are_still_readings(service: Service) -> None:
    """The largest float32 everywhere is finite, and is answered or refused as such, not as infinity."""
    body, headers = binary(np.full((4, 100, 17), 3.4e38, np.float32))
    assert 200 == service.client.post(INFER, content=body, headers=headers).status_code


def test_classifier_without_rul_is_served_by_oip(tmp_path: Path) -> None:
    """A model without RUL and windows has its own shapes, and no output that it lacks."""
    path = identity_classifier(
        tmp_path / "four.onnx", {"name": "four", "version": "1", "classes": ["n", "e", "s", "w"]}
    )
    with running(ENGINE_HEALTH_MODEL=str(path)) as other:
        tensor = {"name": "telemetry", "shape": [2, 4], "datatype": "FP32", "data": [0, 3, 0, 0, 0, 0, 0, 9]}
        found = outputs(other.client.post("/v2/models/four/infer", json={"inputs": [tensor]}))
        assert ["e", "w"] == found["health"].tolist()
        assert "rul" not in found
        missing = {"inputs": [tensor], "outputs": [{"name": "rul"}]}
        assert 400 == other.client.post("/v2/models/four/infer", json=missing).status_code


@pytest.mark.parametrize("rows", [1, 65, 300])
def test_more_rows_than_a_batch_come_back_whole(service: Service, windows: Readings, rows: int) -> None:
    """A request larger than a batch is cut and joined: every row answers as it does alone."""
    many = windows[np.arange(rows) % 4]
    body, headers = binary(many)
    logits = outputs(service.client.post(INFER, content=body, headers=headers))["logits"]
    alone = outputs(service.client.post(INFER, json=inference_body(windows)))["logits"]
    np.testing.assert_allclose(alone[np.arange(rows) % 4], logits, atol=1e-5)


def test_stock_client_works_unchanged(service: Service, windows: Readings, tmp_path: Path) -> None:
    """Triton's HTTP client gets the predictions of /v1/predict in both encodings, plain and gzipped."""
    np.save(tmp_path / "windows.npy", windows)
    address = f"{service.client.base_url.host}:{service.client.base_url.port}"
    script = Path(__file__).parents[1] / "support" / "stock_client.py"
    arguments = [str(script), address, str(tmp_path / "windows.npy")]
    command = [sys.executable, "-P", *arguments]  # without its folder in the path, which has a module `http`
    found = json.loads(subprocess.check_output(command, text=True))
    rows = service.predict([{"telemetry": w.tolist(), "label": k % 3} for k, w in enumerate(windows)])["predictions"]
    assert "unknown model 'other'" in found["error"]
    ways = [found[f"{binary} {packed}"] for binary in (True, False) for packed in (None, "gzip")]
    for said in (*ways, found["True plain"], found["False plain"]):
        np.testing.assert_allclose([x for row in rows for x in row["logits"]], said["logits"], rtol=1e-6)
    for said in ways:
        assert [row["health"] for row in rows] == said["health"]
        np.testing.assert_allclose([row["rul"] for row in rows], said["rul"], rtol=1e-6)
        np.testing.assert_allclose([row["loss"] for row in rows], said["loss"], rtol=1e-6)
