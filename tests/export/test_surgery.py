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


def graph(nodes: list[onnx.NodeProto], path: Path, batch: str | int = "n", outputs: str = "out", **more: Any) -> Path:
    """A foreign file: `x` [batch, 4] float32, weights `w` (4, 3), outputs that say nothing of their shape."""
    weights = {"w": np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32)} | more.pop("weights", {})
    inputs = [helper.make_tensor_value_info("x", more.pop("kind", TensorProto.FLOAT), [batch, 4])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in more.pop("inputs", ())]
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
    found: Values = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    return found


LINEAR = [node("MatMul", "x w", "out")]
SOFTMAX = [node("MatMul", "x w", "logits"), node("Softmax", "logits", "p", axis=1), node("Identity", "p", "out")]


def test_a_softmax_is_found_out_and_its_logits_are_served(tmp_path: Path) -> None:
    """Rows that sum to 1 are refused with the tensor before the softmax, and that one is served as logits."""
    path = graph(SOFTMAX, tmp_path / "in.onnx")
    said = refusal(path, tmp_path / "m.onnx", "--logits", "out", "--classes", "a,b,c")
    assert "softmax" in said
    assert said.endswith("--logits 'logits'")
    assert not (tmp_path / "m.onnx").exists()
    model = attach(path, tmp_path / "m.onnx", "logits", "a,b,c")
    np.testing.assert_allclose(rows() @ weights(path), model.run(rows()).logits, atol=1e-5)
    assert ["MatMul"] == [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node]


def test_probabilities_that_no_softmax_node_made_are_found_out_too(tmp_path: Path) -> None:
    """A softmax written as exponentials over their sum is refused by its values; no tensor is guessed."""
    steps = [*LINEAR, node("Exp", "out", "e"), node("ReduceSum", "e one", "s"), node("Div", "e s", "p")]
    path = graph(steps, tmp_path / "in.onnx", outputs="p", weights={"one": np.array([1])})
    said = refusal(path, tmp_path / "m.onnx", "--logits", "p", "--classes", "a,b,c")
    assert "softmax" in said
    assert "--logits" not in said
    assert "append a logarithm" in said


def test_log_probabilities_are_logits(tmp_path: Path) -> None:
    """A log-softmax is served as it is: softmax of it gives the probabilities that it is the logarithm of."""
    path = graph([node("MatMul", "x w", "z"), node("LogSoftmax", "z", "out", axis=1)], tmp_path / "in.onnx")
    logits = attach(path, tmp_path / "m.onnx", "out", "a,b,c").run(rows()).logits
    np.testing.assert_allclose(softmax((rows() @ weights(path)).astype(np.float64)), np.exp(logits), atol=1e-5)


def test_the_artefact_holds_what_the_contract_needs_and_no_more(tmp_path: Path) -> None:
    """Other outputs, their inputs and weights are gone; golden windows, tolerance and the source's name are there."""
    steps = [*LINEAR, node("Add", "x mask", "masked"), node("MatMul", "masked v", "rul")]
    other = {"v": np.ones((4, 1), np.float32)}
    path = graph(steps, tmp_path / "in.onnx", outputs="out rul masked", weights=other, inputs=["mask"])
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


def test_names_of_the_contract_inside_of_the_graph_make_way(tmp_path: Path) -> None:
    """Inner tensors that are called `telemetry` and `logits` already are not taken for the input and the output."""
    steps = [node("Relu", "x", "logits"), node("Neg", "logits", "telemetry"), node("MatMul", "telemetry w", "out")]
    path = graph(steps, tmp_path / "in.onnx")
    model = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    np.testing.assert_allclose(-np.maximum(rows(), 0) @ weights(path), model.run(rows()).logits, atol=1e-5)


def test_branches_of_a_graph_are_renamed_and_kept_too(tmp_path: Path) -> None:
    """A branch that reads tensors from outside finds them under their new names, though no node names them before."""
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
    path = graph(steps, tmp_path / "in.onnx", weights={"zero": np.array(0, np.float32)})
    model = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    side = np.maximum(rows(), 0) if weights(path).sum() > 0 else -rows()
    np.testing.assert_allclose(side @ weights(path), model.run(rows()).logits, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_declared_batch_is_freed_where_the_graph_allows(tmp_path: Path, batch: int) -> None:
    """A file for batches of 1 or 3 answers every batch afterwards, each row as it was before."""
    path = graph([*LINEAR, node("Add", "out out", "twice")], tmp_path / "in.onnx", batch=batch, outputs="twice")
    model = attach(path, tmp_path / "m.onnx", "twice", "a,b,c")
    np.testing.assert_allclose(2 * rows(11) @ weights(path), model.run(rows(11)).logits, atol=1e-5)


def test_an_artefact_may_be_given_other_names(tmp_path: Path) -> None:
    """An attached file is attached again, in place: another manifest over the same network."""
    path = graph(LINEAR, tmp_path / "in.onnx")
    first = attach(path, tmp_path / "m.onnx", "out", "a,b,c")
    again = attach(tmp_path / "m.onnx", tmp_path / "m.onnx", "logits", "d,e,f")
    assert ("d", "e", "f") == again.manifest.classes
    np.testing.assert_array_equal(first.run(rows()).logits, again.run(rows()).logits)


def test_the_bundled_network_is_a_classifier_like_any_other(tmp_path: Path) -> None:
    """Attached anew, the artefact of this project loses its RUL and keeps its logits to the bit."""
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


@pytest.mark.parametrize(("flags", "said"), FLAGS)
def test_a_flag_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    """Wrong tensors, names, counts and numbers are named in one line, and nothing is written."""
    assert said in refusal(graph(LINEAR, tmp_path / "in.onnx"), tmp_path / "m.onnx", *flags)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "has no nodes"),
        (b"hello, I am no model\n", "not an ONNX file"),
        (ARTEFACT.read_bytes()[:9999], "not an ONNX file"),
    ],
)
def test_a_file_that_is_no_network_is_refused_in_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    """Missing, empty, text or cut off: one line that names the file."""
    path = tmp_path / "in.onnx"
    if content is not None:
        path.write_bytes(content)
    told = refusal(path, tmp_path / "m.onnx", *OUT, *ABC)
    assert said in told
    assert str(path) in told


def mixing(path: Path) -> Path:
    """Rows lose what they have in common."""
    steps = [node("MatMul", "x w", "z"), node("ReduceMean", "z zero", "mean", keepdims=1), node("Sub", "z mean", "out")]
    return graph(steps, path, weights={"zero": np.array([0])})


def frozen(path: Path) -> Path:
    """Says that its batch is free, and is made for 1."""
    steps = [node("MatMul", "x w", "z"), node("Reshape", "z shape", "out")]
    return graph(steps, path, weights={"shape": np.array([1, 3])})


def folded(path: Path) -> Path:
    """As before, but a larger batch fails nowhere: it makes one wide row."""
    steps = [node("MatMul", "x w", "z"), node("Reshape", "z shape", "out")]
    return graph(steps, path, weights={"shape": np.array([1, -1])})


def deep(path: Path) -> Path:
    """An axis too many."""
    return graph([node("MatMul", "x w", "z"), node("Unsqueeze", "z w1", "out")], path, weights={"w1": np.array([1])})


def of_time(path: Path) -> Path:
    """Four steps in, one answer out."""
    return graph([node("MatMul", "x w", "z"), node("ReduceMax", "z", "out", keepdims=1)], path, batch=4)


def of_bytes(path: Path) -> Path:
    return graph([node("Cast", "x", "y", to=1), node("MatMul", "y w", "out")], path, kind=TensorProto.UINT8)


def of_two_inputs(path: Path) -> Path:
    return graph([node("Add", "x y", "z"), node("MatMul", "z w", "out")], path, inputs=["y"])


def of_nothing(path: Path) -> Path:
    return graph([node("Identity", "w", "out")], path)


def in_double(path: Path) -> Path:
    return graph([node("MatMul", "x w", "z"), node("Cast", "z", "out", to=TensorProto.DOUBLE)], path)


def unknown_step(path: Path) -> Path:
    return graph([node("MatMul", "x w", "z"), node("Nothing", "z", "out")], path)


def of_logarithms(path: Path) -> Path:
    """Not finite where an input is 0."""
    return graph([node("Log", "x", "z"), node("MatMul", "z w", "out")], path)


GRAPHS: list[tuple[Callable[[Path], Path], str]] = [
    (mixing, "the other rows of the batch"),
    (frozen, "the batch size is fixed inside"),
    (folded, "the batch size is fixed inside"),
    (deep, "has shape [1, 1, 3]"),
    (of_time, "for a batch of 4"),
    (of_bytes, "'x' is uint8"),
    (of_two_inputs, "computed from 'x', 'y'"),
    (of_nothing, "computed from no input"),
    (in_double, "tensor(double)"),
    (unknown_step, "ONNX Runtime cannot use it"),
    (of_logarithms, "not finite"),
]


@pytest.mark.parametrize(("make", "said"), GRAPHS)
def test_a_network_that_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    """Rows that are mixed, batches that are frozen, other types, axes and inputs: one line says which."""
    assert said in refusal(make(tmp_path / "in.onnx"), tmp_path / "m.onnx", *OUT, *ABC)
    assert not (tmp_path / "m.onnx").exists()


def test_the_command_ends_as_commands_do(tmp_path: Path) -> None:
    """Refused: exit code 1 and one line on stderr, also if the target cannot be written; wrong usage: 2. No torch."""
    source = graph(LINEAR, tmp_path / "in.onnx")
    (tmp_path / "file").write_text("")
    for arguments, code in (
        ([str(tmp_path / "nothing"), str(tmp_path / "m.onnx"), *OUT, *ABC], 1),
        ([str(source), str(tmp_path / "file" / "m.onnx"), *OUT, *ABC], 1),
        ([str(source), str(tmp_path / "m.onnx")], 2),
    ):
        command = [sys.executable, "-m", "export.attach", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (code, "") == (found.returncode, found.stdout)
        assert "Traceback" not in found.stderr
        if code == 1:
            assert 1 == len(found.stderr.splitlines())
    script = "import sys, export.attach; print('torch' in sys.modules)"
    assert "False" == subprocess.check_output([sys.executable, "-c", script], text=True).strip()
