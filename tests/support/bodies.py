"""Valid and invalid request bodies for tests and benchmarks."""

import json
import struct
from typing import Any

import httpx
import numpy as np

from model.contract import CHANNELS
from model.windows import Readings
from service.codecs.requests import EXAMPLE_ROW


def inference_body(windows: Readings, **rest: Any) -> dict[str, Any]:
    return {"inputs": [tensor_of(windows)], **rest}


def texts(raw: bytes) -> list[str]:
    decoded = []
    while raw:
        (length,) = struct.unpack_from("<I", raw)
        decoded.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return decoded


ROW = EXAMPLE_ROW
BY_NAME = {name: [value] for name, value in zip(CHANNELS, ROW, strict=True)}


def row_with(value: Any) -> list[list[Any]]:
    return [ROW, [*ROW[:5], value, *ROW[6:]]]


def one(telemetry: Any, **rest: Any) -> dict[str, Any]:
    return {"instances": [{"telemetry": telemetry, **rest}]}


PLACE = ["instances", 0, "telemetry"]
SENSOR_4 = [*PLACE, 1, "sensor_4"]
CASES: list[tuple[Any, int, list[Any] | None]] = [
    (one([ROW, ROW[:-1]]), 422, [*PLACE, 1]),
    (one([ROW, [*ROW, 1.0]]), 422, [*PLACE, 1]),
    (one(ROW), 422, [*PLACE, 0]),
    (one([[ROW]]), 422, [*PLACE, 0]),
    (one([]), 422, PLACE),
    (one(None), 422, PLACE),
    (one("x"), 422, PLACE),
    (one(3), 422, PLACE),
    (one(row_with("1400")), 422, SENSOR_4),
    (one(row_with(None)), 422, SENSOR_4),
    (one(row_with(True)), 422, SENSOR_4),
    (one(row_with([1])), 422, SENSOR_4),
    (one(row_with({})), 422, SENSOR_4),
    (one(row_with(1e39)), 422, SENSOR_4),
    (one(row_with(-1e39)), 422, SENSOR_4),
    (one(row_with(3.4028236e38)), 422, SENSOR_4),
    (one(row_with(10**400)), 422, SENSOR_4),
    (one([[None, *ROW[1:5], 1e300, *ROW[6:]]]), 422, [*PLACE, 0, "op_setting_1"]),
    (one(row_with(10**30)), 200, None),
    (one(row_with(10**60)), 422, SENSOR_4),
    (one(row_with(float("nan"))), 400, None),
    (one(row_with(float("inf"))), 400, None),
    (one({**BY_NAME, "sensor_99": [1.0]}), 422, [*PLACE, "sensor_99"]),
    (one({k: v for k, v in BY_NAME.items() if k != "sensor_7"}), 422, [*PLACE, "sensor_7"]),
    (one({**BY_NAME, "sensor_7": [1.0, 2.0]}), 422, [*PLACE, "sensor_7"]),
    (one({**BY_NAME, "sensor_7": 1.0}), 422, [*PLACE, "sensor_7"]),
    (one({**BY_NAME, "sensor_7": ["x"]}), 422, [*PLACE, 0, "sensor_7"]),
    (one({key: [] for key in CHANNELS}), 422, PLACE),
    (one({}), 422, [*PLACE, "op_setting_1"]),
    (one([ROW], label="healthy"), 422, ["instances", 0, "label"]),
    (one([ROW], label=3), 422, ["instances", 0, "label"]),
    (one([ROW], label=-1), 422, ["instances", 0, "label"]),
    (one([ROW], label=10**40), 422, ["instances", 0, "label"]),
    (one([ROW], label=1.5), 422, ["instances", 0, "label"]),
    (one([ROW], label=True), 422, ["instances", 0, "label"]),
    (one([ROW], label=[0.5, 0.2, 0.2]), 422, ["instances", 0, "label"]),
    (one([ROW], label=[1.5, -0.5, 0.0]), 422, ["instances", 0, "label"]),
    (one([ROW], label=[0.5, 0.5]), 422, ["instances", 0, "label"]),
    (one([ROW], label=[]), 422, ["instances", 0, "label"]),
    (one([ROW], engine_id=7), 422, ["instances", 0, "engine_id"]),
    (one([ROW], engine_id=""), 422, ["instances", 0, "engine_id"]),
    (one([ROW], cycle="7"), 422, ["instances", 0, "cycle"]),
    (one([ROW], cycle=-1), 422, ["instances", 0, "cycle"]),
    (one([ROW], cycle=1.5), 422, ["instances", 0, "cycle"]),
    (one([ROW], lable=1), 422, ["instances", 0, "lable"]),
    ({**one([ROW]), "temprature": 2}, 422, ["temprature"]),
    ({**one([ROW]), "a.b[0]`": 2}, 422, ["a.b[0]`"]),
    ({"instances": []}, 422, ["instances"]),
    ({"instances": [{}]}, 422, ["instances", 0]),
    ({"instances": [7]}, 422, ["instances", 0]),
    ({"instances": {}}, 422, ["instances"]),
    ({}, 422, []),
    ([], 422, []),
    (None, 422, []),
    *[({**one([ROW]), "temperature": t}, 422, ["temperature"]) for t in (0, -1, 0.001, 1000, "1", True, [1])],
    ({**one([ROW]), "missing": "guess"}, 422, ["missing"]),
    ({**one([[None] * 17]), "missing": "hold"}, 422, [*PLACE, 0, "op_setting_1"]),
]
EVALUATIONS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"logits": [[1, 2, 3]], "labels": [3]}, ["labels", 0]),
    ({"logits": [[1, 2, 3]], "labels": ["healthy"]}, ["labels", 0]),
    ({"logits": [[1, 2, 3]], "labels": [0, 1]}, ["labels"]),
    ({"logits": [[1, 2, 3], [1, 2]], "labels": [0, 1]}, ["logits", 1]),
    ({"logits": [[1, 2, None]], "labels": [0]}, ["logits", 0, 2]),
    ({"logits": [[1, 2, "3"]], "labels": [0]}, ["logits", 0, 2]),
    ({"logits": [[1, 2, 1e39]], "labels": [0]}, ["logits", 0, 2]),
    ({"logits": [[1, 2, 10**400]], "labels": [0]}, ["logits", 0, 2]),
    ({"logits": [[1, 2, 1e308]], "labels": [0]}, ["logits", 0, 2]),
    ({"logits": [], "labels": [0]}, ["logits"]),
    ({"logits": [[]], "labels": [0]}, ["logits"]),
    ({"logits": 7, "labels": [0]}, ["logits"]),
    ({"logits": [[1, 2, 3]], "labels": []}, ["labels"]),
    ({"logits": [[1, 2, 3]], "labels": [[0.5, 0.2, 0.2]]}, ["labels", 0]),
    ({"logits": [[1, 2, 3]], "labels": [[1e308, 1e308, 0]]}, ["labels", 0]),
    ({"logits": [[1, 2, 3]], "labels": [None]}, ["labels", 0]),
    ({"logits": [[1, 2, 3]], "labels": [0], "temperature": 0}, ["temperature"]),
    ({"logits": [[1, 2, 3]], "labels": [0], "class_weights": [1, 1]}, ["class_weights"]),
    ({"logits": [[1, 2, 3]], "labels": [0], "class_weights": [0, 1, 1]}, ["class_weights"]),
    ({"logits": [[1, 2, 3]], "labels": [0], "class_weights": [-1, 1, 1]}, ["class_weights"]),
    ({"logits": [[1, 2, 3]], "labels": [0], "class_weights": [1e308, 1, 1]}, ["class_weights"]),
    ({"logits": [[0.0, 1.0]] * 4097, "labels": [0] * 4097}, ["logits"]),
]
BODIES: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"hello", 400),
    (b'{"instances": [{"telemetry": [[1, 2', 400),
    (b'{"instances": [{"telemetry": ' + b"[" * 250_000 + b"]" * 250_000 + b"}]}", 400),
    (b"[" * 250_000, 400),
    (b'{"a":' * 100_000, 400),
    (b"\xff\xfe", 400),
    (b'{"instances": [{"telemetry": [["\xff"]]}]}', 400),
    (b'{"instances": 7, "more": tru', 400),
    (b'{"instances": 7, "more": 1e999}', 422),
    (b'{"instances": [{"telemetry": [[1]], "engine_id": "\\ud800"}]}', 400),
    (b'{"instances": [{"telemetry": [[1e999]]}]}', 422),
    (json.dumps(one([ROW])).encode() + b" x", 400),
    (json.dumps(one([ROW])).encode("utf-16"), 400),
]
INFER = "/v2/models/engine-health/infer"


def tensor_of(windows: Readings, **more: Any) -> dict[str, Any]:
    shape = list(windows.shape)
    return {"name": "telemetry", "shape": shape, "datatype": "FP32", "data": windows.tolist()} | more


def binary(windows: Readings, **rest: Any) -> tuple[bytes, dict[str, str]]:
    """Return a request with a binary tensor after the JSON, and its headers."""
    raw = windows.astype("<f4").tobytes()
    tensor = tensor_of(windows, parameters={"binary_data_size": len(raw)})
    del tensor["data"]
    head = json.dumps({"inputs": [tensor], **rest}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def outputs(answer: httpx.Response) -> dict[str, Any]:
    """Return every output tensor by name, from JSON or binary data."""
    assert answer.status_code == 200, answer.text
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    head, at, tensors = json.loads(answer.content[:size]), size, {}
    for tensor in head["outputs"]:
        length = tensor.get("parameters", {}).get("binary_data_size")
        if length is None:
            values = tensor["data"]
        else:
            raw, at = answer.content[at : at + length], at + length
            values = texts(raw) if tensor["datatype"] == "BYTES" else np.frombuffer(raw, "<f4")
        tensors[tensor["name"]] = np.array(values).reshape(tensor["shape"])
    assert at == len(answer.content)
    return tensors | {"head": head}


def contradictory_requests(windows: Readings) -> list[tuple[Any, dict[str, str]]]:
    """Return requests that contradict themselves, with their headers."""
    good, headers = binary(windows)
    head = int(headers["Inference-Header-Content-Length"])
    label = {"name": "label", "shape": [4], "datatype": "INT64", "data": [0, 1, 2, 3]}
    return [
        ({"inputs": []}, {}),
        ({"inputs": [tensor_of(windows, shape=[4, 100, 18])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[4, -100, -17])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[2**40, 2**40, 17])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[400, 17])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[0, 2**63], data=[])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[0, 2**62, 2**62], data=[])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[1] * 65, data=[1.0])]}, {}),
        ({"inputs": [tensor_of(windows, shape=[2**62] * 40_000)]}, {}),
        (
            {
                "inputs": [
                    {
                        k: v
                        for k, v in tensor_of(windows, shape=[0, 2**63], parameters={"binary_data_size": 0}).items()
                        if k != "data"
                    }
                ]
            },
            {},
        ),
        ({"inputs": [tensor_of(windows, shape=[0, 100, 17], data=[])]}, {}),
        ({"inputs": [tensor_of(windows, datatype="FP64")]}, {}),
        ({"inputs": [tensor_of(windows, name="telemetri")]}, {}),
        ({"inputs": [tensor_of(windows), tensor_of(windows)]}, {}),
        ({"inputs": [tensor_of(windows, data=["a"] * 6800)]}, {}),
        ({"inputs": [tensor_of(windows, data=[1e39] * 6800)]}, {}),
        ({"inputs": [tensor_of(windows, data=[None] * 6800)]}, {}),
        ({"inputs": [tensor_of(windows, data=None)]}, {}),
        ({"inputs": [tensor_of(windows, parameters={"binary_data_size": 27200})]}, {}),
        ({"inputs": [tensor_of(windows), label]}, {}),
        ({"inputs": [tensor_of(windows), label | {"data": [0, 1, 2, -1]}]}, {}),
        ({"inputs": [tensor_of(windows), label | {"shape": [3], "data": [0, 1, 2]}]}, {}),
        ({"inputs": [tensor_of(windows), label | {"data": [0, 1, 2, 0.5]}]}, {}),
        (inference_body(windows, outputs=[{"name": "softmax"}]), {}),
        (inference_body(windows, outputs=[{"name": "loss"}]), {}),
        (inference_body(windows, outputs=[{"name": "rul"}, {"name": "rul"}]), {}),
        (inference_body(windows, parameters={"temperature": 0}), {}),
        (inference_body(windows, parameters={"binary_data_output": "yes"}), {}),
        (inference_body(windows, id=7), {}),
        (good[:-1], headers),
        (good + b"x", headers),
        (good[: head + 100], headers),
        (good, {"Inference-Header-Content-Length": str(len(good) + 1)}),
        (good, {"Inference-Header-Content-Length": "-1"}),
        (good, {"Inference-Header-Content-Length": "9" * 40}),
        (good, {"Inference-Header-Content-Length": "10"}),
        (good, {}),
        (b"", {}),
        (b"[" * 200_000, {}),
        (b'{"inputs": [{"name": "telemetry", "shape": ' + b"[" * 200_000, {}),
        (good.replace(b"27200", b"27199"), headers),
        (np.full((4, 100, 17), np.nan, "<f4"), {}),
        (np.full((4, 100, 17), np.inf, "<f4"), {}),
    ]
