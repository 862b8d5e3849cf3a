"""The Grafana dashboard: `python -m ops.dashboard` writes grafana/engine-health.json. Knows queries, and no service.

Five rows, each a question; each panel asks one question more and answers it with a few lines.
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
    """A question and its answer over time: a query for each legend; `unit` as Grafana names it."""
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
    """A question and its answer now, 0 and 1 in words, of every replica."""
    stat_panel = panel(title, "none", about, {"{{instance}}": expr}, "stat")
    stat_panel["options"] = {"textMode": "value_and_name", "colorMode": "value"} | shown
    stat_panel["fieldConfig"]["defaults"]["mappings"] = WORDS
    return stat_panel


def rate(name: str, label: str) -> str:
    """Events a second by one label."""
    return f"sum by ({label}) (rate(engine_health_{name}[$__rate_interval]))"


def mean(name: str, window: str = "$__rate_interval") -> str:
    """The mean of what a histogram observed."""
    return f"sum(rate(engine_health_{name}_sum[{window}])) / sum(rate(engine_health_{name}_count[{window}]))"


def within(name: str, window: str, selector: str = "") -> dict[str, str]:
    """What half, and nearly all, of what a histogram observed stays below."""
    buckets = f"sum by (le) (rate(engine_health_{name}_bucket{{{selector}}}[{window}]))"
    return {f"{q} % within": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 90, 99)}


def over(name: str) -> str:
    """What a rule recorded for the window chosen above the panels."""
    return f'engine_health:{name}{{window="$window"}}'


def up() -> Iterator[Panel]:
    """Row 1."""
    yield stat("Does every replica answer?", "Prometheus reaches it.", 'up{job="engine-health"}')
    yield stat("Is every replica ready?", "Each of its workers has a proven model.", "engine_health_ready")
    yield stat("Does the memory answer?", "The database, as each replica sees it.", "engine_health_store_up")
    model = "The same name for the same file; 1 while it answers."
    stat_panel = stat("Which model answers?", model, "engine_health_model_info", textMode="name")
    stat_panel["targets"][0]["legendFormat"] = "{{name}} {{version}} {{digest}}"
    yield stat_panel
    temperature = "The logits are divided by it; a refit or another model changes it."
    stat_panel = stat("At which temperature?", temperature, "engine_health_temperature")
    stat_panel["fieldConfig"]["defaults"] = {"unit": "none", "decimals": 3}
    yield stat_panel


def fast() -> Iterator[Panel]:
    """Row 2."""
    routes = {"{{route}}": rate("http_requests_total", "route")}
    yield panel("How much is asked?", "reqps", "Requests, probes and scrapes included.", routes)
    time = "Requests that predict, of one window or of thousands, from the headers read to the answer written."
    quantiles = within("http_request_duration_seconds", "$__rate_interval", PREDICTING)
    yield panel("How long does a prediction take?", "s", time, quantiles)
    slow = {"last {{window}}": "engine_health:slow:ratio", "promised": "engine_health:threshold:slow_budget"}
    promise = "Share of predicting requests that took more than a second."
    yield panel("Is the promise of speed kept?", "percentunit", promise, slow)
    parts = {"waiting": mean("queue_duration_seconds"), "inference": mean("inference_duration_seconds")}
    yield panel("Where does the time go?", "s", "Mean of a request in the queue, of a batch in ONNX Runtime.", parts)
    rows = {"rows": mean("batch_rows")}
    yield panel("How many rows share an inference?", "short", "Mean of a batch; one while the service is idle.", rows)


def refused() -> Iterator[Panel]:
    """Row 3."""
    reasons = {"{{reason}}": rate("rejected_total", "reason")}
    yield panel("What is refused, and why?", "reqps", "Requests that their callers can mend.", reasons)
    lost = {"failed": "engine_health:errors:ratio5m", "turned away": "engine_health:overloaded:ratio5m"}
    yield panel("What is not answered?", "percentunit", "Share of requests answered with a 5xx, and with 429.", lost)
    forgotten = {"predictions": "sum(increase(engine_health_predictions_not_stored_total[$__rate_interval]))"}
    yield panel("What was not remembered?", "short", "Predictions answered while the database did not.", forgotten)


def calibrated() -> Iterator[Panel]:
    """Row 4, over the window chosen above the panels."""
    sure = {"confidence": over("confidence:mean"), "accuracy": over("accuracy:ratio")}
    about = "Mean top probability and accuracy of labelled predictions: alike if calibrated."
    yield panel("Is it as sure as it is right?", "percentunit", about, sure)
    loss = {"cross-entropy": over("cross_entropy:mean"), "expected": over("expected_cross_entropy:mean")}
    about = "Mean cross-entropy in nats, and the entropy that a calibrated model expects of it; the Brier score beside."
    yield panel("Does it lose what it expects to lose?", "none", about, loss | {"Brier": over("brier:mean")})
    gap = {"deviations": f"{over('loss_gap:z')} / {INDEPENDENT}", "alarm": "engine_health:threshold:deviations"}
    about = "Deviations of the loss above what is expected, dependent rows counted once: above 0 is overconfident."
    yield panel("Is the gap more than chance?", "none", about, gap)
    ece = {"ECE": over("ece:ratio"), "explained by chance": f"{over('ece_noise:ratio')} * {INDEPENDENT}"}
    about = "Expected calibration error, and what a calibrated model may show at these counts."
    yield panel("How far off are the probabilities?", "percentunit", about, ece)
    yield reliability()
    sets = {"coverage": over("conformal_coverage:ratio")}
    about = "Share of labelled predictions whose set held the truth; the model's manifest says what was promised."
    yield panel("Do the prediction sets hold the truth?", "percentunit", about, sets)
    labels = {
        "labelled": over("labelled_per_prediction:ratio"),
        "needed": "engine_health:threshold:representative_share",
    }
    about = (
        "Truths that came in the window for each prediction made in it that a truth can reach (of an engine, or "
        "labelled at once); with fewer than needed no alert believes them."
    )
    yield panel("Do labels come?", "percentunit", about, labels)
    lag = within("label_lag_seconds", "$window")
    yield panel("How late is the truth?", "s", "From a prediction to its label.", lag)


def reliability() -> Panel:
    """The reliability diagram: two bars for each bin of the top probability that holds a row."""

    def in_bins(name: str) -> str:  # 00 to 14, so that they sort
        share = f"{over(name)} / ({over('reliability_predictions:increase')} > 0)"
        return f'sum by (bin) (label_replace({share}, "bin", "0$1", "bin", "(.)"))'

    names = {"confidence": "reliability_confidence:increase", "accuracy": "reliability_correct:increase"}
    about = "Fifteen bins of the top probability: the two bars of a bin are alike if calibrated."
    queries = {legend: in_bins(name) for legend, name in names.items()}
    chart = panel("How often is each confidence right?", "percentunit", about, queries, "barchart")
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
    yield panel("What does it say of the fleet?", "percentunit", "Share of the last hour's predictions.", shares)
    sure = {"confidence": mean("confidence", "1h"), "entropy": mean("entropy_nats", "1h")}
    about = "Mean of the last hour's predictions, labelled or not: top probability, and entropy in nats."
    yield panel("Is it as sure as ever?", "none", about, sure)
    psi = {"{{channel}}": "engine_health:input_psi:sum1d", "changed": "engine_health:threshold:psi"}
    about = "Population stability index, the last day against the mean of thirty. Few flights make it large by chance."
    yield panel("Are the readings what they were?", "none", about, psi)
    missing = {"{{channel}}": rate("imputed_values_total", "channel")}
    yield panel("Which readings are missing?", "cps", "Missing values that were held from the cycle before.", missing)


def placed(rows: dict[str, Iterator[Panel]]) -> Iterator[Panel]:
    """Panels under the titles of their rows, four beside each other at most."""
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
    """The whole file."""
    rows = {"Up?": up(), "Fast?": fast(), "Refused?": refused(), "Calibrated?": calibrated(), "Drifting?": drifting()}
    options = [{"text": window, "value": window, "selected": window == WINDOWS[-1]} for window in WINDOWS]
    window = {"name": "window", "label": "calibrated over", "type": "custom", "query": ",".join(WINDOWS)}
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
