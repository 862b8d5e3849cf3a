import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from model import contract
from model.evaluation.evaluate import ARTEFACT
from service.inference.model_loader import open_model
from tests.support.attach import Values, attach, refusal, softmax


def write_graph(
    nodes: list[onnx.NodeProto], path: Path, batch: str | int = "n", outputs: str = "out", **options: Any
) -> Path:
    """Write a foreign file: `x` [batch, 4] float32, weights `w` (4, 3), outputs without a declared shape."""
    weights = {"w": np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)} | options.pop("weights", {})
    inputs = [helper.make_tensor_value_info("x", options.pop("kind", TensorProto.FLOAT), [batch, 4])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in options.pop("inputs", ())]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs.split()],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(proto, path)
    return path


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def rows(n: int = 5) -> Values:
    return np.random.default_rng(3).standard_normal((n, 4), np.float32)


def weights(path: Path) -> Values:
    matrix: Values = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    return matrix


LINEAR = [node("MatMul", "x w", "out")]
SOFTMAX = [node("MatMul", "x w", "logits"), node("Softmax", "logits", "p", axis=1), node("Identity", "p", "out")]


def test_softmax_is_rejected_and_its_input_served(tmp_path: Path) -> None:
    """Rows that sum to 1 are rejected with the name of the softmax input, which is served as logits."""
    path = write_graph(SOFTMAX, tmp_path / "in.onnx")
    message = refusal(path, tmp_path / "m.onnx", "--logits", "out", "--classes", "a,b,c")
    assert "softmax" in message
    assert message.endswith("--logits 'logits'")
    assert not (tmp_path / "m.onnx").exists()
    model = attach(path, tmp_path / "m.onnx", "logits", "a,b,c")
    np.testing.assert_allclose(rows() @ weights(path), model.run(rows()).logits, atol=1e-5)
    assert ["MatMul"] == [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]


def test_softmax_without_a_softmax_node_is_rejected(tmp_path: Path) -> None:
    """A softmax written as exponentials over their sum is rejected by its values; no tensor is suggested."""
    steps = [*LINEAR, node("Exp", "out", "e"), node("ReduceSum", "e one", "s"), node("Div", "e s", "p")]
    path = write_graph(steps, tmp_path / "in.onnx", outputs="p", weights={"one": np.array([1])})
    message = refusal(path, tmp_path / "m.onnx", "--logits", "p", "--classes", "a,b,c")
    assert "softmax" in message
    assert "--logits" not in message
    assert "append a logarithm" in message


def test_log_softmax_is_served_as_logits(tmp_path: Path) -> None:
    """A log-softmax is served unchanged, because its softmax gives the same probabilities."""
    path = write_graph([node("MatMul", "x w", "z"), node("LogSoftmax", "z", "out", axis=1)], tmp_path / "in.onnx")
    logits = attach(path, tmp_path / "m.onnx", "out", "a,b,c").run(rows()).logits
    np.testing.assert_allclose(softmax((rows() @ weights(path)).astype(np.float64)), np.exp(logits), atol=1e-5)


def test_artefact_contains_only_what_the_contract_needs(tmp_path: Path) -> None:
    """Other outputs, their inputs and weights are removed; golden windows, tolerance and source are present."""
    steps = [*LINEAR, node("Add", "x mask", "masked"), node("MatMul", "masked v", "rul")]
    other = {"v": np.ones((4, 1), np.float32)}
    path = write_graph(steps, tmp_path / "in.onnx", outputs="out rul masked", weights=other, inputs=["mask"])
    model = attach(path, tmp_path / "some.onnx", "out", " a , b,c", "--version", "2.0", "--temperature", "0.5")
    proto, manifest = onnx.load(tmp_path / "some.onnx"), model.manifest
    onnx.checker.check_model(proto, full_check=True)
    assert (["telemetry"], ["logits"], ["w"]) == tuple(
        [x.name for x in part] for part in (proto.graph.input, proto.graph.output, proto.graph.initializer)
    )
    assert ("some", "2.0", 0.5, ("a", "b", "c")) == (
        manifest.name,
        manifest.version,
        manifest.temperature,
        manifest.classes,
    )
    assert manifest.sealed
    assert len(manifest.golden) > 1
    for golden in manifest.golden:
        expected = np.array([golden.telemetry]) @ weights(path).astype(np.float64)
        np.testing.assert_allclose(expected[0], golden.logits, atol=manifest.tolerance)
    assert 1e-5 <= manifest.tolerance < 1e-3
    assert ("in.onnx", contract.digest(path.read_bytes()), "x", "out") == tuple(manifest.training.values())


def test_inner_tensors_with_contract_names_are_renamed(tmp_path: Path) -> None:
    """Inner tensors named `telemetry` and `logits` are not confused with the input and the output."""
    steps = [node("Relu", "x", "logits"), node("Neg", "logits", "telemetry"), node("MatMul", "telemetry w", "out")]
    path = write_graph(steps, tmp_path / "in.onnx")
    model = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    np.testing.assert_allclose(-np.maximum(rows(), 0) @ weights(path), model.run(rows()).logits, atol=1e-5)


def test_branches_of_a_graph_are_preserved(tmp_path: Path) -> None:
    """A branch that reads outer tensors reads them by their new names."""
    sides = [
        helper.make_graph([node(op, "x", f"{op}_out")], op, [], [onnx.ValueInfoProto(name=f"{op}_out")])
        for op in ("Relu", "Neg")
    ]
    steps = [
        node("ReduceSum", "w", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node("If", "positive", "side", then_branch=sides[0], else_branch=sides[1]),
        node("MatMul", "side w", "out"),
    ]
    path = write_graph(steps, tmp_path / "in.onnx", weights={"zero": np.array(0, np.float32)})
    model = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    side = np.maximum(rows(), 0) if weights(path).sum() > 0 else -rows()
    np.testing.assert_allclose(side @ weights(path), model.run(rows()).logits, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_declared_batch_becomes_dynamic(tmp_path: Path, batch: int) -> None:
    """A file for batches of 1 or 3 accepts every batch size, with unchanged rows."""
    path = write_graph([*LINEAR, node("Add", "out out", "twice")], tmp_path / "in.onnx", batch=batch, outputs="twice")
    model = attach(path, tmp_path / "m.onnx", "twice", "a,b,c")
    np.testing.assert_allclose(2 * rows(11) @ weights(path), model.run(rows(11)).logits, atol=1e-5)


def test_artefact_is_attached_again_with_other_names(tmp_path: Path) -> None:
    """An attached file is attached again in place: another manifest for the same network."""
    path = write_graph(LINEAR, tmp_path / "in.onnx")
    first = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    again = attach(tmp_path / "m.onnx", tmp_path / "m.onnx", "logits", "d,e,f")
    assert ("d", "e", "f") == again.manifest.classes
    np.testing.assert_array_equal(first.run(rows()).logits, again.run(rows()).logits)


def test_bundled_network_is_attached_as_a_classifier(tmp_path: Path) -> None:
    """The attached artefact of this project has no RUL and the same logits to the bit."""
    model, own = attach(ARTEFACT, tmp_path / "m.onnx", "logits", "a,b,c"), open_model(ARTEFACT)
    windows = np.array([golden.telemetry for golden in own.manifest.golden], np.float32)
    assert model.run(windows).rul is None
    np.testing.assert_array_equal(own.run(windows).logits, model.run(windows).logits)


ABC = ("--classes", "a,b,c")
OUT = ("--logits", "out")
FLAGS: list[tuple[tuple[str, ...], str]] = [
    (("--logits", "nope", *ABC), "no tensor 'nope'; outputs are 'out'"),
    (("--logits", "x", *ABC), "no tensor 'x'"),
    ((*OUT, "--classes", "a,b"), "3 values per instance, --classes has 2 names"),
    ((*OUT, "--classes", "a,b,a"), "duplicate class 'a', at 0 and 2"),
    ((*OUT, "--classes", "a,b,"), "class 2 '' is empty"),
    ((*OUT, "--classes", "a,b,c\td"), "not printable"),
    ((*OUT, "--classes", "a,b,\udcff"), "not printable"),
    ((*OUT, "--classes", "@nowhere.txt"), "nowhere.txt: No such file"),
    ((*OUT, "--classes", f"@{ARTEFACT}"), "not UTF-8"),
    ((*OUT, *ABC, "--temperature", "0"), "temperature"),
    ((*OUT, *ABC, "--temperature", "nan"), "temperature"),
    ((*OUT, *ABC, "--name", "../x"), "name"),
    ((*OUT, *ABC, "--version", ""), "version"),
]


@pytest.mark.parametrize(("flags", "message"), FLAGS)
def test_invalid_flag_is_rejected_in_one_line(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    """Wrong tensors, names, counts and numbers are named in one line, and nothing is written."""
    assert message in refusal(write_graph(LINEAR, tmp_path / "in.onnx"), tmp_path / "m.onnx", *flags)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "has no nodes"),
        (b"hello, I am no model\n", "not an ONNX file"),
        (ARTEFACT.read_bytes()[:9999], "not an ONNX file"),
    ],
)
def test_invalid_file_is_rejected_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A missing, empty, text or truncated file is an error of one line that names the file."""
    path = tmp_path / "in.onnx"
    if content is not None:
        path.write_bytes(content)
    error = refusal(path, tmp_path / "m.onnx", *OUT, *ABC)
    assert message in error
    assert str(path) in error


def write_batch_mean(path: Path) -> Path:
    """Subtract the mean over the batch."""
    steps = [node("MatMul", "x w", "z"), node("ReduceMean", "z zero", "mean", keepdims=1), node("Sub", "z mean", "out")]
    return write_graph(steps, path, weights={"zero": np.array([0])})


def write_fixed_batch(path: Path) -> Path:
    """Declare a dynamic batch, but reshape to a batch of 1."""
    steps = [node("MatMul", "x w", "z"), node("Reshape", "z shape", "out")]
    return write_graph(steps, path, weights={"shape": np.array([1, 3])})


def write_merged_batch(path: Path) -> Path:
    """Merge a larger batch into one wide row, without an error."""
    steps = [node("MatMul", "x w", "z"), node("Reshape", "z shape", "out")]
    return write_graph(steps, path, weights={"shape": np.array([1, -1])})


def write_extra_axis(path: Path) -> Path:
    """Return one axis too many."""
    return write_graph(
        [node("MatMul", "x w", "z"), node("Unsqueeze", "z w1", "out")], path, weights={"w1": np.array([1])}
    )


def write_reduced_batch(path: Path) -> Path:
    """Reduce four instances to one output row."""
    return write_graph([node("MatMul", "x w", "z"), node("ReduceMax", "z", "out", keepdims=1)], path, batch=4)


def write_uint8_input(path: Path) -> Path:
    return write_graph([node("Cast", "x", "y", to=1), node("MatMul", "y w", "out")], path, kind=TensorProto.UINT8)


def write_two_inputs(path: Path) -> Path:
    return write_graph([node("Add", "x y", "z"), node("MatMul", "z w", "out")], path, inputs=["y"])


def write_no_input(path: Path) -> Path:
    return write_graph([node("Identity", "w", "out")], path)


def write_double_output(path: Path) -> Path:
    return write_graph([node("MatMul", "x w", "z"), node("Cast", "z", "out", to=TensorProto.DOUBLE)], path)


def write_unknown_operator(path: Path) -> Path:
    return write_graph([node("MatMul", "x w", "z"), node("Nothing", "z", "out")], path)


def write_logarithm(path: Path) -> Path:
    """Return values that are not finite for inputs of 0."""
    return write_graph([node("Log", "x", "z"), node("MatMul", "z w", "out")], path)


GRAPHS: list[tuple[Callable[[Path], Path], str]] = [
    (write_batch_mean, "the other rows of the batch"),
    (write_fixed_batch, "the batch size is fixed inside"),
    (write_merged_batch, "the batch size is fixed inside"),
    (write_extra_axis, "has shape [1, 1, 3]"),
    (write_reduced_batch, "for a batch of 4"),
    (write_uint8_input, "'x' is uint8"),
    (write_two_inputs, "computed from 'x', 'y'"),
    (write_no_input, "computed from no input"),
    (write_double_output, "tensor(double)"),
    (write_unknown_operator, "ONNX Runtime cannot use it"),
    (write_logarithm, "not finite"),
]


@pytest.mark.parametrize(("make", "message"), GRAPHS)
def test_unsupported_network_is_rejected_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    """Dependent rows, fixed batches, other types, axes and inputs are named in one line."""
    assert message in refusal(make(tmp_path / "in.onnx"), tmp_path / "m.onnx", *OUT, *ABC)
    assert not (tmp_path / "m.onnx").exists()


def test_command_exit_codes(tmp_path: Path) -> None:
    """Rejection or an unwritable target: exit code 1 and one line on stderr. Wrong usage: 2. No torch."""
    source = write_graph(LINEAR, tmp_path / "in.onnx")
    (tmp_path / "file").write_text("")
    for arguments, code in (
        ([str(tmp_path / "nothing"), str(tmp_path / "m.onnx"), *OUT, *ABC], 1),
        ([str(source), str(tmp_path / "file" / "m.onnx"), *OUT, *ABC], 1),
        ([str(source), str(tmp_path / "m.onnx")], 2),
    ):
        command = [sys.executable, "-m", "export.attach", *arguments]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (code, "") == (completed.returncode, completed.stdout)
        assert "Traceback" not in completed.stderr
        if code == 1:
            assert 1 == len(completed.stderr.splitlines())
    script = "import sys, export.attach; print('torch' in sys.modules)"
    assert "False" == subprocess.check_output([sys.executable, "-c", script], text=True).strip()
