from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from model import numerics
from model.contract import CHANNELS, Manifest
from model.windows import Readings
from service.metrics import Metrics, Series, observe, observe_all
from tests.support.models import edited, identity_classifier
from tests.support.processes import Service, running

LABELS = ["normal", "degrading", "critical", [0.2, 0.3, 0.5]]


@pytest.fixture
def fresh() -> Iterator[Service]:
    """A service without earlier requests."""
    with running() as service:
        yield service


def test_counters_equal_the_responses(fresh: Service, manifest: Manifest, windows: Readings) -> None:
    """Each counter equals the sum over the responses of labelled and unlabelled predictions.

    A temperature of the request changes the response, and no counter of the loss.
    """
    unlabelled = fresh.predict([{"telemetry": window.tolist()} for window in windows])["predictions"]
    pairs = zip(windows, LABELS, strict=True)
    instances = [{"telemetry": window.tolist(), "label": label} for window, label in pairs]
    rows = fresh.predict(instances)["predictions"]
    m, t = fresh.metrics(), manifest.temperature
    logits = np.array([row["logits"] for row in rows])
    q = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5]])

    def near(value: float) -> object:
        return pytest.approx(value, rel=1e-4)

    assert 4 == m["engine_health_labelled_total"]
    assert m["engine_health_loss_nats_total"] == near(sum(row["loss"] for row in rows))
    assert m["engine_health_expected_loss_nats_total"] == near(sum(row["expected_loss"] for row in rows))
    assert m["engine_health_loss_variance_nats2_total"] == near(numerics.loss_variance(logits, t).sum())
    assert m["engine_health_brier_total"] == near(numerics.brier(logits, q, t).sum())
    assert m["engine_health_correct_total"] == near(numerics.correct(logits, q).sum())
    covered = sum(q[i, manifest.classes.index(name)] for i, row in enumerate(rows) for name in row["prediction_set"])
    assert m["engine_health_conformal_covered_total"] == near(covered)
    assert 4 == m["engine_health_cross_entropy_loss_count"]
    assert m["engine_health_cross_entropy_loss_sum"] == near(sum(row["loss"] for row in rows))
    bins = numerics.reliability(logits, q, t)
    for name, amounts in (("predictions", bins.count), ("confidence", bins.confidence), ("correct", bins.correct)):
        series = [m[f'engine_health_reliability_{name}_total{{bin="{k}"}}'] for k in range(15)]
        np.testing.assert_allclose(amounts, series, rtol=1e-4)
    for name in manifest.classes:
        count = sum(row["health"] == name for row in (*rows, *unlabelled))
        assert count == m[f'engine_health_predictions_total{{health="{name}"}}']
    assert 8 == m["engine_health_confidence_count"] == m["engine_health_entropy_nats_count"]
    assert 8 == m["engine_health_batch_rows_sum"]
    assert 2 == m["engine_health_inference_duration_seconds_count"] == m["engine_health_queue_duration_seconds_count"]
    assert rows != fresh.predict(instances, temperature=1.7)["predictions"]
    again = fresh.metrics()
    for name in ("loss_nats", "expected_loss_nats", "loss_variance_nats2", "brier", "correct", "conformal_covered"):
        assert again[f"engine_health_{name}_total"] == near(2 * m[f"engine_health_{name}_total"])


def test_input_series_exist_before_the_first_request(fresh: Service, manifest: Manifest) -> None:
    """Bins and imputed values of each channel are 0 at the start, so that no increase is missed."""
    m = fresh.metrics()
    assert manifest.reference is not None
    for channel in CHANNELS:
        assert 0 == m[f'engine_health_imputed_values_total{{channel="{channel}"}}']
        for b in range(len(manifest.reference.channels[channel].edges) + 1):
            assert 0 == m[f'engine_health_input_values_total{{bin="{b}",channel="{channel}"}}']


def test_model_without_windows_counts_its_inputs(tmp_path: Path) -> None:
    """Each value of an instance with one row is counted in a bin."""
    bins = {"edges": [0.0], "shares": [0.5, 0.5]}
    described: dict[str, object] = {
        "name": "table",
        "version": "1",
        "classes": ["n", "e", "s", "w"],
        "channels": [{"name": name} for name in "abcd"],
        "reference": {"channels": {"b": bins}},
    }
    with running(ENGINE_HEALTH_MODEL=str(identity_classifier(tmp_path / "t.onnx", described))) as table:
        table.predict([{"telemetry": [1, 2, 3, 4]}, {"telemetry": [1, 5, 3, 4]}])
        m = table.metrics()
    assert (0, 2) == tuple(m[f'engine_health_input_values_total{{bin="{b}",channel="b"}}'] for b in (0, 1))


def test_head_equals_get_without_body(fresh: Service, manifest: Manifest) -> None:
    """HEAD on any route has the status and headers of GET without its body, and is counted as HEAD."""
    paths = fresh.client.get("/openapi.json").json()["paths"]
    routes = [route for route, methods in paths.items() if "get" in methods]
    assert {"/livez", "/readyz", "/metrics", "/v1/model", "/v2/models/{name}"} < set(routes)
    for route in (*routes, "/", "/docs", "/openapi.json"):
        path = route.format(name=manifest.name, version=manifest.version, engine_id="none")
        head, got = fresh.client.head(path), fresh.client.get(path)
        assert (got.status_code, b"") == (head.status_code, head.content), path
        assert got.headers.get("content-type") == head.headers.get("content-type")
    m = {name.replace(":path}", "}"): value for name, value in fresh.metrics().items()}
    for route in (*routes, "/openapi.json"):
        heads = [v for k, v in m.items() if "requests_total" in k and f'method="HEAD",route="{route}"' in k]
        assert [1] == heads, route


def test_newest_readings_are_counted_in_reference_bins(fresh: Service, manifest: Manifest, windows: Readings) -> None:
    """The newest value of each channel is counted in one bin, and older rows of the window in none."""
    fresh.predict([{"telemetry": window.tolist()} for window in windows])
    m = fresh.metrics()
    assert manifest.reference is not None
    for k, channel in enumerate(CHANNELS):
        edges = manifest.reference.channels[channel].edges
        expected = np.bincount(np.searchsorted(edges, windows[:, -1, k].astype(float)), minlength=len(edges) + 1)
        series = [
            m.get(f'engine_health_input_values_total{{bin="{b}",channel="{channel}"}}', 0) for b in range(len(expected))
        ]
        assert expected.tolist() == series


def test_reference_with_many_bins_is_counted(windows: Readings, tmp_path: Path) -> None:
    """Beyond 255 edges each newest value falls into its bin, alone and with other rows of the batch."""
    k = CHANNELS.index("sensor_4")
    edges = np.linspace(
        windows[..., k].min() - 900, windows[..., k].max() + 1, 400
    ).tolist()  # most edges are below the values
    reference = {"channels": {"sensor_4": {"edges": edges, "shares": [1 / 401] * 401}}}
    path = edited(tmp_path / "m.onnx", {"reference": reference})
    with running(ENGINE_HEALTH_MODEL=str(path)) as service:
        service.predict([{"telemetry": window.tolist()} for window in windows])
        service.predict([{"telemetry": windows[0].tolist()}])
        m = service.metrics()
    newest = [*windows[:, -1, k].astype(float), float(windows[0, -1, k])]
    expected = np.bincount(np.searchsorted(edges, newest), minlength=401)
    assert expected[256:].sum() > 0
    counts = [m.get(f'engine_health_input_values_total{{bin="{b}",channel="sensor_4"}}', 0) for b in range(401)]
    assert expected.tolist() == counts


def test_requests_are_counted_by_route_template(fresh: Service, windows: Readings) -> None:
    """Routes are templates or `unmatched` and methods a closed set, so that clients cannot create series."""
    fresh.predict([{"telemetry": windows[0].tolist()}])
    for path in ("/a", "/b", "/v1/model/c"):
        fresh.client.get(path)
    fresh.client.request("TRACE", "/livez")
    fresh.client.post("/v1/predict", content=b"{", headers={"Content-Type": "application/json"})
    m = fresh.metrics()
    prefix = "engine_health_http_requests_total"
    assert 1 == m[f'{prefix}{{method="POST",route="/v1/predict",status="200"}}']
    assert 1 == m[f'{prefix}{{method="POST",route="/v1/predict",status="400"}}']
    assert 3 == m[f'{prefix}{{method="GET",route="unmatched",status="404"}}']
    assert 1 == sum(value for name, value in m.items() if name.startswith(prefix) and 'method="other"' in name)
    assert 1 == m['engine_health_rejected_total{reason="not_json"}']
    assert 2 == m['engine_health_http_request_duration_seconds_count{route="/v1/predict"}']


def test_rejected_requests_are_counted_by_template(manifest: Manifest) -> None:
    """A rejected request is counted under its route template, which includes the version if it was given."""
    infer = f"/v2/models/{manifest.name}/versions/{manifest.version}/infer"
    with running(ENGINE_HEALTH_API_KEYS="read") as guarded:
        for path in ("/v1/model", f"/v2/models/{manifest.name}", "/v2/repository/index", "/nothing"):
            guarded.client.get(path)
        guarded.client.post(infer, json={})
        guarded.client.post(infer, json={}, headers={"X-API-Key": "read"})
        m = guarded.metrics()
    versioned = "/v2/models/{name}/versions/{version}/infer"
    expected = {
        ("GET", "/v1/model", 401),
        ("GET", "/v2/models/{name}", 401),
        ("GET", "/v2/repository/index", 403),
        ("GET", "unmatched", 401),
        ("POST", versioned, 401),
        ("POST", versioned, 400),
    }
    for method, route, status in expected:
        assert 1 == m[f'engine_health_http_requests_total{{method="{method}",route="{route}",status="{status}"}}']


def test_model_readiness_and_temperature_are_metrics(fresh: Service, manifest: Manifest) -> None:
    """Readiness, temperature and the digest of the active model are metrics."""
    m, digest = fresh.metrics(), fresh.client.get("/v1/model").json()["digest"]
    assert 1 == m["engine_health_ready"]
    assert manifest.temperature == m["engine_health_temperature"]
    info = f'engine_health_model_info{{digest="{digest}",name="{manifest.name}",version="{manifest.version}"}}'
    assert {info: 1} == {k: v for k, v in m.items() if "model_info" in k}


def test_evaluate_changes_no_calibration_metric(fresh: Service) -> None:
    """Logits of an evaluation are counted as requests only."""
    fresh.client.post("/v1/evaluate", json={"logits": [[1, 2, 3]], "labels": [0]})
    m = fresh.metrics()
    assert 0 == m["engine_health_labelled_total"] == m["engine_health_confidence_count"]


def test_direct_metric_updates_equal_the_public_methods() -> None:
    """Metrics that are updated through private names export the same text as through `inc` and `observe`."""
    values = np.array([0.0, 0.05, 0.1, 0.100001, 0.7, 3.0, np.inf])
    texts = []
    for direct in (True, False):
        registry = CollectorRegistry()
        counter = Counter("rows", "Rows.", ["kind"], registry=registry).labels("a")
        one, many = (Histogram(name, name, buckets=(0.1, 0.5, 1), registry=registry) for name in ("one", "many"))
        if direct:
            Metrics(CollectorRegistry()).input(Series([], {0: counter, 3: counter}, 2), [0, 1])
            for value in values.tolist():
                observe(one, value)
            observe_all(many, values)
            observe_all(many, values[1:2])
        else:
            counter.inc(2)
            for value in values.tolist():
                one.observe(value)
            for value in (*values.tolist(), values[1]):
                many.observe(value)
        lines = generate_latest(registry).decode().splitlines()
        texts.append([line for line in lines if "_created" not in line])
    assert len(texts[0]) > 10
    assert texts[0] == texts[1]
