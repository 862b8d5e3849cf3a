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
from tests.support.bodies import binary, outputs, tensor_of
from tests.support.processes import Service, running

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = tuple(f'kind {k}, "so\\called" é' for k in range(1000))  # labels may have commas, quotes and backslashes
HELD_OUT = 360


class Trained(NamedTuple):
    """A network, and inputs (N, ...) and labels (N,) that it was not trained on."""

    network: nn.Module
    inputs: Values
    labels: list[int]

    def logits(self) -> Floats:
        """Return the logits (N, C) in float64, without ONNX and without this project."""
        with torch.inference_mode():
            result: Floats = copy.deepcopy(self.network).double()(torch.from_numpy(self.inputs).double()).numpy()
        return result

    def instances(self) -> list[dict[str, Any]]:
        """Return the instances of a request to /v1/predict."""
        return [{"telemetry": x.tolist(), "label": y} for x, y in zip(self.inputs, self.labels, strict=True)]


class Scaled(nn.Module):
    """Scale pixels of 0..16 to 0..1 inside the network."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 16


@pytest.fixture(scope="module")
def digits() -> Trained:
    """Train two layers on scikit-learn's bundled digits, except the last 360 of a shuffle."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.from_numpy(pixels[order].astype(np.float32)), torch.from_numpy(labels[order])
    torch.manual_seed(0)
    network = nn.Sequential(Scaled(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    adam = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(network(x[:-HELD_OUT]), y[:-HELD_OUT]).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        adam.step()
    return Trained(network.eval(), x[-HELD_OUT:].numpy(), y[-HELD_OUT:].tolist())


@pytest.fixture(scope="module")
def kinds() -> Trained:
    """Return a network of 1,000 classes and images of 3 x 16 x 16 with random weights."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 49, 1000))
    random = np.random.default_rng(1)
    return Trained(
        nn.Sequential(*layers).eval(),
        random.standard_normal((6, 3, 16, 16), np.float32) * 4,
        random.integers(0, 1000, 6).tolist(),
    )


def export_with_torch(
    network: nn.Module, example: Values, path: Path, free: bool = True, external_data: bool = False
) -> Path:
    """Export with torch. `free`: dynamic batch. `external_data`: weights in a second file, as torch does by default."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision, which is not needed
    shapes = ({0: torch.export.Dim("rows")},) if free else None
    inputs = (torch.from_numpy(example[: 2 if free else 1]),)
    with warnings.catch_warnings():  # torch warns about its internals, differently in every release
        warnings.simplefilter("ignore")
        torch.onnx.export(network, inputs, path, dynamic_shapes=shapes, external_data=external_data, verbose=False)
    return path


@pytest.fixture(scope="module")
def digits_service(digits: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Attach and serve the digits with two commands, as a user does. The weights are in a second file."""
    folder = tmp_path_factory.mktemp("digits")
    source = export_with_torch(digits.network, digits.inputs, folder / "foreign.onnx", external_data=True)
    command = [sys.executable, "-m", "export.attach", str(source), str(folder / "digits.onnx")]
    command += ["--logits", "linear_1", "--classes", ",".join(DIGITS), "--version", "3", "--temperature", "1.5"]
    message = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "digits 3, 10 classes" in message.stdout
    assert "" == message.stderr
    with running(ENGINE_HEALTH_MODEL=str(folder / "digits.onnx")) as service:
        yield service


@pytest.fixture(scope="module")
def kinds_service(kinds: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serve the 1,000 classes, with names from a file and two workers that share their counters."""
    folder = tmp_path_factory.mktemp("kinds")
    source = export_with_torch(kinds.network, kinds.inputs, folder / "foreign.onnx")
    (folder / "names.txt").write_text("\n".join(KINDS) + "\n\n", encoding="utf-8")
    attach(source, folder / "kinds.onnx", "linear", f"@{folder / 'names.txt'}", "--name", "imagery")
    with running(ENGINE_HEALTH_MODEL=str(folder / "kinds.onnx"), ENGINE_HEALTH_WORKERS="2") as service:
        yield service


def cross_entropy(logits: Floats, labels: list[int], t: float) -> list[float]:
    """Return the loss of each row in float64, computed by torch."""
    z, y = torch.from_numpy(logits / t), torch.tensor(labels)
    losses: list[float] = nn.functional.cross_entropy(z, y, reduction="none").tolist()
    return losses


def test_digits_are_predicted_over_http(digits_service: Service, digits: Trained) -> None:
    """90 % of the held-out digits are correct, and every number equals that of the network in float64."""
    response = digits_service.predict(digits.instances())
    rows, evaluation, logits = response["predictions"], response["evaluation"], digits.logits()
    assert (1.5, "artefact") == (response["temperature"], response["temperature_source"])
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


def test_digit_labels_may_be_name_index_or_distribution(digits_service: Service, digits: Trained) -> None:
    """All forms of a label have the same loss, a mixture has a share of each, and other labels get 422."""
    x, y = digits.inputs[0].tolist(), digits.labels[0]
    mixed = [0.75 if k == y else 0.25 if k == (y + 1) % 10 else 0.0 for k in range(10)]
    labels = [DIGITS[y], y, [float(k == y) for k in range(10)], mixed]
    rows = digits_service.predict([{"telemetry": x, "label": label} for label in labels])["predictions"]
    expected = cross_entropy(digits.logits()[:1], [y], 1.5)[0]
    other = cross_entropy(digits.logits()[:1], [(y + 1) % 10], 1.5)[0]
    np.testing.assert_allclose([expected] * 3 + [0.75 * expected + 0.25 * other], [r["loss"] for r in rows], atol=1e-4)
    for invalid in ("normal", "3", 10, [0.5, 0.5]):
        response = digits_service.client.post("/v1/predict", json={"instances": [{"telemetry": x, "label": invalid}]})
        assert (422, ["instances", 0, "label"]) == (response.status_code, response.json()["errors"][0]["loc"])


def test_requested_temperature_keeps_class_order(digits_service: Service, digits: Trained) -> None:
    """Another temperature changes all ten probabilities but not their order."""
    instances = [{"telemetry": x.tolist()} for x in digits.inputs[:20]]
    for t in (0.3, 8.0):
        rows = digits_service.predict(instances, temperature=t)["predictions"]
        p = np.array([list(row["probabilities"].values()) for row in rows])
        np.testing.assert_allclose(softmax(digits.logits()[:20], t), p, atol=1e-5)
        assert all((np.diff(row[np.argsort(z)]) >= 0).all() for row, z in zip(p, digits.logits()[:20], strict=True))


def test_classifier_has_no_engine_fields(digits_service: Service, digits: Trained) -> None:
    """RUL, sets, channels and thresholds are absent; missing values and explanations get 422 without counts."""
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


def test_metrics_count_digits(digits_service: Service, digits: Trained) -> None:
    """Predictions per digit and the sums of losses increase by those of the response."""
    before = digits_service.metrics()
    rows = digits_service.predict(digits.instances())["predictions"]
    after = digits_service.metrics()

    def increase(name: str) -> float:
        return after[f"engine_health_{name}"] - before[f"engine_health_{name}"]

    for name in DIGITS:
        count = sum(row["health"] == name for row in rows)
        assert count == increase(f'predictions_total{{health="{name}"}}')
    assert (
        HELD_OUT == increase("labelled_total") == increase("cross_entropy_loss_count") == increase("entropy_nats_count")
    )
    assert sum(cross_entropy(digits.logits(), digits.labels, 1.5)) == pytest.approx(
        increase("loss_nats_total"), rel=1e-4
    )
    assert increase("loss_nats_total") == pytest.approx(increase("cross_entropy_loss_sum"), rel=1e-4)
    assert sum(row["expected_loss"] for row in rows) == pytest.approx(increase("expected_loss_nats_total"), rel=1e-4)
    assert 1.5 == after["engine_health_temperature"]


def test_evaluate_accepts_digit_names(digits_service: Service, digits: Trained) -> None:
    """/v1/evaluate accepts ten logits per row and names of digits, and its cross-entropy equals torch's."""
    logits, names = digits.logits()[:50], [DIGITS[y] for y in digits.labels[:50]]
    response = digits_service.client.post("/v1/evaluate", json={"logits": logits.tolist(), "labels": names}).json()
    assert np.mean(cross_entropy(logits, digits.labels[:50], 1.0)) == pytest.approx(response["cross_entropy"], rel=1e-6)
    assert [] == response["warnings"]


@pytest.mark.parametrize("kind", ["digits", "kinds"])
def test_attached_classifiers_support_oip(kind: str, request: pytest.FixtureRequest) -> None:
    """Metadata has the shapes; tensors as JSON and binary, with labels, give the network's logits and losses."""
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
    responses = [service.client.post(infer, json={"inputs": [tensor_of(x), label]})]
    responses.append(service.client.post(infer, content=body, headers=headers))
    for response in responses:
        tensors = outputs(response)
        np.testing.assert_allclose(logits, tensors["logits"], atol=1e-4)
        np.testing.assert_allclose(softmax(logits, t), tensors["probabilities"], atol=1e-5)
        assert [names[k] for k in logits.argmax(1)] == tensors["health"].tolist()
    np.testing.assert_allclose(cross_entropy(logits, y, t), outputs(responses[0])["loss"], atol=1e-4)
    far = label | {"data": [*y[:5], len(names)]}
    assert 400 == service.client.post(infer, json={"inputs": [tensor_of(x), far]}).status_code
    rul = {"inputs": [tensor_of(x)], "outputs": [{"name": "rul"}]}
    assert 400 == service.client.post(infer, json=rul).status_code


def test_thousand_classes_are_returned_completely(kinds_service: Service, kinds: Trained) -> None:
    """Every row has all 1,000 names in order, their logits and probabilities, and the loss of float64."""
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


def test_request_of_200_wide_rows_equals_single_rows(kinds_service: Service, kinds: Trained) -> None:
    """200 rows of 1,000 classes, processed in another thread, equal the same rows in a small request."""
    many = [kinds.instances()[k % 6] for k in range(200)]
    large, small = kinds_service.predict(many), kinds_service.predict(kinds.instances())
    assert 200 == large["evaluation"]["count"]
    wide, alone = ([row["logits"] for row in response["predictions"]] for response in (large, small))
    np.testing.assert_allclose(np.array(alone)[np.arange(200) % 6], wide, atol=1e-4)
    expected = np.array(cross_entropy(kinds.logits(), kinds.labels, 1.0))[np.arange(200) % 6]
    np.testing.assert_allclose(expected, [row["loss"] for row in large["predictions"]], atol=1e-4)
    body, headers = binary(kinds.inputs[np.arange(200) % 6])
    tensor = outputs(kinds_service.client.post("/v2/models/imagery/infer", content=body, headers=headers))["logits"]
    np.testing.assert_allclose(wide, tensor, atol=1e-4)


def test_metric_series_are_limited_to_known_classes(kinds_service: Service, kinds: Trained) -> None:
    """The metrics have one series per class from the start, and a client's label adds none."""
    sent = kinds_service.client.post("/v1/predict", json={"instances": [kinds.instances()[0] | {"label": "mine"}]})
    assert 422 == sent.status_code
    before = kinds_service.metrics()
    rows = kinds_service.predict(kinds.instances())["predictions"]
    after = kinds_service.metrics()
    series = {name for name in after if name.startswith("engine_health_predictions_total{")}
    escaped = (name.replace("\\", "\\\\").replace('"', '\\"') for name in KINDS)
    assert {f'engine_health_predictions_total{{health="{name}"}}' for name in escaped} == series
    names_after, names_before = ({name for name in metrics if "http_" not in name} for metrics in (after, before))
    assert names_after == names_before
    assert len(rows) == sum(after[name] - before[name] for name in series)
    assert len(rows) == after["engine_health_labelled_total"] - before["engine_health_labelled_total"]


class Mean(nn.Module):
    """Average over height and width."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def test_exported_softmax_is_rejected_with_remedy(digits: Trained, tmp_path: Path) -> None:
    """A torch export that ends with a softmax is rejected, and is served with the suggested tensor."""
    source = export_with_torch(nn.Sequential(digits.network, nn.Softmax(1)), digits.inputs, tmp_path / "in.onnx")
    names = ",".join(DIGITS)
    message = refusal(source, tmp_path / "m.onnx", "--logits", "softmax", "--classes", names)
    model = attach(source, tmp_path / "m.onnx", message.split("'")[-2], names)
    np.testing.assert_allclose(digits.logits(), model.run(digits.inputs).logits, atol=1e-4)


def test_batch_of_one_is_made_dynamic_or_rejected(kinds: Trained, tmp_path: Path) -> None:
    """A mean over the image supports any batch; a flattening fixed at 1 is rejected with a remedy."""
    names = tmp_path / "names"
    names.write_text("\n".join(KINDS))
    torch.manual_seed(2)
    mean = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Mean(), nn.Linear(16, 1000)).eval()
    source = export_with_torch(mean, kinds.inputs, tmp_path / "mean.onnx", free=False)
    model = attach(source, tmp_path / "m.onnx", "linear", f"@{names}")
    np.testing.assert_allclose(Trained(mean, kinds.inputs, []).logits(), model.run(kinds.inputs).logits, atol=1e-4)
    frozen = export_with_torch(kinds.network, kinds.inputs, tmp_path / "frozen.onnx", free=False)
    message = refusal(frozen, tmp_path / "m.onnx", "--logits", "linear", "--classes", f"@{names}")
    assert "the batch size is fixed at 1" in message


def test_dynamic_image_size_is_rejected_with_command(kinds: Trained, tmp_path: Path) -> None:
    """Dynamic height and width are rejected with the command that fixes them; then the file is served."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Mean(), nn.Linear(4, 3)).eval()
    source = export_with_torch(network, kinds.inputs, tmp_path / "fixed.onnx")
    proto = onnx.load(source)
    for axis in (2, 3):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"side_{axis}"
    onnx.save(proto, tmp_path / "free.onnx")
    flags = ("--logits", "linear", "--classes", "a,b,c")
    message = refusal(tmp_path / "free.onnx", tmp_path / "m.onnx", *flags)
    assert "[rows, 3, side_2, side_3]" in message
    tool = message.split("`")[1].replace("python", sys.executable).split()
    name = proto.graph.input[0].name
    arguments = ["--input_name", name, "--input_shape", "1,3,16,16", str(tmp_path / "free.onnx"), str(source)]
    subprocess.run([*tool, *arguments], check=True, capture_output=True)
    model = attach(source, tmp_path / "m.onnx", "linear", "a,b,c")
    np.testing.assert_allclose(Trained(network, kinds.inputs, []).logits(), model.run(kinds.inputs).logits, atol=1e-4)


def test_external_weights_are_included_or_rejected(digits: Trained, tmp_path: Path) -> None:
    """Weights in a second file are included; missing, short, too large or outside files are rejected."""
    source = export_with_torch(digits.network, digits.inputs, tmp_path / "in.onnx", external_data=True)
    data, flags = tmp_path / "in.onnx.data", ("--logits", "linear_1", "--classes", ",".join(DIGITS))
    model = attach(source, tmp_path / "one" / "m.onnx", "linear_1", ",".join(DIGITS))
    np.testing.assert_allclose(digits.logits(), model.run(digits.inputs).logits, atol=1e-4)
    content = data.read_bytes()
    with data.open("r+b") as file:
        file.truncate(2**31)  # a sparse file
    assert "the maximum is" in refusal(source, tmp_path / "m.onnx", *flags)
    data.write_bytes(content[:100])
    assert "weights" in refusal(source, tmp_path / "m.onnx", *flags)
    data.unlink()
    assert "in.onnx.data: No such file" in refusal(source, tmp_path / "m.onnx", *flags)
    (tmp_path / "inner").mkdir()
    data.write_bytes(content)
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../in.onnx.data"
    (tmp_path / "inner" / "in.onnx").write_bytes(proto.SerializeToString())
    assert "external weights" in refusal(tmp_path / "inner" / "in.onnx", tmp_path / "m.onnx", *flags)
    assert not (tmp_path / "m.onnx").exists()
