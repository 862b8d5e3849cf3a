import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model import contract
from model.evaluation.evaluate import ARTEFACT
from service.errors import ArtefactRejected
from service.inference.model_loader import open_model
from tests.support.models import Change, classifier, edited, identity_classifier
from tests.support.processes import start


def shift_one_weight(proto: onnx.ModelProto) -> None:
    bias = next(weight for weight in proto.graph.initializer if weight.name == "head.bins.bias")
    moved = numpy_helper.to_array(bias) + np.linspace(0, 1e-2, 26, dtype=np.float32)
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))


def freeze_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def add_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"]))


def test_bundled_artefact_is_verified() -> None:
    """The committed file opens, and its golden windows have equal results alone and together."""
    model = open_model(ARTEFACT)
    assert (model.manifest.window, 17) == model.input_shape
    assert contract.digest(ARTEFACT.read_bytes()) == model.digest
    outputs = model.run(np.zeros((3, *model.input_shape), np.float32))
    assert (3, 3) == outputs.logits.shape
    assert outputs.rul is not None
    assert (3,) == outputs.rul.shape


@pytest.mark.parametrize(
    ("manifest", "change", "message"),
    [
        ({"classes": ["a", "b"]}, None, "2 classes, logits have 3"),
        ({"window": 30}, None, "30 x 17"),
        ({"rul_thresholds": None}, None, "rul_thresholds"),
        ({"golden": [{"telemetry": [[1.0]], "logits": [0, 0, 0]}]}, None, "golden"),
        (None, shift_one_weight, "golden window"),
        (None, freeze_batch, "dynamic batch"),
        (None, add_input, "one float32 input"),
    ],
)
def test_contradictory_artefact_is_rejected(
    tmp_path: Path, manifest: dict[str, object] | None, change: Change | None, message: str
) -> None:
    """A manifest that contradicts its graph is rejected with the reason."""
    with pytest.raises(ArtefactRejected, match=message):
        open_model(edited(tmp_path / "m.onnx", manifest, change))


def test_other_digest_than_required_is_rejected() -> None:
    """A file with another digest than required is rejected, and one with that digest is accepted."""
    assert open_model(ARTEFACT, contract.digest(ARTEFACT.read_bytes()))
    with pytest.raises(ArtefactRejected, match="requires 0000"):
        open_model(ARTEFACT, "0" * 64)


def test_any_classifier_with_a_manifest_opens(tmp_path: Path) -> None:
    """A model of four classes with another input shape and without RUL is accepted."""
    manifest: dict[str, object] = {"name": "four", "version": "1", "classes": ["n", "e", "s", "w"]}
    model = open_model(identity_classifier(tmp_path / "four.onnx", manifest))
    assert (4,) == model.input_shape
    assert model.run(np.eye(4, dtype=np.float32)).rul is None


def test_batch_dependent_network_is_rejected(tmp_path: Path) -> None:
    """A network whose output depends on the other rows of the batch is rejected at start."""
    nodes = [
        helper.make_node("ReduceMean", ["telemetry", "rows"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["telemetry", "mean"], ["logits"]),
    ]
    manifest: dict[str, object] = {"name": "mix", "version": "1", "classes": ["n", "e", "s", "w"]}
    path = classifier(tmp_path / "mix.onnx", nodes, (4,), manifest)
    with pytest.raises(ArtefactRejected, match="batches of 1"):
        open_model(path)


def broken_files(folder: Path) -> dict[str, Path]:
    """Return files that are invalid artefacts, by kind."""
    content = ARTEFACT.read_bytes()
    foreign = onnx.load(ARTEFACT)
    del foreign.metadata_props[:]
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    files = {
        "truncated": content[: len(content) // 2],
        "tampered": bytes(changed),
        "empty": b"",
        "text": b"hello, I am no model\n",
        "foreign": foreign.SerializeToString(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files} | {"missing": folder / "missing", "folder": folder}


@pytest.mark.parametrize("kind", ["truncated", "tampered", "empty", "text", "foreign", "missing", "folder"])
def test_serve_with_a_broken_file_exits_with_1(tmp_path: Path, kind: str) -> None:
    """An invalid artefact ends the start with exit code 1 and one line that names the file, without traceback."""
    path = broken_files(tmp_path)[kind]
    process = start("serve", "--port", "0", "--log-level", "warning", ENGINE_HEALTH_MODEL=str(path))
    _, message = process.communicate(timeout=60)
    assert 1 == process.returncode
    assert 1 == len(message.splitlines()), message
    assert str(path) in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "tcp://1.2.3.4:80"),
        ("PORT", "70000"),
        ("MAX_INSTANCES", "0"),
        ("MODEL_DIGEST", "abc"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_invalid_setting_is_named(variable: str, value: str) -> None:
    """An invalid setting ends the start with exit code 1 and one line with its name and value."""
    process = start("serve", **{f"ENGINE_HEALTH_{variable}": value})
    _, message = process.communicate(timeout=60)
    assert 1 == process.returncode
    assert 1 == len(message.splitlines()), message
    assert f"ENGINE_HEALTH_{variable}={value}" in message


def test_flag_overrides_the_environment() -> None:
    """An invalid `--max-instances 0` is rejected although the environment has a valid value."""
    process = start("serve", "--max-instances", "0", ENGINE_HEALTH_MAX_INSTANCES="5")
    assert "argument --max-instances" in process.communicate(timeout=60)[1]


def test_address_in_use_exits_with_1() -> None:
    """A port in use ends the start with exit code 1 and one line with the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start("serve", "--port", str(taken.getsockname()[1]), "--log-level", "error")
        _, message = process.communicate(timeout=60)
    assert 1 == process.returncode
    assert "address already in use" in message
    assert "Traceback" not in message


def test_supervisor_enables_garbage_collection() -> None:
    """Garbage collection is disabled during imports, and enabled before the supervisor starts."""
    code = """
import gc, sys
from service.settings import read_settings
from service.serve import serve_many
gc.disable()
try:
    serve_many(read_settings(workers=2, port=int(sys.argv[1])))
finally:
    print(gc.isenabled())
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-c", code, str(taken.getsockname()[1])]
        assert "True" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_serving_never_loads_torch() -> None:
    """A serving process has not imported torch, pandas or the training modules."""
    import subprocess
    import sys

    code = (
        "import sys; from service.app import create_app; from service.inference.model_loader import open_model; "
        "from service.settings import read_settings; s = read_settings(); create_app(s, print); open_model(s.model); "
        "print(*[m for m in sys.modules if m in ('torch', 'pandas', 'onnx', 'export', 'model.training')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "" == printed.stdout.strip()
