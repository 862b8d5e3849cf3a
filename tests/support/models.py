"""Small ONNX models and edited artefacts for tests."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.verify import run_torch, shortest_decimals, synthetic_windows
from model import contract
from model.contract import Manifest
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.network import EngineHealth, NetworkConfig
from service.inference import onnx_model

WINDOW = 23


def untrained() -> EngineHealth:
    """Return a network of rolling means over 23 rows."""
    torch.manual_seed(0)
    network = EngineHealth(NetworkConfig(window=WINDOW, hidden=16)).eval()
    network.normalise.centres.copy_(torch.arange(18).reshape(6, 3) * 10.0)
    return network


def manifest_of(network: EngineHealth) -> contract.Manifest:
    """Return the bundled manifest with window and golden windows of another network."""
    inputs = synthetic_windows(network, 4, seed=1)
    logits, rul = run_torch(network, inputs)
    golden = [
        {"telemetry": shortest_decimals(window), "logits": row.tolist(), "rul": float(cycles)}
        for window, row, cycles in zip(inputs, logits, rul, strict=True)
    ]
    fields = open_artefact(ARTEFACT)[1].model_dump() | {"window": network.config.window, "golden": golden}
    return contract.Manifest.model_validate(fields)


def bundled(key: str) -> onnx.ModelProto:
    """Return an additional graph of the committed artefact."""
    graph = contract.read_graph(onnx_model.read_metadata(ARTEFACT.read_bytes()), key)
    assert graph is not None
    return onnx.load_model_from_string(graph)


def without(content: onnx.ModelProto, k: int, kept: int) -> bytes:
    """Return a graph in which a node only passes one of its inputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(content)
    node = changed.graph.node[k]
    node.CopyFrom(onnx.helper.make_node("Identity", [node.input[kept]], [node.output[0]]))
    return bytes(changed.SerializeToString())


Change = Callable[[onnx.ModelProto], None]


def edited(path: Path, manifest: dict[str, object] | None = None, change: Change | None = None) -> Path:
    """Write the artefact with another manifest or graph."""
    proto = onnx.load(ARTEFACT)
    text = next(entry.value for entry in proto.metadata_props if entry.key == contract.MANIFEST_KEY)
    if change:
        change(proto)
    described = Manifest.model_validate(json.loads(text) | (manifest or {}))
    contract.write(proto.SerializeToString(), described, path)
    return path


def classifier(
    path: Path, nodes: Sequence[onnx.NodeProto], shape: tuple[int, ...], manifest: dict[str, object]
) -> Path:
    """Write a network from `telemetry` [n, *shape] to `logits` [n, shape[-1]] with constants ten, rows, time."""
    telemetry = helper.make_tensor_value_info("telemetry", TensorProto.FLOAT, ["n", *shape])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", shape[-1]])
    ten = numpy_helper.from_array(np.array(10, np.float32), "ten")
    axes = [numpy_helper.from_array(np.array([axis]), name) for axis, name in enumerate(("rows", "time"))]
    graph = helper.make_graph(nodes, "g", [telemetry], [logits], [ten, *axes])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract.write(proto.SerializeToString(), Manifest.model_validate(manifest), path)
    return path


def identity_classifier(path: Path, manifest: dict[str, object]) -> Path:
    """Write a model of four inputs that are its logits."""
    return classifier(path, [helper.make_node("Identity", ["telemetry"], ["logits"])], (4,), manifest)


def overflowing_classifier(path: Path) -> Path:
    """Write a model of two inputs whose logits are ten times the inputs."""
    manifest: dict[str, object] = {"name": "over", "version": "1", "classes": ["a", "b"]}
    return classifier(path, [helper.make_node("Mul", ["telemetry", "ten"], ["logits"])], (2,), manifest)


def window_classifier(path: Path, reduction: str, window: int, **fields: object) -> Path:
    """Write a model of windows (window, 2) whose logits are ten times a reduction over time, for example ReduceSum.

    `fields` are further fields of the manifest.
    """
    nodes = [
        helper.make_node(reduction, ["telemetry", "time"], ["reduced"], keepdims=0),
        helper.make_node("Mul", ["reduced", "ten"], ["logits"]),
    ]
    channels = [{"name": "x"}, {"name": "y"}]
    manifest: dict[str, object] = {
        "name": "reduced",
        "version": "1",
        "classes": ["a", "b"],
        "window": window,
        "channels": channels,
    }
    return classifier(path, nodes, (window, 2), manifest | fields)


def slow_classifier(path: Path, steps: int = 20_000) -> Path:
    """Write an artefact whose logits are its three inputs after a loop of `steps`: about 100 ms for 20,000."""
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "nothing"], ["sum"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("v", TensorProto.FLOAT, [])],
        [scalar("on", TensorProto.BOOL, []), scalar("sum", TensorProto.FLOAT, [])],
        [helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0])],
    )
    nodes = [
        helper.make_node("ReduceSum", [contract.INPUT], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "zero"], ["start"]),  # depends on the input, so that nothing is folded
        helper.make_node("Loop", ["steps", "", "start"], ["end"], body=body),
        helper.make_node("Add", [contract.INPUT, "end"], [contract.LOGITS]),
    ]
    shape: list[str | int | None] = ["batch", 3]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info(contract.INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(contract.LOGITS, TensorProto.FLOAT, shape)],
        [
            helper.make_tensor("steps", TensorProto.INT64, [], [steps]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    described = {"name": "slow", "version": "1", "classes": ["a", "b", "c"], "temperature": 1.0}
    contract.write(proto.SerializeToString(), contract.parse_manifest(json.dumps(described)), path)
    return path
