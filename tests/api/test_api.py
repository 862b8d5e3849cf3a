import asyncio
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from export.verify import run_torch
from model import contract, numerics
from model.contract import Manifest
from model.data import cmapss
from model.evaluation.evaluate import ARTEFACT, open_artefact
from model.evaluation.occlusion import ConditionBaselines
from model.training.cross_fit import load_checkpoint
from model.windows import Readings, every_window
from service.app import create_app
from service.settings import read_settings
from tests.support.models import edited, identity_classifier
from tests.support.processes import Service, running

WINDOW = open_artefact(ARTEFACT)[1].window or 0
FOUR_ENGINES = [[2, 0.5, -1], [0, 2, 0.3], [-1, 0.4, 3.8], [0.2, 0.5, 0.2]]


def instance(window: Readings, **rest: Any) -> dict[str, Any]:
    return {"telemetry": window.tolist(), **rest}


def test_predict_matches_the_golden_windows(service: Service, manifest: Manifest, windows: Readings) -> None:
    """Logits and RUL over the wire are those of the network; health, set and losses follow from them."""
    found = service.predict([instance(window) for window in windows])
    assert {"name", "version", "digest"} == set(found["model"])
    assert contract.digest(ARTEFACT.read_bytes()) == found["model"]["digest"]
    assert manifest.temperature == found["temperature"]
    assert "artefact" == found["temperature_source"]
    assert found["evaluation"] is None
    for golden, row in zip(manifest.golden, found["predictions"], strict=True):
        np.testing.assert_allclose(golden.logits, row["logits"], atol=1e-5)
        assert golden.rul == pytest.approx(row["rul"], abs=1e-3)
        p = numerics.softmax(golden.logits, manifest.temperature)
        np.testing.assert_allclose(p, [row["probabilities"][name] for name in manifest.classes], atol=1e-6)
        assert manifest.classes[int(p.argmax())] == row["health"]
        assert row["expected_loss"] == pytest.approx(
            float(numerics.entropy(golden.logits, manifest.temperature)), abs=1e-5
        )
        assert row["loss"] is None
        assert manifest.conformal is not None
        expected = [
            name
            for name, q in zip(manifest.classes, p, strict=True)
            if 1 - q <= manifest.conformal.threshold or q == p.max()
        ]
        assert expected == row["prediction_set"]


def test_predictions_of_real_windows_equal_torch(service: Service, cmapss_dir: Path) -> None:
    """1,000 windows of real test engines: logits and probabilities are torch's to 1e-5, RUL to 1e-5 of its size."""
    network, _ = load_checkpoint(ARTEFACT.with_suffix(".pt"))
    engines = [history for subset in cmapss.SUBSETS for history in cmapss.read_test(cmapss_dir, subset)[:2]]
    real = np.concatenate([every_window(history.telemetry, WINDOW) for history in engines])[:1000]
    assert 1000 == len(real)
    rows = [
        row
        for part in np.split(real, 4)
        for row in service.predict([instance(window) for window in part])["predictions"]
    ]
    logits, rul = run_torch(network, np.ascontiguousarray(real))
    np.testing.assert_allclose(logits, [row["logits"] for row in rows], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rul, [row["rul"] for row in rows], rtol=1e-5, atol=1e-5)
    p = numerics.softmax(logits, service.client.get("/v1/model").json()["temperature"])
    np.testing.assert_allclose(
        p, [[row["probabilities"][name] for name in contract.CLASSES] for row in rows], atol=1e-5
    )


def test_short_history_is_padded_and_long_history_is_cut(service: Service, windows: Readings) -> None:
    """Three rows answer as the window that begins with copies of the first; ten rows too many as their newest."""
    window = windows[0]
    padded = np.concatenate([np.repeat(window[:1], WINDOW - 3, axis=0), window[:3]])
    longer = np.concatenate([window[10:20], window])
    found = service.predict([instance(x) for x in (window[:3], padded, window, longer)])["predictions"]
    assert found[0]["logits"] == found[1]["logits"]
    assert found[2]["logits"] == found[3]["logits"]


def test_channels_by_name_equal_rows(service: Service, windows: Readings) -> None:
    """Columns by channel name, in any order, are the same window."""
    by_name = {name: windows[0][:, k].tolist() for k, name in enumerate(contract.CHANNELS)}
    shuffled = dict(sorted(by_name.items(), reverse=True))
    found = service.predict([instance(windows[0]), {"telemetry": shuffled}])["predictions"]
    assert found[0]["logits"] == found[1]["logits"]


def test_missing_value_with_hold_takes_the_last_value(service: Service, windows: Readings) -> None:
    """A missing value counts as the last seen of its channel, and the metrics say how many of the window were held."""
    holed, filled = windows[0].tolist(), windows[0].copy()
    holed[-1][5] = holed[-2][5] = None
    filled[-2:, 5] = filled[-3, 5]
    name = 'engine_health_imputed_values_total{channel="sensor_4"}'
    before = service.metrics().get(name, 0)
    held = service.predict([{"telemetry": holed}], missing="hold")["predictions"][0]
    assert service.predict([instance(filled)])["predictions"][0]["logits"] == held["logits"]
    assert before + 2 == service.metrics()[name]


def test_missing_values_before_the_window_are_ignored(service: Service, windows: Readings) -> None:
    """A missing value before the window is neither rejected nor counted, and may be held into the window."""
    name = 'engine_health_imputed_values_total{channel="sensor_4"}'
    before = service.metrics()[name]
    older = windows[0][:2].tolist()
    older[0][5] = None
    held = service.predict([{"telemetry": older + windows[0].tolist()}], missing="hold")["predictions"][0]
    assert service.predict([instance(windows[0])])["predictions"][0]["logits"] == held["logits"]
    assert before == service.metrics()[name]


def test_explanation_is_the_effect_of_each_channel(service: Service, manifest: Manifest, windows: Readings) -> None:
    """The shift of a channel is the distance from the prediction with the channel at its baseline."""
    assert manifest.conditions is not None
    usual = ConditionBaselines.from_lists(manifest.conditions.setting_scales, manifest.conditions.usual)
    asked = [instance(window) for window in windows]
    plain, told = (service.predict(asked, explain=flag)["predictions"] for flag in (False, True))
    for window, before, row in zip(windows, plain, told, strict=True):
        assert before["logits"] == row["logits"]
        assert "explanation" not in before
        moved = row["explanation"]
        assert set(contract.CHANNELS) == {part["channel"] for part in moved}
        assert sorted((part["shift"] for part in moved), reverse=True) == [part["shift"] for part in moved]
        strongest = moved[0]
        without = window.copy()
        k = contract.CHANNELS.index(strongest["channel"])
        without[:, k] = usual.matching_rows(window)[:, k]
        other = service.predict([instance(without)])["predictions"][0]
        change = {name: p - other["probabilities"][name] for name, p in row["probabilities"].items()}
        assert sum(abs(c) for c in change.values()) / 2 == pytest.approx(strongest["shift"], abs=1e-5)
        assert max(change, key=change.__getitem__) == strongest["toward"]
        assert row["rul"] - other["rul"] == pytest.approx(strongest["rul"], abs=1e-3)


def test_explanation_without_baselines_is_rejected(service: Service, windows: Readings, tmp_path: Path) -> None:
    """An explanation without baselines, or of too many instances, is rejected with its location."""
    described: dict[str, object] = {"name": "t", "version": "1", "classes": ["n", "e", "s", "w"]}
    with running(ENGINE_HEALTH_MODEL=str(identity_classifier(tmp_path / "t.onnx", described))) as other:
        answer = other.client.post("/v1/predict", json={"instances": [{"telemetry": [1, 2, 3, 4]}], "explain": True})
        assert (422, ["explain"]) == (answer.status_code, answer.json()["errors"][0]["loc"])
    many = {"instances": [instance(windows[0][:1])] * 241, "explain": True}
    answer = service.client.post("/v1/predict", json=many)
    assert (422, ["instances"]) == (answer.status_code, answer.json()["errors"][0]["loc"])


@pytest.mark.parametrize("label", ["degrading", 1, [0, 1, 0]])
def test_label_by_name_index_or_distribution_costs_the_same(service: Service, windows: Readings, label: object) -> None:
    """For every form of the label, the loss is -ln of its probability, and the evaluation is the mean."""
    found = service.predict([instance(windows[0], label=label), instance(windows[1])])
    row, unlabelled = found["predictions"]
    p = numerics.softmax(row["logits"], found["temperature"])[1]
    assert -np.log(p) == pytest.approx(row["loss"], rel=1e-5)
    assert unlabelled["loss"] is None
    assert 1 == found["evaluation"]["count"]
    assert row["loss"] == found["evaluation"]["cross_entropy"]
    assert row["expected_loss"] == found["evaluation"]["expected_cross_entropy"]
    assert float(row["health"] == "degrading") == found["evaluation"]["accuracy"]


def test_ids_are_echoed_and_prediction_ids_are_unique(service: Service, windows: Readings) -> None:
    """engine_id and cycle are echoed; prediction ids are strings that never repeat."""
    asked = [instance(windows[0], engine_id="FD001-24", cycle=143), instance(windows[0])]
    rows = [row for _ in range(5) for row in service.predict(asked)["predictions"]]
    assert [("FD001-24", 143), (None, None)] == [(row["engine_id"], row["cycle"]) for row in rows[:2]]
    assert 10 == len({row["prediction_id"] for row in rows})


def test_requested_temperature_changes_probabilities_and_nothing_else(service: Service, windows: Readings) -> None:
    """A temperature of this call flattens or sharpens; order, logits, set and the next call stay as they were."""
    plain = service.predict([instance(windows[0])])
    for t in (0.01, 0.5, 5.0, 100.0):
        found = service.predict([instance(windows[0])], temperature=t)
        row, before = found["predictions"][0], plain["predictions"][0]
        assert (t, "request") == (found["temperature"], found["temperature_source"])
        assert [before[k] for k in ("logits", "health", "rul", "prediction_set")] == [
            row[k] for k in ("logits", "health", "rul", "prediction_set")
        ]
        np.testing.assert_allclose(numerics.softmax(row["logits"], t), list(row["probabilities"].values()), atol=1e-6)
    assert (
        plain["predictions"][0]["probabilities"]
        == service.predict([instance(windows[0])])["predictions"][0]["probabilities"]
    )


def test_batch_equals_its_instances_alone(service: Service, windows: Readings) -> None:
    """The other instances of a request change nothing that a user could see."""
    together = service.predict([instance(window) for window in windows])["predictions"]
    for window, row in zip(windows, together, strict=True):
        alone = service.predict([instance(window)])["predictions"][0]
        np.testing.assert_allclose(alone["logits"], row["logits"], atol=1e-5)


def test_evaluate_works_the_textbook_batch(service: Service) -> None:
    """Four engines and three classes give the textbook's losses, by index or by name."""
    for labels in ([0, 1, 2, 1], ["normal", "degrading", "critical", "degrading"]):
        found = service.client.post("/v1/evaluate", json={"logits": FOUR_ENGINES, "labels": labels}).json()
        assert 0.3668 == round(found["cross_entropy"], 4)
        assert [0.041, 0.909] == [round(loss, 3) for loss in found["losses"][2:]]
        assert [0.960, 0.403] == [round(found["probabilities"][2][2], 3), round(found["probabilities"][3][1], 3)]
        assert 1.0 == found["accuracy"]
        assert 1.0 == found["temperature"]
        assert [] == found["warnings"]
        assert numerics.ece(FOUR_ENGINES, [0, 1, 2, 1]) == pytest.approx(found["ece"])
        assert numerics.brier(FOUR_ENGINES, [0, 1, 2, 1]).mean() == pytest.approx(found["brier"])


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [[1, 0, 0], [0, 0.5, 0.5], [0, 0, 1], [0.2, 0.3, 0.5]]])
def test_evaluate_weighs_classes_as_torch(service: Service, labels: list[Any]) -> None:
    """Class weights are normalised as torch's cross_entropy normalises them, for indices and distributions."""
    import torch

    body = {"logits": FOUR_ENGINES, "labels": labels, "class_weights": [1, 2, 0.5], "temperature": 2.0}
    found = service.client.post("/v1/evaluate", json=body).json()
    truth = torch.tensor(labels, dtype=torch.float64 if isinstance(labels[0], list) else torch.int64)
    weights = torch.tensor([1, 2, 0.5], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(torch.tensor(FOUR_ENGINES, dtype=torch.float64) / 2, truth, weights)
    assert float(expected) == pytest.approx(found["cross_entropy"])


def test_evaluate_warns_of_probabilities_and_keeps_them(service: Service) -> None:
    """Rows that look like probabilities are named and not changed; the answer shows how far off it is."""
    body = {"logits": [[1.0, 0.0, 0.0], [4.0, 1.0, 0.0], [0.7, 0.2, 0.1]], "labels": [0, 0, 0]}
    found = service.client.post("/v1/evaluate", json=body).json()
    assert [0, 2] == found["warnings"][0]["rows"]
    assert 0.5514 == round(found["losses"][0], 4)


def test_evaluate_takes_any_number_of_classes(service: Service) -> None:
    """One class costs nothing; five classes take indices."""
    one = service.client.post("/v1/evaluate", json={"logits": [[3.0]], "labels": [0]}).json()
    assert (0.0, [[1.0]], []) == (one["cross_entropy"], one["probabilities"], one["warnings"])
    five = service.client.post("/v1/evaluate", json={"logits": [[1e4, 0, 0, 0, -1e4]], "labels": [4]}).json()
    assert 2e4 == pytest.approx(five["cross_entropy"])


def test_model_tells_the_manifest_without_golden_windows(service: Service, manifest: Manifest) -> None:
    """The manifest is flat and without golden windows; digest, active temperature and limits are added."""
    found = service.client.get("/v1/model").json()
    expected = manifest.model_dump(mode="json", exclude={"golden"})
    assert "golden" not in found
    assert {key: found[key] for key in expected} == expected
    assert contract.digest(ARTEFACT.read_bytes()) == found["digest"]
    assert "artefact" == found["temperature_source"]
    assert {"max_body_bytes": 32 * 2**20, "max_instances": 4096} == {
        k: found["limits"][k] for k in ("max_body_bytes", "max_instances")
    }


def test_live_ready_docs_and_front_door(service: Service) -> None:
    """The operations answer, and the documentation loads nothing from another host."""
    assert 200 == service.client.get("/livez").status_code
    assert 200 == service.client.get("/readyz").status_code
    assert "<title>engine-health</title>" in service.client.get("/").text
    docs = service.client.get("/docs")
    assert 200 == docs.status_code
    assert "swagger" in docs.text
    assert "http://" not in docs.text.replace(str(service.client.base_url), "")
    assert "https://" not in docs.text


def test_responses_match_the_openapi_document(service: Service, windows: Readings) -> None:
    """Real responses and a real problem match the published schemas, with no field missing and none added."""
    document = service.client.get("/openapi.json").json()
    evaluated = {"logits": [[1, 0, 0]], "labels": [0]}
    answers = {
        "PredictResponse": service.predict([instance(windows[0], label=0), instance(windows[1])]),
        "EvaluateResponse": service.client.post("/v1/evaluate", json=evaluated).json(),
        "Problem": service.client.post("/v1/predict", json={"instances": []}).json(),
    }
    for name, answer in answers.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(answer, schema)
        rare = {"results"}  # there only where a label was not applied, and tested where that is
        assert set(answer) == set(document["components"]["schemas"][name]["properties"]) - rare
    jsonschema.validate(
        {"instances": [instance(windows[0])]},
        {"$ref": "#/components/schemas/PredictRequest", "components": document["components"]},
    )


def test_another_classifier_is_served_without_its_rul(tmp_path: Path) -> None:
    """A network of four classes and no RUL answers with its own class names; what it lacks is absent."""
    path = identity_classifier(
        tmp_path / "four.onnx", {"name": "four", "version": "1", "classes": ["n", "e", "s", "w"]}
    )
    with running(ENGINE_HEALTH_MODEL=str(path)) as other:
        row = other.predict([{"telemetry": [0, 3, 0, 0], "label": "e"}])["predictions"][0]
        assert "e" == row["health"]
        assert {"n", "e", "s", "w"} == set(row["probabilities"])
        assert not {"rul", "prediction_set"} & set(row)
        wrong = other.client.post("/v1/predict", json={"instances": [{"telemetry": [[0, 3, 0, 0]]}]})
        assert (422, [["instances", 0, "telemetry"]]) == (wrong.status_code, [x["loc"] for x in wrong.json()["errors"]])


def test_artefact_temperature_calibrates_predictions(tmp_path: Path, windows: Readings) -> None:
    """The same network with another temperature in its manifest answers with that one."""
    with running(ENGINE_HEALTH_MODEL=str(edited(tmp_path / "hot.onnx", {"temperature": 2.5}))) as other:
        found = other.predict([instance(windows[0])])
        assert 2.5 == found["temperature"] == other.metrics()["engine_health_temperature"]
        row = found["predictions"][0]
        np.testing.assert_allclose(numerics.softmax(row["logits"], 2.5), list(row["probabilities"].values()), atol=1e-6)


def test_internal_error_is_a_problem_document() -> None:
    """An unexpected error returns a 500 in the usual format, below /v1 and below /v2."""
    application = create_app(read_settings(), print)

    def fail() -> None:
        raise ZeroDivisionError

    for path in ("/v1/fails", "/v2/fails"):
        application.api.add_api_route(path, fail)

    async def ask(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(application.served)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    own, protocol = asyncio.run(ask("/v1/fails")), asyncio.run(ask("/v2/fails"))
    assert (500, "application/problem+json") == (own.status_code, own.headers["content-type"])
    assert (500, ["error"]) == (protocol.status_code, list(protocol.json()))
