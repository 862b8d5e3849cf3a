"""Report on a job's labelled rows: the figures of `GET /v1/calibration`, by the same code, and charts.

A running job stores the rows of the report with its parts. At the end it loads all of them into RAM.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from model import numerics
from model.evaluation.calibration_report import Json, LabelledRows, measure_rows, replace_non_finite
from service.calibration.statistics import SOURCES
from service.calibration.use_cases import CalibrationContext, report_of
from service.inference.drift_bins import DriftBins
from service.inference.onnx_model import Model
from service.scoring.outputs import write_atomically
from service.scoring.scorer import Scored
from service.store.records import CountedPredictions

CURVE_POINTS = 200  # number of points of the risk-coverage curve


def build_context(model: Model, temperature: float, bins: DriftBins) -> CalibrationContext:
    """Return the context of a report on scored rows."""
    source = "artefact" if temperature == model.manifest.temperature else "request"
    return CalibrationContext(model, temperature, source, bins.channels)


def report_rows(scored: Scored, window: int | None, bins: DriftBins) -> Any:
    """Return what a report needs of a unit's rows, as a pyarrow table."""
    import pyarrow as pa

    unit, logits, finite_rows = scored.unit, scored.answers.logits, scored.finite_rows
    columns = {
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1]),
        "label": unit.label[finite_rows],
        "engine": unit.engine[finite_rows],
    }
    if bins.storable:
        newest = unit.flat[unit.starts[finite_rows] + (window or 1) - 1]
        row_bins = np.ascontiguousarray(bins.bins(newest))
        columns["bins"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(row_bins.shape[1]), len(finite_rows), [None, pa.py_buffer(row_bins.tobytes())]
        )
    return pa.table(columns)


def evaluate_rows(table: Any, context: CalibrationContext, source: str) -> Json:
    """Return the body of `GET /v1/calibration` for these rows, with confusion matrix and risk-coverage curve.

    The rows have no times, so labels have no lag. All labels have one source, `inspection` or `outcome`.
    """
    classes = context.model.manifest.classes
    logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(-1, len(classes))
    index, engine, n = table["label"].to_numpy(), table["engine"].to_numpy(), len(table)
    labelled = index >= 0
    label = np.where(labelled[:, None], np.eye(len(classes))[np.maximum(index, 0)], np.nan)
    sources = np.where(labelled, SOURCES.index(source), -1)
    bin_chunks = table["bins"].chunks if "bins" in table.column_names else []
    feature_bins = b"".join(chunk.buffers()[1].to_pybytes() for chunk in bin_chunks)
    temperatures, times = np.full(n, context.temperature), np.zeros(n)
    predictions = CountedPredictions(logits, temperatures, label, engine, times, times, sources, feature_bins)
    rows = measure_rows(numerics.scaled(logits[labelled], context.temperature), index[labelled], engine[labelled])
    curves = {"confusion": confusion_matrix(rows), "risk_coverage": risk_coverage_curve(rows)}
    return report_of(predictions, context, 0.0, None) | {
        key: replace_non_finite(value) for key, value in curves.items()
    }


def confusion_matrix(rows: LabelledRows) -> list[list[int]]:
    """Return the counts of rows by true class and, within it, by predicted class."""
    predicted = np.eye(rows.z.shape[1])[rows.z.argmax(axis=1)]
    return [[int(count) for count in counts] for counts in rows.q.T @ predicted]


def risk_coverage_curve(rows: LabelledRows) -> list[Json]:
    """Return the error of the most confident rows by their share of all rows (El-Yaniv and Wiener 2010)."""
    order = np.argsort(-rows.top, kind="stable")
    n = len(order)
    risk = np.cumsum(1 - rows.correct[order]) / np.arange(1, n + 1)
    points: Any = np.unique(np.linspace(0, n - 1, CURVE_POINTS).round().astype(int)) if n else []
    return [{"coverage": (i + 1) / n, "risk": risk[i], "confidence": rows.top[order[i]]} for i in points]


def write_report(path: Path, body: Json, classes: tuple[str, ...]) -> None:
    """Write a report, as JSON or as an HTML page that loads no other file."""
    text = json.dumps(body, indent=1) + "\n" if path.suffix.lower() == ".json" else render_page(body, classes)
    with write_atomically(path) as temporary:
        temporary.write_text(text)


def render_page(body: Json, classes: tuple[str, ...]) -> str:
    """Return the report as HTML: a table of figures and three charts."""
    charts = draw_charts(body, classes).to_html(full_html=False, include_plotlyjs=True, div_id="pictures")
    cells = ((escape(name), escape(format_figure(value))) for name, value in summary_figures(body))
    lines = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in cells)
    style = "body{font-family:sans-serif;margin:2em}td{padding:.2em 1em .2em 0}"
    head = f"<meta charset='utf-8'><title>Calibration</title><style>{style}</style>"
    raw = json.dumps(body).replace("<", "\\u003c")
    data = f"<script type='application/json' id='report'>{raw}</script>"
    content = f"<h1>Calibration: {escape(body['state'])}</h1><table>{lines}</table>{charts}{data}"
    return f"<!doctype html><html><head>{head}</head><body>{content}</body></html>\n"


def summary_figures(body: Json) -> list[tuple[str, Any]]:
    """Return the names and values of the table above the charts."""
    loss, ece, sets = body["cross_entropy"], body["ece"], body["conformal"] or {}
    return [
        ("labelled rows", body["n"]),
        ("engines", body["engines"]),
        ("model", body["model"]),
        ("temperature", body["temperature"]),
        ("accuracy", body["accuracy"]),
        ("cross-entropy, nats", loss["realised"]),
        ("cross-entropy expected by the model", loss["expected"]),
        ("z of the difference, with engines as units", loss["z_engines"]),
        ("Brier", body["brier"]),
        ("ECE", ece["value"]),
        ("ECE expected by chance", ece["noise_band"]),
        ("coverage of the prediction sets", sets.get("coverage")),
        ("mean size of the prediction sets", sets.get("mean_size")),
    ]


def format_figure(value: Any) -> str:
    """Return a figure as text."""
    if isinstance(value, list | tuple):
        return " to ".join(format_figure(bound) for bound in value)
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def draw_charts(body: Json, classes: tuple[str, ...]) -> Any:
    """Return the reliability diagram, the confusion matrix and the risk-coverage curve as one plotly figure."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 3, subplot_titles=("Reliability", "Confusion, rows", "Risk against coverage"))
    filled_bins = [item for item in body["reliability"] if item["n"]]
    diagram = {"x": [item["confidence"] for item in filled_bins], "y": [item["accuracy"] for item in filled_bins]}
    hover = [f"{item['n']} rows" for item in filled_bins]
    figure.add_trace(go.Scatter(**diagram, text=hover, mode="lines+markers", name="observed"), 1, 1)
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot"}, name="calibrated"), 1, 1)
    names, counts = list(classes), body["confusion"]
    figure.add_trace(go.Heatmap(z=counts, x=names, y=names, text=counts, texttemplate="%{text}", showscale=False), 1, 2)
    curve = body["risk_coverage"]
    curve_xy = {"x": [point["coverage"] for point in curve], "y": [point["risk"] for point in curve]}
    figure.add_trace(go.Scatter(**curve_xy, mode="lines", name="error"), 1, 3)
    for k, (x, y) in enumerate((("confidence", "accuracy"), ("predicted", "true"), ("share of rows", "error")), 1):
        figure.update_xaxes(title_text=x, row=1, col=k)
        figure.update_yaxes(title_text=y, row=1, col=k)
    return figure.update_layout(height=480, showlegend=False)
