"""The Grafana dashboard: `python -m ops.dashboard` writes grafana/engine-health.json. Independent of the service.

Five rows of panels. Each panel has a title with the quantity, and a description.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "grafana" / "engine-health.json"
SOURCE = {"type": "prometheus", "uid": "engine-health"}  # as grafana/provisioning names it
WINDOWS = ("1h", "1d", "30d")  # for which rules.yml has figures
COLUMNS, HEIGHT, PANELS_PER_ROW = 24, 7, 4
Panel = dict[str, Any]

LEGEND = {"legend": {"displayMode": "list", "placement": "bottom"}}
WORDS = [
    {"type": "value", "options": {"0": {"text": "no", "color": "red"}, "1": {"text": "yes", "color": "green"}}},
    {"type": "special", "options": {"match": "nan", "result": {"text": "none configured", "color": "text"}}},
]
PREDICTING = 'route=~".*/(predict|cycles|infer)"'
INDEPENDENT = "scalar(engine_health:threshold:dependent_rows ^ 0.5)"


def panel(title: str, unit: str, about: str, queries: dict[str, str], kind: str = "timeseries") -> Panel:
    """Return a panel over time with one query per legend; `unit` is the name in Grafana."""
    targets = [
        {
            "refId": chr(65 + k),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "instant": kind != "timeseries",
        }
        for k, (legend, expr) in enumerate(queries.items())
    ]
    return {
        "title": title,
        "description": about,
        "type": kind,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": LEGEND,
    }


def stat(title: str, about: str, expr: str, **shown: str) -> Panel:
    """Return a panel with the current value of every replica, 0 and 1 as words."""
    stat_panel = panel(title, "none", about, {"{{instance}}": expr}, "stat")
    stat_panel["options"] = {"textMode": "value_and_name", "colorMode": "value"} | shown
    stat_panel["fieldConfig"]["defaults"]["mappings"] = WORDS
    return stat_panel


def rate(name: str, label: str) -> str:
    """Return the rate of events per second by one label."""
    return f"sum by ({label}) (rate(engine_health_{name}[$__rate_interval]))"


def mean(name: str, window: str = "$__rate_interval") -> str:
    """Return the mean of a histogram."""
    return f"sum(rate(engine_health_{name}_sum[{window}])) / sum(rate(engine_health_{name}_count[{window}]))"


def within(name: str, window: str, selector: str = "") -> dict[str, str]:
    """Return the 50th, 90th and 99th percentile of a histogram."""
    buckets = f"sum by (le) (rate(engine_health_{name}_bucket{{{selector}}}[{window}]))"
    return {f"{q} % within": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 90, 99)}


def over(name: str) -> str:
    """Return the recorded value of a rule for the window selected above the panels."""
    return f'engine_health:{name}{{window="$window"}}'


def up() -> Iterator[Panel]:
    """Row 1."""
    yield stat("Replica is up", "Prometheus can scrape it.", 'up{job="engine-health"}')
    yield stat("Replica is ready", "Each of its workers has a verified model.", "engine_health_ready")
    yield stat("Store is up", "The database responds to each replica.", "engine_health_store_up")
    model = "Name, version and digest of the active model."
    stat_panel = stat("Active model", model, "engine_health_model_info", textMode="name")
    stat_panel["targets"][0]["legendFormat"] = "{{name}} {{version}} {{digest}}"
    yield stat_panel
    temperature = "It divides the logits. A fit, a change by hand or another model changes it."
    stat_panel = stat("Active temperature", temperature, "engine_health_temperature")
    stat_panel["fieldConfig"]["defaults"] = {"unit": "none", "decimals": 3}
    yield stat_panel


def fast() -> Iterator[Panel]:
    """Row 2."""
    routes = {"{{route}}": rate("http_requests_total", "route")}
    yield panel("Request rate", "reqps", "Requests, including probes and scrapes.", routes)
    time = "Prediction requests with any number of windows, from the request headers to the end of the response."
    quantiles = within("http_request_duration_seconds", "$__rate_interval", PREDICTING)
    yield panel("Duration of prediction requests", "s", time, quantiles)
    slow = {"last {{window}}": "engine_health:slow:ratio", "objective": "engine_health:threshold:slow_budget"}
    promise = "Share of prediction requests that took more than 1 s, and the objective."
    yield panel("Slow prediction requests", "percentunit", promise, slow)
    parts = {"waiting": mean("queue_duration_seconds"), "inference": mean("inference_duration_seconds")}
    yield panel(
        "Waiting and inference time", "s", "Mean time of a request in the queue, and of a batch in ONNX Runtime.", parts
    )
    rows = {"rows": mean("batch_rows")}
    yield panel("Rows per batch", "short", "Mean number of rows of an inference batch; 1 at low load.", rows)


def refused() -> Iterator[Panel]:
    """Row 3."""
    reasons = {"{{reason}}": rate("rejected_total", "reason")}
    yield panel("Rejected requests by reason", "reqps", "Requests that the client can correct or retry.", reasons)
    lost = {"failed": "engine_health:errors:ratio5m", "overloaded": "engine_health:overloaded:ratio5m"}
    yield panel(
        "Failed and overloaded requests", "percentunit", "Share of requests with a 5xx response, and with 429.", lost
    )
    not_stored = {"predictions": "sum(increase(engine_health_predictions_not_stored_total[$__rate_interval]))"}
    yield panel(
        "Predictions not stored",
        "short",
        "Predictions that were returned while the database was unavailable.",
        not_stored,
    )


def calibrated() -> Iterator[Panel]:
    """Row 4, over the window chosen above the panels."""
    sure = {"confidence": over("confidence:mean"), "accuracy": over("accuracy:ratio")}
    about = "Mean confidence and accuracy of labelled predictions; equal for a calibrated model."
    yield panel("Confidence and accuracy", "percentunit", about, sure)
    loss = {"cross-entropy": over("cross_entropy:mean"), "expected": over("expected_cross_entropy:mean")}
    about = "Mean cross-entropy in nats, its expectation for a calibrated model (entropy), and the Brier score."
    yield panel("Realised and expected loss", "none", about, loss | {"Brier": over("brier:mean")})
    gap = {"deviations": f"{over('loss_gap:z')} / {INDEPENDENT}", "alarm": "engine_health:threshold:deviations"}
    about = "Loss above its expectation in standard deviations, adjusted for dependent rows. Above 0: overconfident."
    yield panel("z of the loss gap", "none", about, gap)
    ece = {"ECE": over("ece:ratio"), "explained by chance": f"{over('ece_noise:ratio')} * {INDEPENDENT}"}
    about = "Expected calibration error, and its value for a calibrated model with the same number of labels."
    yield panel("Expected calibration error", "percentunit", about, ece)
    yield reliability()
    sets = {"coverage": over("conformal_coverage:ratio")}
    about = "Share of labelled predictions whose prediction set contains the true class; the manifest has the target."
    yield panel("Coverage of prediction sets", "percentunit", about, sets)
    labels = {
        "labelled": over("labelled_per_prediction:ratio"),
        "needed": "engine_health:threshold:representative_share",
    }
    about = (
        "Labels that arrived in the window per prediction that can get one (stored with an engine, or labelled in the "
        "request). Below the threshold, alerts on calibration are silent."
    )
    yield panel("Share labelled", "percentunit", about, labels)
    lag = within("label_lag_seconds", "$window")
    yield panel("Delay of labels", "s", "Time from a prediction to its label.", lag)


def reliability() -> Panel:
    """Return the reliability diagram: two bars per non-empty bin of the top probability."""

    def in_bins(name: str) -> str:  # 00 to 14, so that they sort
        share = f"{over(name)} / ({over('reliability_predictions:increase')} > 0)"
        return f'sum by (bin) (label_replace({share}, "bin", "0$1", "bin", "(.)"))'

    names = {"confidence": "reliability_confidence:increase", "accuracy": "reliability_correct:increase"}
    about = "15 bins of the confidence. The two bars of a bin are equal for a calibrated model."
    queries = {legend: in_bins(name) for legend, name in names.items()}
    chart = panel("Accuracy at each confidence", "percentunit", about, queries, "barchart")
    for target in chart["targets"]:
        target["format"] = "table"
    renamed = {"Value #A": "confidence", "Value #B": "accuracy"}
    hidden = dict.fromkeys(("Time", "Time 1", "Time 2"), True)
    chart["transformations"] = [
        {"id": "joinByField", "options": {"byField": "bin", "mode": "outer"}},
        {"id": "organize", "options": {"excludeByName": hidden, "renameByName": renamed}},
        {"id": "sortBy", "options": {"sort": [{"field": "bin"}]}},
    ]
    chart["options"] = LEGEND | {"xField": "bin"}
    return chart


def drifting() -> Iterator[Panel]:
    """Row 5."""
    counts = "increase(engine_health_predictions_total[1h])"
    shares = {"{{health}}": f"sum by (health) ({counts}) / scalar(sum({counts}))"}
    yield panel("Predicted classes", "percentunit", "Share of each class in the predictions of the last hour.", shares)
    sure = {"confidence": mean("confidence", "1h"), "entropy": mean("entropy_nats", "1h")}
    about = "Mean confidence, and mean entropy in nats, of all predictions of the last hour."
    yield panel("Confidence and entropy", "none", about, sure)
    psi = {"{{channel}}": "engine_health:input_psi:sum1d", "changed": "engine_health:threshold:psi"}
    about = (
        "Population stability index of the last day against the mean of 30 days. Few flights make it large by chance."
    )
    yield panel("Input drift", "none", about, psi)
    missing = {"{{channel}}": rate("imputed_values_total", "channel")}
    yield panel("Missing readings", "cps", "Missing readings that were replaced by the last value.", missing)


def placed(rows: dict[str, Iterator[Panel]]) -> Iterator[Panel]:
    """Return the panels below the titles of their rows, at most four in a line."""
    y = 0
    for title, panels in rows.items():
        yield {"type": "row", "title": title, "panels": [], "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}}
        row_panels, y = list(panels), y + 1
        for line in (row_panels[k : k + PANELS_PER_ROW] for k in range(0, len(row_panels), PANELS_PER_ROW)):
            w = COLUMNS // len(line)
            yield from (
                row_panel | {"gridPos": {"x": k * w, "y": y, "w": w, "h": HEIGHT}} for k, row_panel in enumerate(line)
            )
            y += HEIGHT


def text() -> str:
    """Return the content of the file."""
    rows = {
        "Availability": up(),
        "Latency": fast(),
        "Rejections": refused(),
        "Calibration": calibrated(),
        "Drift": drifting(),
    }
    options = [{"text": window, "value": window, "selected": window == WINDOWS[-1]} for window in WINDOWS]
    window = {"name": "window", "label": "calibration window", "type": "custom", "query": ",".join(WINDOWS)}
    dashboard = {
        "uid": "engine-health",
        "title": "engine-health",
        "schemaVersion": 38,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [window | {"options": options, "current": options[-1]}]},
        "panels": [placed_panel | {"id": k} for k, placed_panel in enumerate(placed(rows), 1)],
    }
    return json.dumps(dashboard, indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
