"""Encode results of the store as JSON: flights, labels, engines and their histories. Independent of HTTP."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from model import numerics
from model.contract import Manifest
from model.evaluation import conformal
from model.evaluation.occlusion import ConditionBaselines
from model.evaluation.sensor_shift import sensor_shifts
from model.numerics import Floats
from model.windows import Readings
from service.codecs.labels import label_json, label_result_json
from service.codecs.predictions_json import NULL, envelope, prediction_rows
from service.codecs.store_requests import encode_cursor
from service.errors import Conflict
from service.inference.predictor import Predictor
from service.store.flight_rounds import NewFlight, RecordedFlights
from service.store.labelling import LabelSource
from service.store.records import EngineHistory, EnginePage, LabelSubmission, StoredModel

StoredRow = Any  # a row of the table of predictions


def cycles_json(predictor: Predictor, flights: Sequence[NewFlight], recorded: RecordedFlights) -> bytes:
    """Return the JSON body of a response of `/v1/cycles`.

    Raises:
        Conflict: every flight contradicts the stored flight of its cycle.
    """
    channels = predictor.model.channels
    results: list[dict[str, Any]] = []
    for flight, outcome in zip(flights, recorded.outcomes, strict=True):
        results.append({"result": outcome.result})
        if outcome.stored is not None:
            results[-1] |= {
                "given": _by_channel(channels, flight.telemetry),
                "known": _by_channel(channels, outcome.stored),
            }
    if recorded.prediction is None:
        raise Conflict("every flight differs from the one stored for its cycle", results=results)
    accepted = [i for i, outcome in enumerate(recorded.outcomes) if outcome.stored is None]
    predicted = prediction_rows(predictor.model, [flights[i] for i in accepted], recorded.prediction, recorded.ids)
    rows = [NULL] * len(flights)
    for i, row in zip(accepted, predicted, strict=True):
        rows[i] = row
    return envelope(predictor, rows, recorded.prediction, False, {"results": results})


def _by_channel(channels: tuple[str, ...], values: Readings) -> dict[str, np.float32]:
    return dict(zip(channels, values, strict=True))


def labels_json(
    rows: Sequence[LabelSubmission], results: Sequence[tuple[str, Floats | None]], classes: tuple[str, ...]
) -> Any:
    """Return the JSON document of a response of `/v1/labels`.

    Raises:
        Conflict: every label contradicts a stored one.
    """
    documents = [label_result_json(row.label, *result, classes) for row, result in zip(rows, results, strict=True)]
    if all(result == "conflict" for result, _ in results):
        message = 'every label contradicts a stored one; send "revise": true to replace it'
        raise Conflict(message, results=documents)
    return {"results": documents}


def engines_json(page: EnginePage) -> dict[str, Any]:
    """Return the JSON document of a response of `/v1/engines`."""
    rows = stored_predictions_json(page.rows, page.kinds)
    for row, stored in zip(rows, page.rows, strict=True):
        row["engine_id"], row["cycle"] = stored.engine_id, stored.cycle
        row["updated_at"], row["failed_at_cycle"] = format_time(stored.created_at), stored.failed_at
    if page.trend is not None:
        trends = _trends(page.trend, page.kinds)
        for row, stored in zip(rows, page.rows, strict=True):
            row["trend"] = trends.get(stored.engine, [])
    last = page.rows[-1] if page.has_more else None
    return {
        "engines": rows,
        "total": page.total,
        "next": None if last is None else encode_cursor(last.risk, last.engine_id),
    }


def _trends(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> dict[int, list[tuple[int, np.float32]]]:
    """Return cycle and probability of the last class, by engine."""
    trends: dict[int, list[tuple[int, np.float32]]] = {}
    for group in _group_by_model(rows, kinds):
        for i, risk in zip(group.indices, group.probabilities()[:, -1], strict=True):
            trends.setdefault(rows[i].engine, []).append((rows[i].cycle, risk))
    for trend in trends.values():
        trend.sort()  # it may have predictions of several models
    return trends


def history_json(engine_id: str, history: EngineHistory) -> dict[str, Any]:
    """Return the JSON document of a response of `/v1/engines/{id}`."""
    predictions = stored_predictions_json(history.rows, history.kinds)
    for group in _group_by_model(history.rows, history.kinds):
        expected_losses = numerics.entropy(group.scaled).astype(np.float32)
        for k, i in enumerate(group.indices):
            predictions[i] |= {"logits": group.logits[k], "expected_loss": expected_losses[k]}
    rows = [
        _history_row(row, history.kinds[row.model], prediction)
        for row, prediction in zip(history.rows, predictions, strict=True)
    ]
    return {"engine_id": engine_id, "failed_at_cycle": history.failed_at, "history": rows}


def sensors_json(manifest: Manifest, cycles: Sequence[int], flights: Readings) -> dict[str, Any] | None:
    """Return the deviation of each sensor from its baseline; None if the model has no baselines."""
    conditions, names = manifest.conditions, manifest.channel_names
    if conditions is None or not conditions.deviations:
        return None
    baselines = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    sensors = sensor_shifts(flights, baselines, conditions.deviations) if len(cycles) else []
    rows = [{"channel": names[s.channel], "shift": s.shift, "deviations": s.deviations.round(4)} for s in sensors]
    return {"cycles": cycles, "channels": rows}


def _history_row(row: StoredRow, kind: StoredModel, prediction: dict[str, Any]) -> dict[str, Any]:
    label = None if row.label is None else np.frombuffer(row.label)
    loss = None
    if label is not None:
        logits = np.frombuffer(row.logits, np.float32)
        loss = np.float32(numerics.cross_entropy(logits, label[None], row.temperature))
    return {
        "prediction_id": row.id,
        "cycle": row.cycle,
        "made_at": format_time(row.created_at),
        "model": kind.digest,
        "temperature": row.temperature,
        "temperature_source": row.temperature_source,
        "is_latest": row.is_latest,
        **prediction,
        "label": None if label is None else label_json(label, kind.classes),
        "source": None if row.source is None else LabelSource(row.source).name.lower(),
        "labelled_at": None if row.labelled is None else format_time(row.labelled),
        "loss": loss,
    }


def stored_predictions_json(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> list[dict[str, Any]]:
    """Return the health of stored predictions, as the responses to their requests had it."""
    documents: list[dict[str, Any]] = [{}] * len(rows)
    for group in _group_by_model(rows, kinds):
        classes, p, sets = group.kind.classes, group.probabilities(), group.sets()
        for k, (i, top) in enumerate(zip(group.indices, group.logits.argmax(axis=1).tolist(), strict=True)):
            rul = rows[i].rul
            documents[i] = {
                "health": classes[top],
                "probabilities": dict(zip(classes, p[k], strict=True)),
                "rul": None if rul is None else np.float32(rul),
                "prediction_set": sets[k] if sets else None,
            }
    return documents


class ModelRows(NamedTuple):
    """Rows of one model: their indices, and their logits (N, C), raw and divided by their temperatures."""

    kind: StoredModel
    indices: list[int]
    logits: Readings
    scaled: Floats

    def probabilities(self) -> Readings:
        """Return the probabilities (N, C) in float32, as the responses had them."""
        return numerics.softmax(self.scaled).astype(np.float32)

    def sets(self) -> list[list[str]] | None:
        """Return the prediction set of each row; None if the model has no rule for them."""
        rule, classes = self.kind.conformal, self.kind.classes
        if rule is None:
            return None
        inside = conformal.prediction_sets(self.logits, self.kind.temperature, rule.threshold, rule.method).tolist()
        return [[name for name, is_inside in zip(classes, row, strict=True) if is_inside] for row in inside]


def _group_by_model(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> Iterator[ModelRows]:
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.model, []).append(i)
    for model, indices in groups.items():
        logits = np.frombuffer(b"".join([rows[i].logits for i in indices]), np.float32).reshape(len(indices), -1)
        scaled = numerics.scaled_rows(logits, [rows[i].temperature for i in indices])
        yield ModelRows(kinds[model], indices, logits, scaled)


def format_time(seconds: float) -> str:
    """Return a time in the format of RFC 3339, in UTC."""
    whole, microseconds = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_format_second(whole)}.{microseconds // 1000:03}Z"


@lru_cache(4096)  # a page of engines has few different seconds
def _format_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
