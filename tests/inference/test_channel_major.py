"""The channel-major graph has the bits of the network, or it is not used."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.to_onnx import export_channel_major, export_network
from export.verify import VerifyError, run_torch, synthetic_windows, verify_channel_major
from model import contract
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.channel_major import ChannelMajorNetwork
from model.training.network import CONDITION_RADIUS, EngineHealth, NetworkConfig
from model.windows import Readings, every_window
from service.inference import onnx_model, probe_windows
from service.inference.model_loader import open_model
from tests.support.models import WINDOW, bundled, manifest_of, untrained, without
from tests.support.processes import Service


@pytest.fixture(scope="module")
def network() -> EngineHealth:
    """Return an untrained network of rolling means over 23 rows."""
    return untrained()


def bits(pair: tuple[Readings, ...]) -> list[list[int]]:
    """Return outputs as bytes."""
    return [column.view(np.int32).tolist() for column in pair]


@settings(max_examples=60)
@given(st.data())
def test_channel_major_graph_equals_the_network(network: EngineHealth, data: st.DataObject) -> None:
    """Bits are equal for padding, constant spells, repeated rows, broken sensors and unknown conditions."""
    windows = synthetic_windows(network, 4, seed=data.draw(st.integers(0, 99)))
    rows = windows.reshape(-1, 17)
    at = st.integers(0, len(rows) - 1)
    for begin, length in data.draw(st.lists(st.tuples(at, st.integers(2, 9)), max_size=8)):
        channels = data.draw(st.sampled_from([slice(None), slice(0, 3), slice(3, 4), slice(5, 9), slice(3, None)]))
        rows[begin : begin + length, channels] = rows[begin, channels]
    for place in data.draw(st.lists(at, max_size=3)):
        rows[place, data.draw(st.integers(0, 16))] = data.draw(st.sampled_from([1e30, -1e6, -0.0, 0.0, 3e38]))
    for k, begin in enumerate(data.draw(st.lists(st.integers(0, WINDOW - 1), max_size=4))):
        windows[k, :begin] = windows[k, begin]
    assert bits(run_torch(network, windows)) == bits(run_torch(ChannelMajorNetwork(network), windows))


def test_channel_major_graph_has_the_bits_of_test_engines(cmapss_dir: Path) -> None:
    """Both graphs have equal bits on all test engines, short histories included, in batches of several sizes."""
    model, (session, _) = open_model(ARTEFACT, threads=1), open_artefact(ARTEFACT)
    assert model.optimised_graph
    for subset in cmapss.SUBSETS:
        windows = np.concatenate(
            [every_window(engine.telemetry, 100) for engine in cmapss.read_test(cmapss_dir, subset)[:6]]
        )
        for size in (1, 5, 64, 256):
            for k in range(0, len(windows), size * (20 if size < 9 else 1)):
                batch = np.ascontiguousarray(windows[k : k + size], np.float32)
                own = session.run([contract.LOGITS, contract.RUL], {contract.INPUT: batch})
                outputs = model.run(batch)
                assert outputs.rul is not None
                assert bits((outputs.logits, outputs.rul)) == bits(tuple(own))


def test_only_rolling_means_have_a_channel_major_graph() -> None:
    """A recurrent backbone, and a window whose sums could be rounded, have no channel-major graph."""
    assert export_channel_major(EngineHealth(NetworkConfig(window=12, backbone="conv-gru", hidden=8))) is None
    assert export_channel_major(EngineHealth(NetworkConfig(window=4096, hidden=8))) is None


def test_close_conditions_get_no_channel_major_graph() -> None:
    """Two nearly equal centres prevent the graph, since the nearer one depends on the order of a sum."""
    network = EngineHealth(NetworkConfig(window=WINDOW, conditions=2, hidden=8))
    for apart, exported in ((0.9, False), (1.1, True)):
        network.normalise.centres[1] = network.normalise.scales * torch.tensor([0.0, apart, 0.0])
        assert exported == (export_channel_major(network) is not None)


@pytest.mark.parametrize("conditions", [1, 2, 6])
def test_rows_at_condition_borders_have_equal_bits(conditions: int) -> None:
    """At half a scale from a centre the last bit of a sum decides, and ONNX Runtime computes the same bit."""
    torch.manual_seed(1)
    network = EngineHealth(NetworkConfig(window=WINDOW, conditions=conditions, hidden=8)).eval()
    usual, random = network.normalise, np.random.default_rng(0)
    usual.centres.copy_(torch.linspace(1, 9, conditions)[:, None] * usual.scales * torch.tensor([0.9, 0.5, 0.7]))
    graph = export_channel_major(network)
    assert graph is not None
    windows = random.standard_normal((64, WINDOW, 17))
    away = windows[..., :3] / np.linalg.norm(windows[..., :3], axis=-1, keepdims=True) * CONDITION_RADIUS
    of = random.integers(conditions, size=windows.shape[:2])
    windows[..., :3] = usual.centres.numpy()[of] + away * usual.scales.numpy()
    verify_channel_major(
        onnx_model.open_session(export_network(network, WINDOW), 1),
        onnx_model.open_session(graph, 1),
        windows.astype(np.float32),
    )


@pytest.mark.parametrize("factor", [1.1, 1 + 1e-4, 1 - 1e-4])
def test_channel_major_graph_with_moved_border_is_rejected(tmp_path: Path, factor: float) -> None:
    """A condition border that is moved by 1e-4 is detected, since probe windows lie close to each border."""
    assert probe_windows.CONDITION_BORDER == CONDITION_RADIUS
    changed = plan()
    ends = next(node.input[1] for node in changed.graph.node if node.op_type == "LessOrEqual")
    bound = next(weight for weight in changed.graph.initializer if weight.name == ends)
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(CONDITION_RADIUS**2 * factor, np.float32), ends))
    contract.write(
        ARTEFACT.read_bytes(),
        open_artefact(ARTEFACT)[1],
        tmp_path / "m.onnx",
        channel_major=changed.SerializeToString(),
    )
    assert not open_model(tmp_path / "m.onnx").optimised_graph


def test_invalid_channel_major_graph_is_ignored(tmp_path: Path) -> None:
    """A graph that is invalid, foreign, renamed or without RUL is ignored, and the network is used."""
    manifest, probes = open_artefact(ARTEFACT)[1], next(probe_windows.probe_batches(open_artefact(ARTEFACT)[1]))
    expected = open_model(ARTEFACT).run(probes).logits
    torch.manual_seed(3)
    other = EngineHealth(NetworkConfig(hidden=8)).eval()
    for k, content in enumerate([b"", b"no graph", export_network(other, 100), renamed(), without_rul()]):
        path = tmp_path / f"{k}.onnx"
        contract.write(ARTEFACT.read_bytes(), manifest, path, channel_major=content)
        model = open_model(path)
        assert not model.optimised_graph
        np.testing.assert_array_equal(expected, model.run(probes).logits)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("And", 0), ("And", 1), ("Or", 0), ("Or", 1)]
    + [(kind, 0) for kind in ("Not", "Round", "Clip", "CumSum", "Relu", "Pad", "Max", "GatherElements")],
)
def test_incomplete_channel_major_graph_is_rejected(tmp_path: Path, kind: str, kept: int) -> None:
    """Verification fails for a graph in which one node of these kinds only passes an input on."""
    content, manifest = plan(), open_artefact(ARTEFACT)[1]
    places = [k for k, node in enumerate(content.graph.node) if node.op_type == kind]
    assert places
    for k in places[-1:] if kind == "Clip" else places:  # the first Clip limits settings, which has no effect here
        contract.write(ARTEFACT.read_bytes(), manifest, tmp_path / "m.onnx", channel_major=without(content, k, kept))
        assert not open_model(tmp_path / "m.onnx").optimised_graph, (k, content.graph.node[k].output)


def test_other_network_uses_its_channel_major_graph(network: EngineHealth, tmp_path: Path) -> None:
    """A network with another window and width uses its channel-major graph."""
    contract.write(
        export_network(network, WINDOW),
        manifest_of(network),
        tmp_path / "m.onnx",
        channel_major=export_channel_major(network),
    )
    assert open_model(tmp_path / "m.onnx").optimised_graph


def test_export_with_foreign_channel_major_graph_fails() -> None:
    """`make export` fails for a graph that would be ignored."""
    session, _ = open_artefact(ARTEFACT)
    other = onnx_model.open_session(export_network(EngineHealth(NetworkConfig(hidden=8)).eval(), 100), 1)
    with pytest.raises(VerifyError, match="the channel-major graph"):
        verify_channel_major(
            session, other, probe_windows.probe_history(open_artefact(ARTEFACT)[1])[:400].reshape(4, 100, 17)
        )


def test_model_reports_optimised_graph(service: Service) -> None:
    """`GET /v1/model` reports the optimised graph."""
    assert service.client.get("/v1/model").json()["optimised_graph"] is True


def renamed() -> bytes:
    """Return the channel-major graph with another name for its input."""
    changed = plan()
    changed.graph.input[0].name = "readings"
    for node in changed.graph.node:
        node.input[:] = ["readings" if name == contract.INPUT else name for name in node.input]
    return bytes(changed.SerializeToString())


def without_rul() -> bytes:
    """Return the channel-major graph without its second output."""
    changed = plan()
    del changed.graph.output[1:]
    return bytes(changed.SerializeToString())


def plan() -> onnx.ModelProto:
    """Return the bundled channel-major graph."""
    return bundled(contract.CHANNEL_MAJOR_KEY)
