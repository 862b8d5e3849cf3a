import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.contract import Manifest
from model.data import cmapss
from model.data.cmapss import History
from model.evaluation.evaluate import ARTEFACT, onnx_runner, open_artefact, predict_test_engines
from model.evaluation.evaluation_metrics import class_metrics, concatenate_rows
from model.windows import Readings
from service.calibration.use_cases import seconds_of
from service.errors import InvalidInput
from tests.support.processes import Service, running, until, until_all_are_ready

ADMIN = {"X-API-Key": "wheel"}
FITS, TEMPERATURE = "/v1/calibration/fits", "/v1/calibration/temperature"
SHIFTED = ("sensor_20", "sensor_21")


def fleet(folder: Path, *subsets: str) -> list[History]:
    """Return the official test engines of some subsets."""
    return [history for subset in subsets for history in cmapss.read_test(folder, subset)]


def replay(service: Service, engines: list[History], prefix: str = "", shift: Readings | None = None) -> None:
    """Send every flight of some engines as a collector does, one engine per request."""
    for engine in engines:
        values = engine.telemetry if shift is None else engine.telemetry + shift
        cycles = [
            {"engine_id": prefix + engine.engine_id, "cycle": int(c), "telemetry": row}
            for c, row in zip(engine.cycle, values.tolist(), strict=True)
        ]
        answer = service.client.post("/v1/cycles", json={"cycles": cycles})
        assert 200 == answer.status_code, answer.text


def ends(service: Service, engines: list[History], prefix: str = "") -> None:
    """When each engine failed."""
    for engine in engines:
        failed = int(engine.cycle[-1] + engine.require_rul()[-1])
        body = {"engine_id": prefix + engine.engine_id, "failed_at_cycle": failed}
        assert 200 == service.client.post("/v1/outcomes", json=body).status_code


def calibration(service: Service, query: str = "") -> dict[str, Any]:
    """Return the response of /v1/calibration."""
    answer = service.client.get(f"/v1/calibration{query}")
    assert 200 == answer.status_code, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def replayed(cmapss_dir: Path) -> Iterator[Service]:
    """A service that has seen the test engines of FD001 and FD003, and their ends."""
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        engines = fleet(cmapss_dir, "FD001", "FD003")
        replay(service, engines)
        ends(service, engines)
        yield service


def test_live_figures_are_those_of_the_evaluation(replayed: Service, cmapss_dir: Path, manifest: Manifest) -> None:
    """FD001 and FD003 replayed as traffic, then their ends: cross-entropy, Brier, accuracy and ECE as evaluated."""
    session, _ = open_artefact(ARTEFACT)
    parts = predict_test_engines(onnx_runner(session), manifest.window or 1, cmapss_dir, manifest.rul_thresholds or ())
    expected = class_metrics(concatenate_rows([*parts["FD001"], *parts["FD003"]], False), manifest.temperature)
    found = calibration(replayed)
    assert (29692, 200) == (found["n"], found["engines"])
    assert expected["cross-entropy"] == pytest.approx(found["cross_entropy"]["realised"], abs=1e-6)
    assert expected["Brier"] == pytest.approx(found["brier"], abs=1e-6)
    assert expected["accuracy"] == pytest.approx(found["accuracy"], abs=1e-6)
    assert expected["ECE"] == pytest.approx(found["ece"]["value"], abs=1e-6)
    assert "calibrated" == found["state"]
    assert 1.0 == found["labels"]["share"]
    assert 29692 == found["labels"]["sources"]["outcome"]


def test_counters_equal_the_calibration_report(replayed: Service) -> None:
    """The additive counters, divided, are the figures of the calibration: every truth that joined was counted once."""
    found, counted = calibration(replayed), replayed.metrics()
    n = counted["engine_health_labelled_total"]
    assert found["n"] == n
    assert found["accuracy"] == pytest.approx(counted["engine_health_correct_total"] / n)
    assert found["cross_entropy"]["realised"] == pytest.approx(counted["engine_health_loss_nats_total"] / n)
    assert found["brier"] == pytest.approx(counted["engine_health_brier_total"] / n)
    bins = [
        abs(
            counted[f'engine_health_reliability_confidence_total{{bin="{k}"}}']
            - counted[f'engine_health_reliability_correct_total{{bin="{k}"}}']
        )
        for k in range(15)
    ]
    assert found["ece"]["value"] == pytest.approx(sum(bins) / n, abs=1e-9)


def test_drift_is_shown_before_labels_and_fit_reduces_loss(
    replayed: Service, cmapss_dir: Path, windows: Readings
) -> None:
    """Two sensors off by two deviations: inputs drift with no label, labels alarm, a refit helps, rollback restores."""
    engines = fleet(cmapss_dir, "FD001", "FD003")
    usual = calibration(replayed)["drift"]["channels"]
    names = [channel.name for channel in open_artefact(ARTEFACT)[1].channels]
    every = np.concatenate([engine.telemetry for engine in engines])
    shift = np.array([2 * every[:, k].std() * (name in SHIFTED) for k, name in enumerate(names)], dtype=np.float32)
    asked = [{"telemetry": window.tolist()} for window in windows]
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel") as service:
        replay(service, engines, shift=shift)
        unlabelled = calibration(service)
        assert "insufficient_data" == unlabelled["state"]  # survivors alone tell of one class
        assert unlabelled["n"] == unlabelled["labels"]["sources"]["survival"]
        risen = {name: found["psi"] - usual[name]["psi"] for name, found in unlabelled["drift"]["channels"].items()}
        assert set(SHIFTED) == set(sorted(risen, key=lambda name: risen[name])[-2:])
        ends(service, engines)
        found = calibration(service)
        assert "overconfident" == found["state"], found["evidence"]
        before = service.predict(asked)
        fit = service.client.post(FITS, json={}).json()
        assert fit["held_out"]["cross_entropy"]["after"] < fit["held_out"]["cross_entropy"]["before"]
        assert fit["temperature"] > before["temperature"]
        assert service.predict(asked)["temperature"] == before["temperature"]  # a fit is not applied by itself
        applied = service.client.put(TEMPERATURE, json={"fit_id": fit["fit_id"]}, headers=ADMIN)
        assert (200, fit["temperature"]) == (applied.status_code, applied.json()["temperature"])
        after = service.predict(asked)
        assert ("fit", fit["temperature"]) == (after["temperature_source"], after["temperature"])
        assert fit["temperature"] == service.metrics()["engine_health_temperature"]
        back = service.client.put(TEMPERATURE, json={"rollback": True}, headers=ADMIN)
        assert "artefact" == back.json()["temperature_source"]
        again = service.predict(asked)
        assert without_ids(before) == without_ids(again)
        changes = service.client.get(TEMPERATURE).json()["changes"]
        assert [("fit", False), ("artefact", True)] == [(c["temperature_source"], c["rollback"]) for c in changes]
        assert all(change["who"].startswith("key ") and "wheel" not in change["who"] for change in changes)


def without_ids(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return predictions without the fields that differ for each one."""
    return [{key: value for key, value in row.items() if key != "prediction_id"} for row in answer["predictions"]]


def test_every_worker_follows_a_new_temperature(windows: Readings, tmp_path: Path) -> None:
    """A temperature that one worker activates applies in all workers and after a restart; so does its rollback."""
    kept = {"ENGINE_HEALTH_ADMIN_KEYS": "wheel", "ENGINE_HEALTH_DATABASE_URL": f"sqlite:///{tmp_path}/memory.db"}
    with running(ENGINE_HEALTH_WORKERS="2", **kept) as service:
        until_all_are_ready(service, 2)
        for change, expected in (
            ({"temperature": 2.5}, {2.5}),
            ({"temperature": 3.5}, {3.5}),
            ({"rollback": True}, {2.5}),
        ):
            assert 200 == service.client.put(TEMPERATURE, json=change, headers=ADMIN).status_code
            until(lambda wanted=expected: temperatures(service, windows) == wanted)
    with running(**kept) as service:
        found = service.predict([{"telemetry": windows[0].tolist()}])
        assert (2.5, "fit") == (found["temperature"], found["temperature_source"])
        assert 2.5 == service.client.get("/v1/model").json()["temperature"]


def temperatures(service: Service, windows: Readings) -> set[float]:
    """Return the responses to several new connections."""
    body = {"instances": [{"telemetry": windows[0].tolist()}]}
    return {
        httpx.post(f"{service.client.base_url}/v1/predict", json=body, timeout=30, trust_env=False).json()[
            "temperature"
        ]
        for _ in range(8)
    }


def test_temperature_that_cannot_be_is_refused(windows: Readings) -> None:
    """Without an admin key 401 or 403; no fit 404; nothing to take back 409; nonsense 422: nothing changes."""
    with running(ENGINE_HEALTH_ADMIN_KEYS="wheel", ENGINE_HEALTH_API_KEYS="read") as service:
        put = service.client.put
        assert 401 == put(TEMPERATURE, json={"temperature": 2}).status_code
        assert 403 == put(TEMPERATURE, json={"temperature": 2}, headers={"X-API-Key": "read"}).status_code
        assert 404 == put(TEMPERATURE, json={"fit_id": "0" * 32}, headers=ADMIN).status_code
        assert 409 == put(TEMPERATURE, json={"rollback": True}, headers=ADMIN).status_code
        wrong: tuple[Any, ...] = (
            {},
            {"temperature": 0},
            {"temperature": 101},
            {"temperature": 2, "rollback": True},
            [],
        )
        for body in wrong:
            assert 422 == put(TEMPERATURE, json=body, headers=ADMIN).status_code, body
        assert 400 == put(TEMPERATURE, content=b"{", headers=ADMIN).status_code
        asked = {"instances": [{"telemetry": windows[0].tolist()}]}
        answer = service.client.post("/v1/predict", json=asked, headers=ADMIN).json()
        assert "artefact" == answer["temperature_source"]


def test_fit_that_cannot_be_is_refused_with_the_reason() -> None:
    """Too few engines or an invalid window get a problem with the reason, and nothing is stored."""
    with running() as service:
        answer = service.client.post(FITS, json={})
        assert 409 == answer.status_code
        assert "engines" in answer.json()["detail"]
        assert 422 == service.client.post(FITS, json={"window": "soon"}).status_code
        assert 422 == service.client.get("/v1/calibration?window=0d").status_code


def test_only_the_window_counts(windows: Readings) -> None:
    """A window reports the predictions made in it; older ones are in the report without a window only."""
    with running() as service:
        asked = {"telemetry": windows[0].tolist(), "engine_id": "a", "cycle": 1, "label": 2}
        service.predict([asked])
        time.sleep(1.2)
        service.predict([asked | {"cycle": 2}])
        assert (1, 2) == (calibration(service, "?window=1s")["n"], calibration(service)["n"])
        assert "1s" == calibration(service, "?window=1s")["window"]


def test_periods_add_the_loss_over_time(windows: Readings) -> None:
    """`periods` adds this number of time intervals, with times as elsewhere; too many are rejected."""
    with running() as service:
        rows = [{"engine_id": f"e-{k}", "cycle": 1, "telemetry": windows[k].tolist(), "label": 0} for k in range(4)]
        for row in rows:
            service.predict([row])
        told = calibration(service, "?periods=3")["over_time"]
        assert (3, 4) == (len(told), sum(part["n"] for part in told))
        assert told[0]["from"] == service.client.get("/v1/engines/e-0").json()["history"][0]["made_at"]
        assert "over_time" not in calibration(service)
        assert 422 == service.client.get("/v1/calibration?periods=201").status_code


def test_report_without_predictions_has_null_figures() -> None:
    """Before any prediction every figure is null, none is NaN, and the state says that data are insufficient."""
    with running() as fresh:
        text = fresh.client.get("/v1/calibration").text
        assert "NaN" not in text
        found = json.loads(text)
        assert (0, 0, "insufficient_data") == (found["n"], found["engines"], found["state"])
        assert found["brier"] is None
    with running(ENGINE_HEALTH_DATABASE_URL="") as stateless:
        assert 501 == stateless.client.get("/v1/calibration").status_code
        assert 501 == stateless.client.post(FITS, json={}).status_code


@pytest.mark.parametrize(("text", "seconds"), [("30d", 30 * 86400), ("1s", 1), ("12h", 43200), ("8w", 8 * 604800)])
def test_window_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    """Seconds, minutes, hours, days and weeks."""
    assert seconds == seconds_of(text)


@pytest.mark.parametrize("text", ["", "d", "0d", "-1d", "1.5d", "1y", "1 d", "１d", "9999999999d"])
def test_other_windows_are_refused(text: str) -> None:
    """A window that is not a number and a unit is rejected by its name."""
    with pytest.raises(InvalidInput, match="window"):
        seconds_of(text)
