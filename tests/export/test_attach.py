import copy
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.support.attach import Floats, Values, attach, refusal, softmax
from tests.support.bodies import binary, described, outputs
from tests.support.processes import Service, running

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = tuple(f'kind {k}, "so\\called" é' for k in range(1000))  # commas, quotes, backslashes: as labels have them
HELD_OUT = 360


class Trained(NamedTuple):
    """A network, and inputs (N, ...) and labels (N,) that it was not trained on."""

    network: nn.Module
    inputs: Values
    labels: list[int]

    def logits(self) -> Floats:
        """What it says in float64, without ONNX and without this project."""
        with torch.inference_mode():
            found: Floats = copy.deepcopy(self.network).double()(torch.from_numpy(self.inputs).double()).numpy()
        return found

    def instances(self) -> list[dict[str, Any]]:
        """As /v1/predict takes them."""
        return [{"telemetry": x.tolist(), "label": y} for x, y in zip(self.inputs, self.labels, strict=True)]


class Scaled(nn.Module):
    """Pixels of 0..16 to 0..1, inside of the network."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 16


@pytest.fixture(scope="module")
def digits() -> Trained:
    """Two layers, trained on scikit-learn's bundled digits but the last 360 of a shuffle."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.from_numpy(pixels[order].astype(np.float32)), torch.from_numpy(labels[order])
    torch.manual_seed(0)
    network = nn.Sequential(Scaled(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    adam = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(network(x[:-HELD_OUT]), y[:-HELD_OUT]).backward()  # type: ignore[no-untyped-call]  # torch's
        adam.step()
    return Trained(network.eval(), x[-HELD_OUT:].numpy(), y[-HELD_OUT:].tolist())


@pytest.fixture(scope="module")
def kinds() -> Trained:
    """A thousand classes, images of 3 x 16 x 16, random weights."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 1000))
    random = np.random.default_rng(1)
    return Trained(
        nn.Sequential(*layers).eval(),
        random.standard_normal((6, 3, 16, 16), np.float32) * 4,
        random.integers(0, 1000, 6).tolist(),
    )


def exported(network: nn.Module, example: Values, path: Path, free: bool = True, beside: bool = False) -> Path:
    """As torch exports it; `free` is the batch, `beside` leaves the weights in a second file, as torch likes to."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it asks for torchvision, which nothing here needs
    shapes = ({0: torch.export.Dim("rows")},) if free else None
    inputs = (torch.from_numpy(example[: 2 if free else 1]),)
    with warnings.catch_warnings():  # torch warns of its own internals, differently in every release
        warnings.simplefilter("ignore")
        torch.onnx.export(network, inputs, path, dynamic_shapes=shapes, external_data=beside, verbose=False)
    return path


@pytest.fixture(scope="module")
def digits_service(digits: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The digits as a user attaches and serves them: two commands. Weights lie beside the foreign file."""
    folder = tmp_path_factory.mktemp("digits")
    source = exported(digits.network, digits.inputs, folder / "foreign.onnx", beside=True)
    command = [sys.executable, "-m", "export.attach", str(source), str(folder / "digits.onnx")]
    command += ["--logits", "linear_1", "--classes", ",".join(DIGITS), "--version", "3", "--temperature", "1.5"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "digits 3, 10 classes" in said.stdout
    assert "" == said.stderr
    with running(ENGINE_HEALTH_MODEL=str(folder / "digits.onnx")) as found:
        yield found


@pytest.fixture(scope="module")
def kinds_service(kinds: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The thousand classes, their names from a file; two workers, which share their counters."""
    folder = tmp_path_factory.mktemp("kinds")
    source = exported(kinds.network, kinds.inputs, folder / "foreign.onnx")
    (folder / "names.txt").write_text("\n".join(KINDS) + "\n\n", encoding="utf-8")
    attach(source, folder / "kinds.onnx", "linear", f"@{folder / 'names.txt'}", "--name", "imagery")
    with running(ENGINE_HEALTH_MODEL=str(folder / "kinds.onnx"), ENGINE_HEALTH_WORKERS="2") as found:
        yield found


def cross_entropy(logits: Floats, labels: list[int], t: float) -> list[float]:
    """Each row's, in float64, by torch."""
    z, y = torch.from_numpy(logits / t), torch.tensor(labels)
    losses: list[float] = nn.functional.cross_entropy(z, y, reduction="none").tolist()
    return losses


def test_digits_are_recognised_over_the_wire(digits_service: Service, digits: Trained) -> None:
    """Nine of ten held-out digits are called by name, and every number is the network's in float64."""
    found = digits_service.predict(digits.instances())
    rows, evaluation, logits = found["predictions"], found["evaluation"], digits.logits()
    assert (1.5, "artefact") == (found["temperature"], found["temperature_source"])
    assert HELD_OUT == evaluation["count"]
    assert evaluation["accuracy"] > 0.9
    right = sum(row["health"] == DIGITS[y] for row, y in zip(rows, digits.labels, strict=True))
    assert right / HELD_OUT == pytest.approx(evaluation["accuracy"], abs=1e-6)
    np.testing.assert_allclose(logits, [row["logits"] for row in rows], atol=1e-4)
    probabilities = [[row["probabilities"][name] for name in DIGITS] for row in rows]
    np.testing.assert_allclose(softmax(logits, 1.5), probabilities, atol=1e-5)
    losses = cross_entropy(logits, digits.labels, 1.5)
    np.testing.assert_allclose(losses, [row["loss"] for row in rows], atol=1e-4)
    assert np.mean(losses) == pytest.approx(evaluation["cross_entropy"], rel=1e-4)


def test_a_digit_is_labelled_by_name_index_or_distribution(digits_service: Service, digits: Trained) -> None:
    """However the truth is written its loss is the same, a mixture costs a share of each, other labels are refused."""
    x, y = digits.inputs[0].tolist(), digits.labels[0]
    mixed = [0.75 if k == y else 0.25 if k == (y + 1) % 10 else 0.0 for k in range(10)]
    labels = [DIGITS[y], y, [float(k == y) for k in range(10)], mixed]
    rows = digits_service.predict([{"telemetry": x, "label": label} for label in labels])["predictions"]
    expected = cross_entropy(digits.logits()[:1], [y], 1.5)[0]
    other = cross_entropy(digits.logits()[:1], [(y + 1) % 10], 1.5)[0]
    np.testing.assert_allclose([expected] * 3 + [0.75 * expected + 0.25 * other], [r["loss"] for r in rows], atol=1e-4)
    for wrong in ("normal", "3", 10, [0.5, 0.5]):
        answer = digits_service.client.post("/v1/predict", json={"instances": [{"telemetry": x, "label": wrong}]})
        assert (422, ["instances", 0, "label"]) == (answer.status_code, answer.json()["errors"][0]["loc"])


def test_a_requested_temperature_keeps_the_order_of_digits(digits_service: Service, digits: Trained) -> None:
    """Another temperature flattens or sharpens all ten probabilities, and moves no digit past another."""
    asked = [{"telemetry": x.tolist()} for x in digits.inputs[:20]]
    for t in (0.3, 8.0):
        rows = digits_service.predict(asked, temperature=t)["predictions"]
        p = np.array([list(row["probabilities"].values()) for row in rows])
        np.testing.assert_allclose(softmax(digits.logits()[:20], t), p, atol=1e-5)
        assert all((np.diff(row[np.argsort(z)]) >= 0).all() for row, z in zip(p, digits.logits()[:20], strict=True))


def test_what_is_of_engines_only_is_not_there(digits_service: Service, digits: Trained) -> None:
    """No RUL, sets, channels, thresholds or input bins; nothing is held, and an explanation is refused uncounted."""
    row = digits_service.predict(digits.instances()[:1])["predictions"][0]
    assert not {"rul", "prediction_set", "explanation"} & set(row)
    model = digits_service.client.get("/v1/model").json()
    assert ("digits", "3", list(DIGITS), [64]) == tuple(model[k] for k in ("name", "version", "classes", "input_shape"))
    nothing = ("window", "rul_thresholds", "conformal", "reference", "conditions")
    assert ([], *[None] * 5) == (model["channels"], *(model[key] for key in nothing))
    assert "golden" not in model
    before = digits_service.metrics()
    explained = digits_service.client.post("/v1/predict", json={"instances": digits.instances()[:1], "explain": True})
    assert (422, ["explain"]) == (explained.status_code, explained.json()["errors"][0]["loc"])
    holes = {"instances": [{"telemetry": [None, *digits.inputs[0, 1:].tolist()]}], "missing": "hold"}
    held = digits_service.client.post("/v1/predict", json=holes)
    assert (422, ["instances", 0, "telemetry", 0]) == (held.status_code, held.json()["errors"][0]["loc"])
    after = digits_service.metrics()
    for name in ("confidence_count", "labelled_total", "batch_rows_sum"):
        assert before[f"engine_health_{name}"] == after[f"engine_health_{name}"]
    assert not [name for name in after if "input_values_total{" in name or "imputed_values_total{" in name]
    assert 0 == after["engine_health_conformal_covered_total"]


def test_digits_are_counted_as_engines_are(digits_service: Service, digits: Trained) -> None:
    """Predictions by digit and the sums of losses grow by what was answered."""
    before = digits_service.metrics()
    rows = digits_service.predict(digits.instances())["predictions"]
    after = digits_service.metrics()

    def grown(name: str) -> float:
        return after[f"engine_health_{name}"] - before[f"engine_health_{name}"]

    for name in DIGITS:
        count = sum(row["health"] == name for row in rows)
        assert count == grown(f'predictions_total{{health="{name}"}}')
    assert HELD_OUT == grown("labelled_total") == grown("cross_entropy_loss_count") == grown("entropy_nats_count")
    assert sum(cross_entropy(digits.logits(), digits.labels, 1.5)) == pytest.approx(grown("loss_nats_total"), rel=1e-4)
    assert grown("loss_nats_total") == pytest.approx(grown("cross_entropy_loss_sum"), rel=1e-4)
    assert sum(row["expected_loss"] for row in rows) == pytest.approx(grown("expected_loss_nats_total"), rel=1e-4)
    assert 1.5 == after["engine_health_temperature"]


def test_logits_of_digits_are_evaluated_by_their_names(digits_service: Service, digits: Trained) -> None:
    """/v1/evaluate takes ten logits a row and digits by name, and the cross-entropy is torch's."""
    logits, names = digits.logits()[:50], [DIGITS[y] for y in digits.labels[:50]]
    answer = digits_service.client.post("/v1/evaluate", json={"logits": logits.tolist(), "labels": names}).json()
    assert np.mean(cross_entropy(logits, digits.labels[:50], 1.0)) == pytest.approx(answer["cross_entropy"], rel=1e-6)
    assert [] == answer["warnings"]


@pytest.mark.parametrize("kind", ["digits", "kinds"])
def test_attached_classifiers_speak_the_open_inference_protocol(kind: str, request: pytest.FixtureRequest) -> None:
    """Shapes in the metadata; tensors as JSON and as bytes, and labels: logits and losses are the network's."""
    trained: Trained = request.getfixturevalue(kind)
    service: Service = request.getfixturevalue(f"{kind}_service")
    name, version, t, names = ("digits", "3", 1.5, DIGITS) if kind == "digits" else ("imagery", "1", 1.0, KINDS)
    x, y, logits = trained.inputs[:6], trained.labels[:6], trained.logits()[:6]
    metadata = service.client.get(f"/v2/models/{name}").json()
    shapes = {tensor["name"]: tensor["shape"] for tensor in (*metadata["inputs"], *metadata["outputs"])}
    wide = [-1, len(names)]
    expected = {"telemetry": [-1, *x.shape[1:]], "label": [-1], "health": [-1], "loss": [-1]}
    assert expected | {"logits": wide, "probabilities": wide} == shapes
    label = {"name": "label", "shape": [6], "datatype": "INT64", "data": y}
    infer = f"/v2/models/{name}/versions/{version}/infer"
    body, headers = binary(x, parameters={"binary_data_output": True})
    ways = [service.client.post(infer, json={"inputs": [described(x), label]})]
    ways.append(service.client.post(infer, content=body, headers=headers))
    for answer in ways:
        found = outputs(answer)
        np.testing.assert_allclose(logits, found["logits"], atol=1e-4)
        np.testing.assert_allclose(softmax(logits, t), found["probabilities"], atol=1e-5)
        assert [names[k] for k in logits.argmax(1)] == found["health"].tolist()
    np.testing.assert_allclose(cross_entropy(logits, y, t), outputs(ways[0])["loss"], atol=1e-4)
    far = label | {"data": [*y[:5], len(names)]}
    assert 400 == service.client.post(infer, json={"inputs": [described(x), far]}).status_code
    rul = {"inputs": [described(x)], "outputs": [{"name": "rul"}]}
    assert 400 == service.client.post(infer, json=rul).status_code


def test_a_thousand_classes_leave_whole(kinds_service: Service, kinds: Trained) -> None:
    """Every row has all thousand names in order, logits and probabilities of each, and the loss of float64."""
    rows = kinds_service.predict(kinds.instances())["predictions"]
    assert all(list(KINDS) == list(row["probabilities"]) for row in rows)
    np.testing.assert_allclose(kinds.logits(), [row["logits"] for row in rows], atol=1e-4)
    p = np.array([list(row["probabilities"].values()) for row in rows])
    np.testing.assert_allclose(softmax(kinds.logits()), p, atol=1e-5)
    np.testing.assert_allclose(1, p.sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(cross_entropy(kinds.logits(), kinds.labels, 1.0), [r["loss"] for r in rows], atol=1e-4)
    named = [{"telemetry": x.tolist(), "label": KINDS[y]} for x, y in zip(kinds.inputs, kinds.labels, strict=True)]
    again = kinds_service.predict(named, temperature=3.0)["predictions"]
    np.testing.assert_allclose(cross_entropy(kinds.logits(), kinds.labels, 3.0), [r["loss"] for r in again], atol=1e-4)
    assert [row["health"] for row in rows] == [row["health"] for row in again]


def test_a_call_of_many_wide_rows_is_answered_whole(kinds_service: Service, kinds: Trained) -> None:
    """Two hundred rows of a thousand classes, worked on aside, are what each row is alone."""
    many = [kinds.instances()[k % 6] for k in range(200)]
    found, few = kinds_service.predict(many), kinds_service.predict(kinds.instances())
    assert 200 == found["evaluation"]["count"]
    wide, alone = ([row["logits"] for row in answer["predictions"]] for answer in (found, few))
    np.testing.assert_allclose(np.array(alone)[np.arange(200) % 6], wide, atol=1e-4)
    expected = np.array(cross_entropy(kinds.logits(), kinds.labels, 1.0))[np.arange(200) % 6]
    np.testing.assert_allclose(expected, [row["loss"] for row in found["predictions"]], atol=1e-4)
    body, headers = binary(kinds.inputs[np.arange(200) % 6])
    tensor = outputs(kinds_service.client.post("/v2/models/imagery/infer", content=body, headers=headers))["logits"]
    np.testing.assert_allclose(wide, tensor, atol=1e-4)


def test_a_thousand_classes_are_a_closed_set_of_series(kinds_service: Service, kinds: Trained) -> None:
    """The metrics have one series a class from the start, whatever is asked; no label of a client makes another one."""
    sent = kinds_service.client.post("/v1/predict", json={"instances": [kinds.instances()[0] | {"label": "mine"}]})
    assert 422 == sent.status_code
    before = kinds_service.metrics()
    rows = kinds_service.predict(kinds.instances())["predictions"]
    after = kinds_service.metrics()
    series = {name for name in after if name.startswith("engine_health_predictions_total{")}
    escaped = (name.replace("\\", "\\\\").replace('"', '\\"') for name in KINDS)
    assert {f'engine_health_predictions_total{{health="{name}"}}' for name in escaped} == series
    own, were = ({name for name in found if "http_" not in name} for found in (after, before))
    assert own == were
    assert len(rows) == sum(after[name] - before[name] for name in series)
    assert len(rows) == after["engine_health_labelled_total"] - before["engine_health_labelled_total"]


class Mean(nn.Module):
    """Over height and width."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_a_trained_network_with_a_softmax_is_found_out(digits: Trained, tmp_path: Path) -> None:
    """What torch exports with a softmax at its end is refused, and served as the remedy says."""
    source = exported(nn.Sequential(digits.network, nn.Softmax(1)), digits.inputs, tmp_path / "in.onnx")
    names = ",".join(DIGITS)
    said = refusal(source, tmp_path / "m.onnx", "--logits", "softmax", "--classes", names)
    model = attach(source, tmp_path / "m.onnx", said.split("'")[-2], names)
    np.testing.assert_allclose(digits.logits(), model.run(digits.inputs).logits, atol=1e-4)


def test_what_torch_exports_for_one_image_is_freed_or_refused(kinds: Trained, tmp_path: Path) -> None:
    """A mean over the image leaves the batch free; a flattening that torch froze at 1 is refused with the remedy."""
    names = tmp_path / "names"
    names.write_text("\n".join(KINDS))
    torch.manual_seed(2)
    mean = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Mean(), nn.Linear(16, 1000)).eval()
    source = exported(mean, kinds.inputs, tmp_path / "mean.onnx", free=False)
    model = attach(source, tmp_path / "m.onnx", "linear", f"@{names}")
    np.testing.assert_allclose(Trained(mean, kinds.inputs, []).logits(), model.run(kinds.inputs).logits, atol=1e-4)
    frozen = exported(kinds.network, kinds.inputs, tmp_path / "frozen.onnx", free=False)
    said = refusal(frozen, tmp_path / "m.onnx", "--logits", "linear", "--classes", f"@{names}")
    assert "the batch size is fixed at 1" in said


def test_an_input_of_free_size_is_refused_with_the_tool_that_fixes_it(kinds: Trained, tmp_path: Path) -> None:
    """Heights and widths that are free are named with the command that fixes them; then the file is served."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Mean(), nn.Linear(4, 3)).eval()
    source = exported(network, kinds.inputs, tmp_path / "fixed.onnx")
    proto = onnx.load(source)
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side_{axis}"
    onnx.save(proto, tmp_path / "free.onnx")
    flags = ("--logits", "linear", "--classes", "a,b,c")
    said = refusal(tmp_path / "free.onnx", tmp_path / "m.onnx", *flags)
    assert "[rows, 3, side_2, side_3]" in said
    tool = said.split("`")[1].replace("python", sys.executable).split()
    name = proto.graph.input[0].name
    arguments = ["--input_name", name, "--input_shape", "1,3,16,16", str(tmp_path / "free.onnx"), str(source)]
    subprocess.run([*tool, *arguments], check=True, capture_output=True)
    model = attach(source, tmp_path / "m.onnx", "linear", "a,b,c")
    np.testing.assert_allclose(Trained(network, kinds.inputs, []).logits(), model.run(kinds.inputs).logits, atol=1e-4)


def test_weights_beside_a_file_are_taken_in_or_refused(digits: Trained, tmp_path: Path) -> None:
    """Weights in a second file become part of the one file; missing, short, elsewhere or too large they are refused."""
    source = exported(digits.network, digits.inputs, tmp_path / "in.onnx", beside=True)
    data, flags = tmp_path / "in.onnx.data", ("--logits", "linear_1", "--classes", ",".join(DIGITS))
    model = attach(source, tmp_path / "one" / "m.onnx", "linear_1", ",".join(DIGITS))
    np.testing.assert_allclose(digits.logits(), model.run(digits.inputs).logits, atol=1e-4)
    kept = data.read_bytes()
    with data.open("r+b") as file:
        file.truncate(2**31)  # no byte of it is on the disk
    assert "the maximum is" in refusal(source, tmp_path / "m.onnx", *flags)
    data.write_bytes(kept[:100])
    assert "weights" in refusal(source, tmp_path / "m.onnx", *flags)
    data.unlink()
    assert "in.onnx.data: No such file" in refusal(source, tmp_path / "m.onnx", *flags)
    (tmp_path / "inner").mkdir()
    data.write_bytes(kept)
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../in.onnx.data"
    (tmp_path / "inner" / "in.onnx").write_bytes(proto.SerializeToString())
    assert "external weights" in refusal(tmp_path / "inner" / "in.onnx", tmp_path / "m.onnx", *flags)
    assert not (tmp_path / "m.onnx").exists()
