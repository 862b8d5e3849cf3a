import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.to_onnx import export_network
from export.verify import VerifyError, measure_difference, run_torch, synthetic_windows
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.training.cross_fit import load_checkpoint
from model.training.network import EngineHealth, NetworkConfig
from model.windows import Readings, every_window, pad_left
from service.inference.model_loader import open_model


@pytest.fixture(scope="module")
def network() -> EngineHealth:
    """An untrained recurrent network with plausible statistics; exporters make most errors with recurrence."""
    torch.manual_seed(0)
    untrained = EngineHealth(NetworkConfig(window=12, backbone="conv-gru", hidden=8)).eval()
    untrained.normalise.centres.copy_(torch.arange(18).reshape(6, 3) * 10.0)
    return untrained


@pytest.fixture(scope="module")
def exported(network: EngineHealth) -> bytes:
    """The network as ONNX."""
    return export_network(network, network.config.window)


@pytest.fixture(scope="module")
def inputs(network: EngineHealth) -> Readings:
    """64 windows for the network."""
    return synthetic_windows(network, 64)


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_export_equals_torch_at_every_batch_size(network: EngineHealth, exported: bytes, inputs: Readings) -> None:
    """In batches of 1, 2, 7 and 64, and row by row, ONNX Runtime has the outputs of torch."""
    assert measure_difference(network, session(onnx.load_model_from_string(exported)), inputs) < 1e-5


def test_cnn_bilstm_export_equals_torch() -> None:
    """Bidirectional LSTM and attention have the outputs of torch in ONNX Runtime, at every batch size."""
    torch.manual_seed(1)
    textbook = EngineHealth(NetworkConfig(window=9, backbone="cnn-bilstm-attention", hidden=8)).eval()
    proto = onnx.load_model_from_string(export_network(textbook, 9))
    assert measure_difference(textbook, session(proto), synthetic_windows(textbook, 64)) < 1e-5
    assert 2 == sum(node.op_type == "LSTM" for node in proto.graph.node)


def test_rolling_means_export_equals_torch(network: EngineHealth) -> None:
    """Padding, unknown conditions and means have the outputs of torch, and no step is looped or unrolled."""
    torch.manual_seed(2)
    rolling = EngineHealth(NetworkConfig(window=12, hidden=8)).eval()
    rolling.normalise.load_state_dict(network.normalise.state_dict())
    proto = onnx.load_model_from_string(export_network(rolling, 12))
    inputs = synthetic_windows(rolling, 64)
    inputs[::3, ::2, 0] += 5
    assert measure_difference(rolling, session(proto), inputs) < 1e-5
    assert not {"GRU", "LSTM", "Loop", "Scan"} & {node.op_type for node in proto.graph.node}
    longer = EngineHealth(NetworkConfig(window=19, hidden=8)).eval()
    assert len(proto.graph.node) == len(onnx.load_model_from_string(export_network(longer, 19)).graph.node)


def test_export_has_dynamic_batch_and_no_unrolled_loop(exported: bytes) -> None:
    """The batch is dynamic, the window fixed, the recurrence one GRU node, and all weights are in the file."""
    proto = onnx.load_model_from_string(exported)
    batch, window, channels = proto.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert (12, 17) == (window.dim_value, channels.dim_value)
    assert ["GRU"] == [node.op_type for node in proto.graph.node if node.op_type in ("GRU", "Loop", "Scan")]
    assert len(proto.graph.node) < 80
    assert all(weight.data_location == TensorProto.DEFAULT for weight in proto.graph.initializer)


def test_recurrent_state_fixed_at_batch_1_is_detected(network: EngineHealth, exported: bytes, inputs: Readings) -> None:
    """An initial state of batch size 1 fails verification."""
    proto = onnx.load_model_from_string(exported)
    gru = next(node for node in proto.graph.node if node.op_type == "GRU")
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1, 8), np.float32), "frozen_state"))
    gru.input[5] = "frozen_state"
    with pytest.raises(VerifyError, match="batch 2"):
        measure_difference(network, session(proto), inputs)


def test_wrong_gru_variant_is_detected(network: EngineHealth, exported: bytes, inputs: Readings) -> None:
    """The other of the two GRU variants of ONNX fails verification."""
    proto = onnx.load_model_from_string(exported)
    gru = next(node for node in proto.graph.node if node.op_type == "GRU")
    next(attribute for attribute in gru.attribute if attribute.name == "linear_before_reset").i = 0
    with pytest.raises(VerifyError, match="differs from torch"):
        measure_difference(network, session(proto), inputs)


def test_rows_that_depend_on_the_batch_are_detected(network: EngineHealth, exported: bytes, inputs: Readings) -> None:
    """A graph whose rows depend on other rows of the batch fails verification."""
    proto = onnx.load_model_from_string(exported)
    for node in proto.graph.node:
        node.output[:] = ["own" if name == "logits" else name for name in node.output]
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "zero"))
    proto.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["own", "zero"], ["batch_mean"]),
            helper.make_node("Sub", ["own", "batch_mean"], ["logits"]),
        ]
    )
    with pytest.raises(VerifyError, match=r"batch (1|2)"):
        measure_difference(network, session(proto), inputs)


def test_outputs_that_are_not_finite_are_detected(network: EngineHealth, exported: bytes, inputs: Readings) -> None:
    """A weight that is NaN fails verification."""
    proto = onnx.load_model_from_string(exported)
    bias = next(weight for weight in proto.graph.initializer if weight.name == "head.bins.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(26, np.nan, np.float32), bias.name))
    with pytest.raises(VerifyError, match="nan"):
        measure_difference(network, session(proto), inputs)


def test_artefact_equals_committed_weights(cmapss_dir: Path) -> None:
    """On real windows of all subsets, the bundled ONNX file has the outputs of the bundled torch weights."""
    network, _ = load_checkpoint(ARTEFACT.with_suffix(".pt"))
    onnx_session, manifest = open_artefact(ARTEFACT)
    assert manifest.window is not None
    for subset in cmapss.SUBSETS:
        history = cmapss.read_test(cmapss_dir, subset)[1]
        real = np.ascontiguousarray(every_window(history.telemetry, manifest.window))
        logits, rul = run_torch(network, real)
        outputs = onnx_session.run(["logits", "rul"], {"telemetry": real})
        np.testing.assert_allclose(logits, outputs[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(rul, outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("model.training.cross_fit", "--folds 1"),
        ("model.training.cross_fit", "--epochs 0"),
        ("model.training.cross_fit", "--near-threshold 130"),
        ("model.training.calibrate", "--checkpoint NOTHING"),
        ("export.to_onnx", "--checkpoint NOTHING"),
        ("export.to_onnx", "--checkpoint TEXT"),
        ("export.verify", "--checkpoint TEXT"),
        ("model.evaluation.evaluate", "TEXT"),
        ("model.evaluation.evaluate", "NOTHING"),
    ],
)
def test_command_with_invalid_input_fails_in_one_line(
    cmapss_dir: Path, tmp_path: Path, module: str, flags: str
) -> None:
    """An invalid flag, a missing or a foreign file: exit code 1 and one line, no traceback."""
    (tmp_path / "TEXT").write_text("no model")
    arguments = [str(tmp_path / word) if word.isupper() else word for word in flags.split()]
    command = [sys.executable, "-m", module, *arguments]
    completed = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CMAPSS_DIR": str(cmapss_dir)}, check=False
    )
    assert (1, 1) == (completed.returncode, len(completed.stderr.splitlines())), completed.stderr


def test_artefact_outputs_do_not_depend_on_the_batch(cmapss_dir: Path) -> None:
    """Windows of official engines, short ones included, have the same bits alone and in any batch."""
    model, random = open_model(ARTEFACT, threads=1), np.random.default_rng(0)
    histories = cmapss.read_test(cmapss_dir, "FD004")[:40]
    ends = [int(random.integers(1, len(history.telemetry) + 1)) for history in histories]
    windows = np.stack([pad_left(h.telemetry[:end], 100) for h, end in zip(histories, ends, strict=True)])
    alone = [model.run(window[None]) for window in windows]
    logits = np.concatenate([prediction.logits for prediction in alone])
    rul = np.concatenate([prediction.rul for prediction in alone if prediction.rul is not None])
    for size in (2, 3, 5, 8, 15, 16, 33, 64, 100):
        indices = random.integers(0, len(windows), size)
        batch = model.run(windows[indices])
        assert np.array_equal(logits[indices], batch.logits)
        assert batch.rul is not None
        assert np.array_equal(rul[indices], batch.rul)
