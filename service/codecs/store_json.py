"""Responses of the store as JSON: flights, labels, engines and their histories. Knows no HTTP."""

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
    """What `/v1/cycles` answers, as JSON.

    Raises:
        Conflict: every flight contradicts what is known of its cycle.
    """
    channels = predictor.model.channels
    told: list[dict[str, Any]] = []
    for flight, outcome in zip(flights, recorded.outcomes, strict=True):
        told.append({"result": outcome.result})
        if outcome.known is not None:
            told[-1] |= {
                "given": _by_channel(channels, flight.telemetry),
                "known": _by_channel(channels, outcome.known),
            }
    if recorded.prediction is None:
        raise Conflict("every flight contradicts what is known of its cycle", results=told)
    accepted = [flight for flight, outcome in zip(flights, recorded.outcomes, strict=True) if outcome.known is None]
    found = iter(prediction_rows(predictor.model, accepted, recorded.prediction, recorded.ids))
    rows = [next(found) if outcome.known is None else NULL for outcome in recorded.outcomes]
    return envelope(predictor, rows, recorded.prediction, False, {"results": told})


def _by_channel(channels: tuple[str, ...], values: Readings) -> dict[str, np.float32]:
    return dict(zip(channels, values, strict=True))


def labels_json(
    rows: Sequence[LabelSubmission], results: Sequence[tuple[str, Floats | None]], classes: tuple[str, ...]
) -> Any:
    """What `/v1/labels` answers.

    Raises:
        Conflict: every label contradicts another one that was given before.
    """
    told = [label_result_json(row.label, *one, classes) for row, one in zip(rows, results, strict=True)]
    if all(result == "conflict" for result, _ in results):
        message = 'every label contradicts one that was given before; "revise": true would replace it'
        raise Conflict(message, results=told)
    return {"results": told}


def engines_json(found: EnginePage) -> dict[str, Any]:
    """What `/v1/engines` answers."""
    rows = stored_predictions_json(found.rows, found.kinds)
    for row, stored in zip(rows, found.rows, strict=True):
        row["engine_id"], row["cycle"] = stored.engine_id, stored.cycle
        row["updated_at"], row["failed_at_cycle"] = format_time(stored.created_at), stored.failed_at
    if found.trend is not None:
        trends = _trends(found.trend, found.kinds)
        for row, stored in zip(rows, found.rows, strict=True):
            row["trend"] = trends.get(stored.engine, [])
    last = found.rows[-1] if found.more else None
    return {
        "engines": rows,
        "total": found.total,
        "next": None if last is None else encode_cursor(last.risk, last.engine_id),
    }


def _trends(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> dict[int, list[tuple[int, np.float32]]]:
    """Cycle and probability of the last class, by engine."""
    found: dict[int, list[tuple[int, np.float32]]] = {}
    for group in _group_by_model(rows, kinds):
        for i, risk in zip(group.places, group.probabilities()[:, -1], strict=True):
            found.setdefault(rows[i].engine, []).append((rows[i].cycle, risk))
    for trend in found.values():
        trend.sort()  # of several models together
    return found


def history_json(engine_id: str, found: EngineHistory) -> dict[str, Any]:
    """What `/v1/engines/{id}` answers."""
    answered = stored_predictions_json(found.rows, found.kinds)
    for group in _group_by_model(found.rows, found.kinds):
        expected = numerics.entropy(group.scaled).astype(np.float32)
        for k, i in enumerate(group.places):
            answered[i] |= {"logits": group.logits[k], "expected_loss": expected[k]}
    past = [_history_row(row, found.kinds[row.model], one) for row, one in zip(found.rows, answered, strict=True)]
    return {"engine_id": engine_id, "failed_at_cycle": found.failed_at, "history": past}


def sensors_json(manifest: Manifest, cycles: Sequence[int], flights: Readings) -> dict[str, Any] | None:
    """How far each sensor is from what is usual; None of a model that does not say what is."""
    conditions, names = manifest.conditions, manifest.channel_names
    if conditions is None or not conditions.deviations:
        return None
    usual = ConditionBaselines.from_lists(conditions.setting_scales, conditions.usual)
    found = sensor_shifts(flights, usual, conditions.deviations) if len(cycles) else []
    rows = [{"channel": names[one.channel], "shift": one.shift, "deviations": one.deviations.round(4)} for one in found]
    return {"cycles": cycles, "channels": rows}


def _history_row(row: StoredRow, kind: StoredModel, answered: dict[str, Any]) -> dict[str, Any]:
    truth = None if row.label is None else np.frombuffer(row.label)
    loss = None
    if truth is not None:
        logits = np.frombuffer(row.logits, np.float32)
        loss = np.float32(numerics.cross_entropy(logits, truth[None], row.temperature))
    return {
        "prediction_id": row.id,
        "cycle": row.cycle,
        "made_at": format_time(row.created_at),
        "model": kind.digest,
        "temperature": row.temperature,
        "temperature_source": row.temperature_source,
        "is_latest": row.is_latest,
        **answered,
        "label": None if truth is None else label_json(truth, kind.classes),
        "source": None if row.source is None else LabelSource(row.source).name.lower(),
        "labelled_at": None if row.labelled is None else format_time(row.labelled),
        "loss": loss,
    }


def stored_predictions_json(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> list[dict[str, Any]]:
    """The health of stored predictions as it was answered."""
    found: list[dict[str, Any]] = [{}] * len(rows)
    for group in _group_by_model(rows, kinds):
        classes, p, sets = group.kind.classes, group.probabilities(), group.sets()
        for k, (i, top) in enumerate(zip(group.places, group.logits.argmax(axis=1).tolist(), strict=True)):
            rul = rows[i].rul
            found[i] = {
                "health": classes[top],
                "probabilities": dict(zip(classes, p[k], strict=True)),
                "rul": None if rul is None else np.float32(rul),
                "prediction_set": sets[k] if sets else None,
            }
    return found


class ModelRows(NamedTuple):
    """Rows of one model: their places, and logits (N, C) as the network gave them and over their temperatures."""

    kind: StoredModel
    places: list[int]
    logits: Readings
    scaled: Floats

    def probabilities(self) -> Readings:
        """(N, C), float32 as they were answered."""
        return numerics.softmax(self.scaled).astype(np.float32)

    def sets(self) -> list[list[str]] | None:
        """The prediction set of each row; None of a model without a rule."""
        rule, classes = self.kind.conformal, self.kind.classes
        if rule is None:
            return None
        inside = conformal.prediction_sets(self.logits, self.kind.temperature, rule.threshold, rule.method).tolist()
        return [[name for name, held in zip(classes, row, strict=True) if held] for row in inside]


def _group_by_model(rows: Sequence[StoredRow], kinds: Mapping[int, StoredModel]) -> Iterator[ModelRows]:
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.model, []).append(i)
    for model, places in groups.items():
        logits = np.frombuffer(b"".join([rows[i].logits for i in places]), np.float32).reshape(len(places), -1)
        yield ModelRows(
            kinds[model], places, logits, numerics.scaled_rows(logits, [rows[i].temperature for i in places])
        )


def format_time(seconds: float) -> str:
    """A time as RFC 3339 has it, in UTC."""
    whole, part = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_format_second(whole)}.{part // 1000:03}Z"


@lru_cache(4096)  # a page of engines has few
def _format_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
