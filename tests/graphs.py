"""What tests of an artefact's other graphs share: a network to write them of, its manifest, spoiled graphs."""

import onnx
import torch

from export.verify import shortest, synthetic_windows, torch_answers
from model import contract
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.network import EngineHealth, NetworkConfig
from service.inference import model_loader

WINDOW = 23


def untrained() -> EngineHealth:
    """A network of rolling means over 23 rows."""
    torch.manual_seed(0)
    made = EngineHealth(NetworkConfig(window=WINDOW, hidden=16)).eval()
    made.normalise.centres.copy_(torch.arange(18).reshape(6, 3) * 10.0)
    return made


def manifest_of(network: EngineHealth) -> contract.Manifest:
    """The bundled manifest with the window and the golden windows of another network."""
    inputs = synthetic_windows(network, 4, seed=1)
    logits, rul = torch_answers(network, inputs)
    golden = [
        {"telemetry": shortest(window), "logits": row.tolist(), "rul": float(cycles)}
        for window, row, cycles in zip(inputs, logits, rul, strict=True)
    ]
    told = open_artefact(ARTEFACT)[1].model_dump() | {"window": network.config.window, "golden": golden}
    return contract.Manifest.model_validate(told)


def bundled(key: str) -> onnx.ModelProto:
    """A graph that lies in the committed artefact beside the network's own."""
    graph = contract.graph_beside(model_loader.metadata(ARTEFACT.read_bytes()), key)
    assert graph is not None
    return onnx.load_model_from_string(graph)


def without(content: onnx.ModelProto, k: int, kept: int) -> bytes:
    """A graph in which a node passes one of its inputs on, and does nothing."""
    changed = onnx.ModelProto()
    changed.CopyFrom(content)
    node = changed.graph.node[k]
    node.CopyFrom(onnx.helper.make_node("Identity", [node.input[kept]], [node.output[0]]))
    return bytes(changed.SerializeToString())
