"""The evaluation of a job's labelled rows: the numbers of `GET /v1/calibration`, by its own arithmetic, and pictures.

While a job runs what an evaluation needs is kept beside its parts. At the end all of it is in memory at once.
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
from service.scoring.outputs import whole
from service.scoring.scorer import Scored
from service.store.records import CountedPredictions

POINTS = 200  # of the risk-coverage curve


def context_of(model: Model, temperature: float, bins: DriftBins) -> CalibrationContext:
    """Return the context of a report on scored rows."""
    source = "artefact" if temperature == model.manifest.temperature else "request"
    return CalibrationContext(model, temperature, source, bins.channels)


def side(scored: Scored, window: int | None, bins: DriftBins) -> Any:
    """What an evaluation needs of a unit's rows (pyarrow)."""
    import pyarrow as pa

    unit, logits, kept = scored.unit, scored.answers.logits, scored.kept
    columns = {
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1]),
        "label": unit.label[kept],
        "engine": unit.engine[kept],
    }
    if bins.storable:
        newest = unit.flat[unit.starts[kept] + (window or 1) - 1]
        found = np.ascontiguousarray(bins.bins(newest))
        columns["bins"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(found.shape[1]), len(kept), [None, pa.py_buffer(found.tobytes())]
        )
    return pa.table(columns)


def measured(table: Any, context: CalibrationContext, source: str) -> Json:
    """The answer of `GET /v1/calibration` for such rows, with the confusion matrix and the risk-coverage curve.

    There are no times: labels have no lag, and all are of one source, `inspection` or `outcome`.
    """
    classes = context.model.manifest.classes
    logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(-1, len(classes))
    index, n = table["label"].to_numpy(), len(table)
    label = np.where((index >= 0)[:, None], np.eye(len(classes))[np.maximum(index, 0)], np.nan)
    at = np.zeros(n)
    kind = np.where(index >= 0, SOURCES.index(source), -1)
    binned = table["bins"].chunks if "bins" in table.column_names else []
    inputs = b"".join(one.buffers()[1].to_pybytes() for one in binned)
    about = (logits, np.full(n, context.temperature), label, table["engine"].to_numpy(), at, at, kind, inputs)
    known = index >= 0
    found = measure_rows(numerics.scaled(logits[known], context.temperature), index[known], about[3][known])
    curves = {"confusion": confusion(found), "risk_coverage": risk_coverage(found)}
    return report_of(CountedPredictions(*about), context, 0.0, None) | {
        key: replace_non_finite(value) for key, value in curves.items()
    }


def confusion(found: LabelledRows) -> list[list[int]]:
    """Rows by true class and, within, by predicted class."""
    predicted = np.eye(found.z.shape[1])[found.z.argmax(axis=1)]
    return [[int(n) for n in row] for row in found.q.T @ predicted]


def risk_coverage(found: LabelledRows) -> list[Json]:
    """Error of the most confident rows, by the share of rows that they are (El-Yaniv and Wiener 2010)."""
    order = np.argsort(-found.top, kind="stable")
    risk = np.cumsum(1 - found.correct[order]) / np.arange(1, len(order) + 1)
    shown: Any = np.unique(np.linspace(0, len(order) - 1, POINTS).round().astype(int)) if len(order) else []
    return [{"coverage": (i + 1) / len(order), "risk": risk[i], "confidence": found.top[order[i]]} for i in shown]


def write(path: Path, body: Json, classes: tuple[str, ...]) -> None:
    """Keep a report, as JSON or as a page that needs nothing beside itself."""
    text = json.dumps(body, indent=1) + "\n" if path.suffix.lower() == ".json" else page(body, classes)
    with whole(path) as beside:
        beside.write_text(text)


def page(body: Json, classes: tuple[str, ...]) -> str:
    """The report as HTML: what it comes to, and three pictures."""
    figure = pictures(body, classes).to_html(full_html=False, include_plotlyjs=True, div_id="pictures")
    lines = "".join(f"<tr><td>{escape(name)}</td><td>{escape(told(value))}</td></tr>" for name, value in figures(body))
    style = "body{font-family:sans-serif;margin:2em}td{padding:.2em 1em .2em 0}"
    head = f"<meta charset='utf-8'><title>Calibration</title><style>{style}</style>"
    raw = json.dumps(body).replace("<", "\\u003c")
    data = f"<script type='application/json' id='report'>{raw}</script>"
    content = f"<h1>Calibration: {escape(body['state'])}</h1><table>{lines}</table>{figure}{data}"
    return f"<!doctype html><html><head>{head}</head><body>{content}</body></html>\n"


def figures(body: Json) -> list[tuple[str, Any]]:
    """What is told in the table above the pictures."""
    loss, ece, sets = body["cross_entropy"], body["ece"], body["conformal"] or {}
    return [
        ("labelled rows", body["n"]),
        ("engines", body["engines"]),
        ("model", body["model"]),
        ("temperature", body["temperature"]),
        ("accuracy", body["accuracy"]),
        ("cross-entropy, nats", loss["realised"]),
        ("cross-entropy expected by the model", loss["expected"]),
        ("z of the difference, engines as the unit", loss["z_engines"]),
        ("Brier", body["brier"]),
        ("ECE", ece["value"]),
        ("ECE that chance gives", ece["noise_band"]),
        ("coverage of the prediction sets", sets.get("coverage")),
        ("mean size of the prediction sets", sets.get("mean_size")),
    ]


def told(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, list | tuple):
        return " to ".join(told(one) for one in value)
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def pictures(body: Json, classes: tuple[str, ...]) -> Any:
    """Reliability diagram, confusion matrix, risk-coverage curve (plotly)."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 3, subplot_titles=("Reliability", "Confusion, rows", "Risk against coverage"))
    filled = [one for one in body["reliability"] if one["n"]]
    about = {"x": [one["confidence"] for one in filled], "y": [one["accuracy"] for one in filled]}
    hover = [f"{one['n']} rows" for one in filled]
    figure.add_trace(go.Scatter(**about, text=hover, mode="lines+markers", name="seen"), 1, 1)
    figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot"}, name="calibrated"), 1, 1)
    names, counts = list(classes), body["confusion"]
    figure.add_trace(go.Heatmap(z=counts, x=names, y=names, text=counts, texttemplate="%{text}", showscale=False), 1, 2)
    curve = body["risk_coverage"]
    xy = {"x": [one["coverage"] for one in curve], "y": [one["risk"] for one in curve]}
    figure.add_trace(go.Scatter(**xy, mode="lines", name="error"), 1, 3)
    for k, (x, y) in enumerate((("confidence", "accuracy"), ("predicted", "true"), ("share of rows", "error")), 1):
        figure.update_xaxes(title_text=x, row=1, col=k)
        figure.update_yaxes(title_text=y, row=1, col=k)
    return figure.update_layout(height=480, showlegend=False)
